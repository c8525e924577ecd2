"""The choice between the two Landmark Predictors, and the open face model's, fitted to detected landmarks.

`choose_predictor` is the only place that chooses. DECA and FLAME are preferred if both files are installed. Otherwise,
and for a saved identity that only has a shape of the open face model, that model is used. It needs no file, but 68
landmarks to read the shape and the pose of a photo: those of the face model pack, or of MediaPipe's detector.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from facesnap_ext.cache import face_key
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.identity.faces import Face
from facesnap_ext.landmarks.hints import POINTS5, POINTS72
from facesnap_ext.landmarks.neutral import NeutralFace
from facesnap_ext.landmarks.open_face import (
    FitError,
    OpenPose,
    OpenShape,
    basis_version,
    face_points,
    fit,
    load_basis,
    predict,
)
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.landmarks.poses import Rig
from facesnap_ext.landmarks.predictor import FaceCodes
from facesnap_ext.landmarks.rigs import open_face_rig
from facesnap_ext.weights.identity_file import Identity, SavedShape
from facesnap_ext.weights.mediapipe import TASK_FILE
from facesnap_ext.weights.model_files import ModelFiles

DECA_AND_FLAME = "DECA and FLAME"
OPEN_FACE_MODEL = "open face model"
POOR_FIT = 0.1
"""Error of a fit above which its landmarks are reported, relative to the distance between the eyes. Faces in eight
photos that come with Python packages have errors of .02 to .035, and of at most .06 with another detector's mean."""

SAVED_WITHOUT_SHAPE = (
    "The identity {0} was saved without the shape of the face, so a mean face is posed; save the identity again from "
    "photos."
)

Notes = tuple[str, ...]


class NoLandmarksError(FaceSnapError):
    """No model detects the landmarks that a photo's pose is read from."""


class Predictor(Protocol):
    """Predicts the 72 landmarks of one person. Notes tell the user where a result deviates from the request."""

    @property
    def title(self) -> str:
        """The predictor's name, for the user."""

    def landmarks(self, driving: Face, hint: str) -> tuple[Landmarks, Notes]:
        """The person's landmarks in a driving face's pose and expression, in pixels of its photo, and notes.

        Args:
            hint: how they are drawn, a key of `HINTS`.

        Raises:
            NoLandmarksError: the pose cannot be read from the photo.
            FaceSnapError: a model file is unusable, or the detected landmarks do not form a face.
        """

    def neutral(self, driving: Face) -> tuple[NeutralFace, Notes]:
        """The face of `landmarks` without its expression, and the same notes. It always has 72 points.

        Raises:
            NoLandmarksError: the pose cannot be read from the photo.
            FaceSnapError: a model file is unusable, or the detected landmarks do not form a face.
        """

    def expression(self, face: Face) -> np.ndarray:
        """How the expression in a photo displaces the person's neutral face: [72,3] float64 face heights.

        Raises:
            NoLandmarksError: the expression cannot be read from the photo.
            FaceSnapError: a model file is unusable, or the detected landmarks do not form a face.
        """

    def rig(self) -> tuple[Rig, Notes]:
        """The person's face as templates and sliders pose it, and notes.

        Raises:
            FaceSnapError: a model file is unusable.
        """


@dataclass(frozen=True)
class Preview:
    """What a job will draw, before it runs.

    Attributes:
        rig: the person's face for templates and sliders.
        landmarks: the landmarks for the poses "photo" and "own"; None without a photo, or if they cannot be detected.
        notes: sentences that tell the user where these deviate from the request.
        neutral: the face of `landmarks` without its expression.
        expression: the displacement [72,3] of the neutral face by the expression of another photo, in face heights.
    """

    rig: Rig
    landmarks: Landmarks | None
    notes: tuple[str, ...] = ()
    neutral: NeutralFace | None = None
    expression: np.ndarray | None = None


def predictor_title(files: ModelFiles) -> str:
    """Return the name of the predictor that these files make available."""
    return DECA_AND_FLAME if files.has_deca_and_flame else OPEN_FACE_MODEL


