"""Poses without a driving photo: a neutral face, rotated, deformed and placed by a few parameters.

The model is a short closed formula, which `javascript/facesnap_pose.js` also computes while a slider moves:

    P = rest + Σ amount·D,   with amounts mouth, brows, closed = max(-eyes, 0) and wide = max(eyes, 0)
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
import torch
from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.flame import JAW, NOT_FINITE, Flame, posed_vertices
from facesnap_ext.landmarks.points72 import COLOURS, LEFT_EYE, POLYLINES, RIGHT_EYE, Landmarks, points_on

JAW_OPEN = 0.35  # rotation of FLAME's jaw joint at mouth 1, in radians
BROW_LIFT = 0.4  # lift of the brows at brows 1, relative to their distance from the eyes; -1 lowers them equally far
LIDS_MEET = 0.15  # height at which closing lids meet, above the lower lid, relative to the opening of the eye
LIDS_WIDEN = (0.5, 0.1)  # rise of the upper and drop of the lower lid at eyes 1, relative to the opening of the eye
BROWS = sorted({i for part in ("left_eyebrow", "right_eyebrow") for line in POLYLINES[part] for i in line})


@dataclass(frozen=True, eq=False)
class Rig:
    """A neutral face and its displacement directions, in face heights from the centre of the face (see the module).

    Attributes:
        rest: [72,3] float32 points of the neutral face.
        directions: by name, the displacements [72,3] float32 for an amount of 1; see `amounts`.
    """

    rest: np.ndarray
    directions: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Pose:
    """Parameters of a pose, with the units and signs of `settings.Unit`.

    Attributes:
        yaw: degrees; positive turns the nose to the image's right.
        pitch: degrees; positive lowers the nose.
        roll: degrees; positive tilts the head clockwise in the image.
        mouth: 0 (closed) … 1 (wide open).
        brows: -1 (lowered) … 1 (raised).
        eyes: -1 (closed) … 1 (wide open).
        x: horizontal position of the face's centre, as a fraction of the image's width.
        y: vertical position of the face's centre, as a fraction of the image's height.
        size: height of the face from brows to chin, as a fraction of the image's height.
    """

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    mouth: float = 0.0
    brows: float = 0.0
    eyes: float = 0.0
    x: float = 0.5
    y: float = 0.45
    size: float = 0.45


TEMPLATES: dict[str, Pose] = {
    "front": Pose(),
    "three quarters left": Pose(yaw=-35, size=0.42),
    "three quarters right": Pose(yaw=35, size=0.42),
    "profile left": Pose(yaw=-68, size=0.45, x=0.52),
    "profile right": Pose(yaw=68, size=0.45, x=0.48),
    "looking up": Pose(pitch=-24, brows=0.2, size=0.42),
    "looking down": Pose(pitch=22, eyes=-0.35, size=0.42),
    "tilted": Pose(yaw=14, pitch=4, roll=18, size=0.45),
    "close-up": Pose(yaw=-8, size=0.72, y=0.5),
    "far": Pose(yaw=12, size=0.16, y=0.3),
}
"""Named poses. Unlike elsewhere, their `size` is a fraction of the image's shorter side, so that the face fits into
images of any aspect ratio."""


def amounts(pose: Pose) -> dict[str, float]:
    """Return the amount of each of a rig's directions in a pose."""
    return {"mouth": pose.mouth, "brows": pose.brows, "closed": max(-pose.eyes, 0.0), "wide": max(pose.eyes, 0.0)}


