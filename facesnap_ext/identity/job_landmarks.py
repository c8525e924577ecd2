"""The landmarks of a person in a job, and their pose as sliders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from facesnap_ext.identity.faces import Face
from facesnap_ext.identity.job_faces import Faces
from facesnap_ext.identity.predictors import Predictor, Preview
from facesnap_ext.landmarks.neutral import movements_of, pose_of
from facesnap_ext.landmarks.points72 import Landmarks, crop_and_resize
from facesnap_ext.landmarks.poses import Pose, displacement, pose_landmarks, reposition
from facesnap_ext.settings.pose import custom_expression, pose_from_unit
from facesnap_ext.settings.unit import RANGES, Unit


def predict_landmarks(
    predictor: Predictor, unit: Unit, faces: Faces, hint: str, width: int, height: int, models: Path | None = None
) -> tuple[Landmarks, tuple[str, ...]]:
    """The landmarks of a person, and notes. They are in the output image, or in the init image if it provides the pose.

    Args:
        hint: how they are drawn, a key of `HINTS`.
        width, height: size of the output image in pixels.
        models: the model folder, for saved poses.

    Raises:
        FaceSnapError: pose or expression cannot be read from a photo, or a model file is unusable.
    """
    if faces.driving is None:
        rig, notes = predictor.rig()
        expression = None if faces.expression is None else predictor.expression(faces.expression)
        return pose_landmarks(rig, pose_from_unit(unit, width, height, models), width, height, expression), notes
    if unit.expression_source == "pose":
        landmarks, notes = predictor.landmarks(faces.driving, hint)
    else:
        neutral, notes = predictor.neutral(faces.driving)
        landmarks = neutral.with_expression(_expression(predictor, unit, faces))
    if not faces.in_init_image:
        landmarks = in_output(landmarks, faces.driving, width, height)
    return reposition(landmarks, unit.x, unit.y, unit.size), notes


def pose_as_sliders(
    predictor: Predictor, unit: Unit, faces: Faces, width: int, height: int, models: Path | None = None
) -> Pose:
    """The pose and the expression of a person as parameters of a pose, for saving. Like that of a template, `size` is a
    fraction of the shorter side. Arguments and errors as for `predict_landmarks`."""
    rig, _ = predictor.rig()
    if faces.driving is None:
        pose = pose_from_unit(unit, width, height, models)
        if faces.expression is not None:
            pose = replace(pose, **movements_of(rig, predictor.expression(faces.expression)))
    else:
        neutral, _ = predictor.neutral(faces.driving)
        driving = faces.driving
        if not faces.in_init_image:
            neutral = neutral.moved(lambda one: in_output(one, driving, width, height))
        as_in_pose = unit.expression_source == "pose"
        expression = predictor.expression(driving) if as_in_pose else _expression(predictor, unit, faces)
        pose = pose_of(rig, neutral, expression, RANGES)
        given = {name: getattr(unit, name) for name in ("x", "y", "size")}
        pose = replace(pose, **{name: value for name, value in given.items() if value is not None})
    low, high = RANGES["size"]
    return replace(pose, size=min(max(pose.size / min(1.0, width / height), low), high))


def in_output(landmarks: Landmarks, face: Face, width: int, height: int) -> Landmarks:
    """Landmarks of a face in its photo's pixels, in an output image of this size, upright."""
    return crop_and_resize(landmarks.upright(face.turn), width, height, face.turned_box)


def photo_points(preview: Preview) -> dict[str, Any]:
    """A photo's landmarks and neutral face in a preview, as fractions of the image's width and height, and the
    expression of another photo in face heights; all may be None."""
    landmarks, neutral, expression = preview.landmarks, preview.neutral, preview.expression
    points = camera = still = None
    if landmarks is not None:
        points = (landmarks.points / (landmarks.width, landmarks.height)).tolist()
    if neutral is not None:
        size = np.array([neutral.landmarks.width, neutral.landmarks.height])
        still, camera = (neutral.landmarks.points / size).tolist(), (neutral.matrix / size[:, None]).tolist()
    field = None if expression is None else expression.tolist()
    return {"points": points, "neutral": still, "camera": camera, "expression": field}


def _expression(predictor: Predictor, unit: Unit, faces: Faces) -> np.ndarray:
    """The displacement [72,3] of the neutral face by an expression that does not come with the pose."""
    if faces.expression is not None:
        return predictor.expression(faces.expression)
    return displacement(predictor.rig()[0], custom_expression(unit))