def choose_predictor(encoders: Encoders, references: Sequence[Face] = (), saved: Identity | None = None) -> Predictor:
    """Return the predictor for a person.

    Args:
        references: one face per reference photo of the person; all of them determine one shape.
        saved: the saved identity, whose shape is averaged with that of the photos. With neither, the person is unknown:
            the rig is a mean face, and landmarks keep the driving face's own shape.

    Raises:
        FaceSnapError: a model file is unusable, or the detected landmarks do not form a face.
    """
    if encoders.files.has_deca_and_flame and (references or saved is None or saved.shapes is not None):
        saved_shapes = None if saved is None else saved.shapes
        return DecaPredictor(encoders, encoders.source_shape(references, saved_shapes))
    shapes: list[tuple[OpenShape, int]] = []  # with the number of photos
    notes = []
    if references and encoders.landmark_part:
        shape, poses = _fit(encoders, references)
        shapes.append((shape, len(references)))
        notes = [_poor_fit(face) for face, pose in zip(references, poses) if pose.error > POOR_FIT][:1]
    if saved is not None and (saved_shape := _saved_shape(saved.open_shape)):
        shapes.append((saved_shape, len(saved.embeddings)))
    if not shapes and references:
        notes = [without_landmarks(encoders.files, "a mean face is posed instead of the person's own")]
    elif not shapes and saved is not None:
        notes = [SAVED_WITHOUT_SHAPE.format(saved.name)]
    known = bool(references) or saved is not None
    return OpenFacePredictor(encoders, _mean_shape(shapes), tuple(references), known, tuple(notes))


@dataclass(frozen=True)
class DecaPredictor:
    """DECA and FLAME.

    Attributes:
        shape: DECA's shape code [S] of the person; None for an unknown person.
    """

    encoders: Encoders
    shape: Tensor | None
    title = DECA_AND_FLAME

    def landmarks(self, driving: Face, hint: str) -> tuple[Landmarks, Notes]:
        return self.encoders.landmarks(self._shape_for(driving), driving), ()

    def neutral(self, driving: Face) -> tuple[NeutralFace, Notes]:
        source, codes = self._source(driving), self.encoders.codes(driving)
        return self.encoders.predictor().neutral_face(source, codes), ()

    def expression(self, face: Face) -> np.ndarray:
        return self.encoders.predictor().expression(self._source(face), self.encoders.codes(face))

    def _source(self, face: Face) -> FaceCodes:
        return self.encoders.predictor().neutral(self._shape_for(face))

    def _shape_for(self, face: Face) -> Tensor:
        return self.encoders.codes(face).shape if self.shape is None else self.shape

    def rig(self) -> tuple[Rig, Notes]:
        return self.encoders.rig(self.shape), ()


@dataclass(frozen=True)
class OpenFacePredictor:
    """The open face model, fitted to 68 detected landmarks.

    A photo of the person that drives itself keeps its detected landmarks, which are closer than any fit.

    Attributes:
        shape: None for a mean face.
        references: the faces that the shape was fitted to.
        known: whether there is a person, whose shape replaces the driving face's.
        notes: why the person's own shape is not known, or why it may be wrong.
    """

    encoders: Encoders
    shape: OpenShape | None
    references: tuple[Face, ...]
    known: bool
    notes: Notes = ()
    title = OPEN_FACE_MODEL

    def landmarks(self, driving: Face, hint: str) -> tuple[Landmarks, Notes]:
        own = not self.known or _key_of(driving) in map(_key_of, self.references)
        if hint == POINTS5 and (own or not self.encoders.landmark_part):
            name = driving.photo.name
            kept = without_landmarks(self.encoders.files, f"the five points of {name} keep the shape of its face")
            return self.encoders.keypoints(driving), () if own else (kept,)
        points = detected_landmarks(self.encoders, driving)
        if own:
            return points, ()
        pose = _pose_of(self.encoders, driving)
        poor = (_poor_fit(driving),) if pose.error > POOR_FIT else ()
        predicted = predict(self.encoders.basis, self.shape, pose).astype(np.float32)
        return Landmarks(predicted, points.width, points.height), (*self.notes, *poor)

    def neutral(self, driving: Face) -> tuple[NeutralFace, Notes]:
        landmarks, notes = self.landmarks(driving, POINTS72)
        basis, pose = self.encoders.basis, _pose_of(self.encoders, driving)
        rows = pose.scale * pose.rotation[:2] * [[1], [-1]]  # pixels per unit of the basis
        points = landmarks.points - (basis.expression @ pose.expression) @ rows.T
        return NeutralFace(replace(landmarks, points=points.astype(np.float32)), self._height * rows), notes

    def expression(self, face: Face) -> np.ndarray:
        amounts = _pose_of(self.encoders, face).expression
        displacement: np.ndarray = self.encoders.basis.expression @ amounts / self._height
        return displacement

    @property
    def _height(self) -> float:
        """Height of the person's face in the unit of the basis."""
        return float(np.ptp(face_points(self.encoders.basis, self.shape)[:, 1]))

    def rig(self) -> tuple[Rig, Notes]:
        if self.shape is None and self.encoders.files.flame is not None:
            return self.encoders.rig(None), self.notes  # FLAME's mean face
        return open_face_rig(self.encoders.basis, self.shape), self.notes