def flame_rig(flame: Flame, shape: Tensor | None = None) -> Rig:
    """Derive a person's rig from FLAME, whose jaw joint opens the mouth.

    Args:
        flame: the head model.
        shape: [S] shape code of the person in standard deviations, from DECA; None for FLAME's mean face.

    Raises:
        FaceSnapError: the face is not made of finite numbers.
    """
    shape = flame.v_template.new_zeros(1) if shape is None else shape
    neutral, open_jaw = flame.v_template.new_zeros(2, 1, len(flame.parents), 3)
    open_jaw[0, JAW, 0] = JAW_OPEN
    with torch.no_grad():
        vertices = [posed_vertices(flame, shape[None], shape.new_zeros(1, 0), pose) for pose in (neutral, open_jaw)]
        rest, opened = points_on(torch.cat(vertices), flame.faces).double().cpu().numpy()
    rig = make_rig(rest, opened)
    if not all(np.isfinite(points).all() for points in (rig.rest, *rig.directions.values())):
        raise FaceSnapError(NOT_FINITE)
    return rig


def make_rig(rest: np.ndarray, opened: np.ndarray) -> Rig:
    """Derive a rig from a neutral face.

    Brows and eyelids are displaced vertically by amounts derived from the 72 points, because FLAME has no joints for
    them, its expression directions differ between files, and none of them is a blink.

    Args:
        rest: [72,3] points of the face with its mouth closed, in any unit; x to the image's right, y up, z towards the
            viewer.
        opened: [72,3] the same face with its mouth wide open.
    """
    low, high = rest.min(axis=0), rest.max(axis=0)
    height = high[1] - low[1]
    rest, opened = ((points - (low + high) / 2) / height for points in (rest, opened))
    closed, wide = _lid_directions(rest)
    directions = {"mouth": opened - rest, "brows": _brow_direction(rest), "closed": closed, "wide": wide}
    float32 = {name: direction.astype(np.float32) for name, direction in directions.items()}
    return Rig(rest.astype(np.float32), float32)


def _brow_direction(rest: np.ndarray) -> np.ndarray:
    """Return the displacement [72,3] that raises the brows."""
    direction = np.zeros_like(rest)
    eyes = [*LEFT_EYE, *RIGHT_EYE]
    direction[BROWS, 1] = BROW_LIFT * (rest[BROWS, 1].mean() - rest[eyes, 1].mean())
    return direction


def _lid_directions(rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two displacements [72,3], which close and widen the eyes. The corners of the eyes do not move."""
    closed, wide = np.zeros_like(rest), np.zeros_like(rest)
    for part in ("left_eye", "right_eye"):
        outline = POLYLINES[part][0]  # from the outer corner to the inner corner, which is the fifth point, and back
        for i in (1, 2, 3):
            upper, lower = sorted((outline[i], outline[-1 - i]), key=lambda point: -rest[point, 1])
            opening = rest[upper] - rest[lower]
            closed[upper], closed[lower] = -(1 - LIDS_MEET) * opening, LIDS_MEET * opening
            wide[upper], wide[lower] = LIDS_WIDEN[0] * opening, -LIDS_WIDEN[1] * opening
    return closed, wide


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


def pose_points(rig: Rig, pose: Pose, width: float, height: float) -> np.ndarray:
    """Evaluate the module's formula: [72,2] float64 pixels of an image of `width` × `height` pixels."""
    points = rig.rest.astype(np.float64)
    for name, amount in amounts(pose).items():
        points += amount * rig.directions[name].astype(np.float64)
    turned = points @ rotation(pose.yaw, pose.pitch, pose.roll).T
    return np.array([pose.x * width, pose.y * height]) + pose.size * height * turned[:, :2] * [1, -1]


def pose_landmarks(rig: Rig, pose: Pose, width: float, height: float) -> Landmarks:
    """Return the rig's 72 points in a pose, in an image of `width` × `height` pixels."""
    return Landmarks(pose_points(rig, pose, width, height).astype(np.float32), width, height)


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
    colours in drawing order, and the templates."""
    return {
        "rest": rig.rest.tolist(),
        "directions": {name: direction.tolist() for name, direction in rig.directions.items()},
        "parts": [{"colour": list(colour), "lines": POLYLINES[part]} for part, colour in COLOURS.items()],
        "templates": {name: asdict(pose) for name, pose in TEMPLATES.items()},
    }
