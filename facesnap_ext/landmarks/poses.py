"""Poses without a driving photo: a neutral face, rotated, deformed and placed by a few parameters.

The model is a short closed formula, which `javascript/facesnap_pose.js` also computes while a slider moves:

    P = rest + Σ |amount|·D,   with a D for the positive and, where there are any, one for the negative amounts
    Q = P Rᵀ,   R = Rz(-roll) · Ry(yaw) · Rx(pitch)
    pixel = (x·width + s·Q_x,  y·height - s·Q_y),   s = size·height

The head first pitches about its ear-to-ear axis, then yaws about the image's vertical axis, then rolls in the image
plane. Rotations are right-handed in FLAME's axes (x to the image's right, y up, z towards the viewer), which explains
the sign of roll. The unit of length is the height of the neutral face from brows to chin, seen from the front. The
origin is the centre of the bounding box of the neutral points; it stays at (x, y) regardless of the rotation. The
projection is orthographic, as in DECA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from facesnap_ext.landmarks.movements import EXPRESSIONS, Sliders
from facesnap_ext.landmarks.points72 import COLOURS, POLYLINES, Landmarks


@dataclass(frozen=True, eq=False)
class Rig:
    """A neutral face and its displacement directions, in face heights from the centre of the face (see the module).

    Attributes:
        rest: [72,3] float64 points of the neutral face.
        directions: by the names in `MOVEMENTS`, float64 displacements for an amount of 1 [1,72,3], or for amounts of 1
            and of -1 [2,72,3].
    """

    rest: np.ndarray
    directions: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Pose(Sliders):
    """Parameters of a pose.

    Attributes:
        x: horizontal position of the face's centre, as a fraction of the image's width.
        y: vertical position of the face's centre, as a fraction of the image's height.
        size: height of the face from brows to chin, as a fraction of the image's height.
    """

    x: float = 0.5
    y: float = 0.45
    size: float = 0.45


TEMPLATES: dict[str, Pose] = {
    "front": Pose(),
    "three quarters left": Pose(yaw=-35, size=0.42),
    "three quarters right": Pose(yaw=35, size=0.42),
    "profile left": Pose(yaw=-68, size=0.45, x=0.52),
    "profile right": Pose(yaw=68, size=0.45, x=0.48),
    "looking up": Pose(pitch=-24, brow_inner=0.2, brow_outer_left=0.2, brow_outer_right=0.2, size=0.42),
    "looking down": Pose(pitch=22, lid_left=-0.35, lid_right=-0.35, size=0.42),
    "tilted": Pose(yaw=14, pitch=4, roll=18, size=0.45),
    "close-up": Pose(yaw=-8, size=0.72, y=0.5),
    "far": Pose(yaw=12, size=0.16, y=0.3),
}
"""Named poses. Unlike elsewhere, their `size` is a fraction of the image's shorter side, so that the face fits into
images of any aspect ratio."""


def displacement(rig: Rig, sliders: Sliders) -> np.ndarray:
    """Return the displacement [72,3] of the neutral face by all movements, in face heights."""
    total = np.zeros_like(rig.rest)
    for name, directions in rig.directions.items():
        amount = getattr(sliders, name)
        total += abs(amount) * directions[int(amount < 0)]
    return total


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Return R = Rz(-roll) · Ry(yaw) · Rx(pitch), [3,3] float64, for angles in degrees."""
    (sy, sp, sr), (cy, cp, cr) = ([f(math.radians(a)) for a in (yaw, pitch, roll)] for f in (math.sin, math.cos))
    return np.array(
        [
            [cr * cy, cr * sy * sp + sr * cp, cr * sy * cp - sr * sp],
            [-sr * cy, cr * cp - sr * sy * sp, -cr * sp - sr * sy * cp],
            [-sy, cy * sp, cy * cp],
        ]
    )


def pose_points(rig: Rig, pose: Pose, width: float, height: float, expression: np.ndarray | None = None) -> np.ndarray:
    """Evaluate the module's formula: [72,2] float64 pixels of an image of `width` × `height` pixels.

    Args:
        expression: [72,3] a further displacement in face heights, such as the expression in a photo.
    """
    points = rig.rest + displacement(rig, pose)
    if expression is not None:
        points = points + expression
    turned = points @ rotation(pose.yaw, pose.pitch, pose.roll).T
    return np.array([pose.x * width, pose.y * height]) + pose.size * height * turned[:, :2] * [1, -1]


def pose_landmarks(
    rig: Rig, pose: Pose, width: float, height: float, expression: np.ndarray | None = None
) -> Landmarks:
    """Return the rig's 72 points in a pose, in an image of `width` × `height` pixels; see `pose_points`."""
    return Landmarks(pose_points(rig, pose, width, height, expression).astype(np.float32), width, height)


def placement(landmarks: Landmarks) -> tuple[float, float, float]:
    """Return x, y and size of a face as in `Unit`: the centre of the bounding box as fractions of the image's width and
    height, and the height of the box as a fraction of the image's height."""
    left, top, right, bottom = landmarks.box.tolist()
    width, height = landmarks.width, landmarks.height
    return (left + right) / 2 / width, (top + bottom) / 2 / height, (bottom - top) / height


def reposition(
    landmarks: Landmarks, x: float | None = None, y: float | None = None, size: float | None = None
) -> Landmarks:
    """Move and scale landmarks within their image.

    Args:
        landmarks: the points; returned unchanged if all other arguments are None.
        x: new horizontal position, as in `placement`; None keeps the current position.
        y: new vertical position, as in `placement`; None keeps the current position.
        size: new size, as in `placement`; None keeps the current size.
    """
    if x is None and y is None and size is None:
        return landmarks
    current = placement(landmarks)
    x, y, size = (old if new is None else new for old, new in zip(current, (x, y, size)))
    image_size = np.array([landmarks.width, landmarks.height])
    scale = size / current[2] if current[2] else 1.0
    points = (landmarks.points - current[:2] * image_size) * scale + (x, y) * image_size
    return Landmarks(points.astype(np.float32), landmarks.width, landmarks.height)


def for_browser(rig: Rig) -> dict[str, Any]:
    """Return the JSON data for `facesnapAttach` in javascript/facesnap_canvas.js: the rig, the polylines with their
    colours in drawing order, the templates, and the named expressions."""
    return {
        "rest": rig.rest.tolist(),
        "directions": {name: direction.tolist() for name, direction in rig.directions.items()},
        "parts": [{"colour": list(colour), "lines": POLYLINES[part]} for part, colour in COLOURS.items()],
        "templates": {name: asdict(pose) for name, pose in TEMPLATES.items()},
        "expressions": {name: dict(amounts) for name, amounts in EXPRESSIONS.items()},
    }