def detected_landmarks(encoders: Encoders, face: Face) -> Landmarks:
    """Return a face's own 72 landmarks as they are detected: the paper's "drive landmark".

    Raises:
        NoLandmarksError: neither the pack nor the model folder has a model for 68 landmarks.
    """
    landmarks = encoders.detected_landmarks(face)
    if landmarks is None:
        raise NoLandmarksError(without_landmarks(encoders.files, f"the pose of {face.photo.name} cannot be read"))
    return landmarks


def without_landmarks(files: ModelFiles, consequence: str) -> str:
    """Return the sentence for a face model pack without a model for 68 landmarks, and no detector of MediaPipe's."""
    return (
        f"The face model pack {files.require('face_pack').name} has no model for 68 landmarks (1k3d68.onnx), so "
        f"{consequence}; put that file of antelopev2 or buffalo_l into its folder, or convert MediaPipe's {TASK_FILE} "
        "with python -m facesnap_ext convert and put the result into the model folder."
    )


def fit_shape(encoders: Encoders, references: Sequence[Face]) -> SavedShape | None:
    """Return the open face model's shape of a person in all reference photos, for a saved identity; None if no model
    for 68 landmarks is installed."""
    if not encoders.landmark_part:
        return None
    shape, _ = _fit(encoders, references)
    modes, residual = (torch.from_numpy(values).float() for values in (shape.modes, shape.residual))
    return SavedShape(modes, residual, basis_version())


def _saved_shape(saved: SavedShape | None) -> OpenShape | None:
    """Return a saved shape; None without one, or if it belongs to another version of the basis."""
    if saved is None or saved.version != basis_version():
        return None
    modes, residual = saved.modes.double().numpy(), saved.residual.double().numpy()
    return OpenShape(modes, residual) if len(modes) == load_basis().shape.shape[2] else None


def _mean_shape(shapes: Sequence[tuple[OpenShape, int]]) -> OpenShape | None:
    """Return the mean of shapes, weighted by their numbers of photos; None without any."""
    if not shapes:
        return None
    weights = [count for _, count in shapes]
    modes = np.average([shape.modes for shape, _ in shapes], axis=0, weights=weights)
    return OpenShape(modes, np.average([shape.residual for shape, _ in shapes], axis=0, weights=weights))


def _pose_of(encoders: Encoders, face: Face) -> OpenPose:
    return _fit(encoders, [face])[1][0]


def _fit(encoders: Encoders, faces: Sequence[Face]) -> tuple[OpenShape, list[OpenPose]]:
    """Fit the open face model to faces of one person.

    Raises:
        FaceSnapError: the landmarks that were detected in a photo do not form a face.
    """

    part = encoders.landmark_part

    def compute() -> tuple[OpenShape, list[OpenPose]]:
        photos = [detected_landmarks(encoders, face).points for face in faces]
        try:
            return fit(encoders.basis, photos)
        except FitError as error:
            names = " and ".join(face.photo.name for face in faces)
            raise FaceSnapError(
                f"The landmarks that {encoders.files.require(part).name} detects in {names} do not form a face; "
                "use other photos."
            ) from error

    key = ("open face", encoders.signature("face_pack"), encoders.signature(part), *map(_key_of, faces))
    return encoders.cache.get_or_compute(key, compute)


def _key_of(face: Face) -> tuple[Hashable, ...]:
    return face_key("", (), face.photo, face.box)


def _poor_fit(face: Face) -> str:
    return (
        f"The landmarks detected in {face.photo.name} hardly form a face, so its shape and pose may be wrong; use "
        "another photo if the result looks wrong."
    )
