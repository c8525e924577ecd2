"""Poses without a driving photo: a person's own face at rest, turned, expressed and placed by a few numbers.

The model is small and closed, so that `javascript/facesnap.js` computes the same points while a slider moves:

    P = rest + mouth·D_mouth + brows·D_brows + max(-eyes, 0)·D_closed + max(eyes, 0)·D_wide
    Q = P Rᵀ,   R = Rz(-roll) · Ry(yaw) · Rx(pitch)
    pixel = (x·width + s·Q_x,  y·height - s·Q_y),   s = size·height

The head first nods about its own axis from ear to ear, then turns about the picture's upright, then leans in the
picture's plane; rotations are right-handed in FLAME's axes (x to the picture's right, y up, z to the viewer), hence the
sign at roll. Lengths are in heights of the face, from brows to chin at rest seen from the front, and the origin is the
middle of the box around the points at rest; it stays at (x, y) however the head turns. Projection is orthographic, as
DECA's is.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.flame import JAW, Flame, posed_vertices
from facesnap_ext.landmarks.points72 import COLOURS, LEFT_EYE, POLYLINES, RIGHT_EYE, Landmarks, points_on
from facesnap_ext.settings.unit import Unit

JAW_OPEN = 0.35  # radians about FLAME's jaw joint, at mouth 1
BROW_LIFT = 0.4  # of the distance between brows and eyes, at brows 1; -1 lowers them as far
LIDS_MEET = 0.15  # of the eye's opening, counted from the lower lid; FLAME has no joints for eyelids
WIDE = (0.5, 0.1)  # how far the upper lid rises and the lower one falls at eyes 1, of the eye's opening
BROWS = sorted({i for part in ("left_eyebrow", "right_eyebrow") for line in POLYLINES[part] for i in line})
DIRECTIONS = ("mouth", "brows", "closed", "wide")


@dataclass(frozen=True, eq=False)
class Rig:
    """A face at rest and how it moves; lengths in face heights from the face's middle (see the module).

    Attributes:
        rest: [72,3] float32
        directions: [4,72,3] float32, in the order of `DIRECTIONS`
    """

    rest: np.ndarray
    directions: np.ndarray


@dataclass(frozen=True)
class Pose:
    """What the sliders say, in `settings.Unit`'s units and signs; `x`, `y`, `size` are parts of the picture."""

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
"""Named poses. Their `size`, unlike elsewhere, is of the picture's shorter side: so the face fits into it whatever its
shape."""


def make_rig(flame: Flame, shape: Tensor | None = None) -> Rig:
    """A person's rig from FLAME.

    The mouth opens by FLAME's jaw. Brows and lids are moved by what the 72 points themselves say, along the head's
    upright: FLAME's expression directions differ from file to file, and none is a blink.

    Args:
        shape: [S] DECA's shape code of the person, standard deviations; None: FLAME's mean face.
    """
    shape = flame.v_template.new_zeros(1) if shape is None else shape
    still, open_jaw = flame.v_template.new_zeros(2, 1, len(flame.parents), 3)
    open_jaw[0, JAW, 0] = JAW_OPEN
    with torch.no_grad():
        vertices = [posed_vertices(flame, shape[None], shape.new_zeros(1, 0), pose) for pose in (still, open_jaw)]
        rest, opened = points_on(torch.cat(vertices), flame.faces).double().cpu().numpy()
    low, high = rest.min(axis=0), rest.max(axis=0)
    height = high[1] - low[1]
    rest, opened = ((points - (low + high) / 2) / height for points in (rest, opened))
    directions = np.stack([opened - rest, _brows_up(rest), *_lids(rest)])
    return Rig(rest.astype(np.float32), directions.astype(np.float32))


def _brows_up(rest: np.ndarray) -> np.ndarray:
    direction = np.zeros_like(rest)
    eyes = [*LEFT_EYE, *RIGHT_EYE]
    direction[BROWS, 1] = BROW_LIFT * (rest[BROWS, 1].mean() - rest[eyes, 1].mean())
    return direction


def _lids(rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[72,3] each: what closes the eyes, and what widens them. The eyes' corners stay."""
    closed, wide = np.zeros_like(rest), np.zeros_like(rest)
    for part in ("left_eye", "right_eye"):
        around = POLYLINES[part][0]  # from the outer corner over the inner one, the fifth, and back
        for i in (1, 2, 3):
            upper, lower = sorted((around[i], around[-1 - i]), key=lambda point: -rest[point, 1])
            opening = rest[upper] - rest[lower]
            closed[upper], closed[lower] = -(1 - LIDS_MEET) * opening, LIDS_MEET * opening
            wide[upper], wide[lower] = WIDE[0] * opening, -WIDE[1] * opening
    return closed, wide


def pose_of(unit: Unit, width: float, height: float) -> Pose:
    """The pose that a unit's template or sliders ask for.

    A place or size that the unit does not give is the template's, for sliders that of "front".

    Args:
        width, height: of the output picture.

    Raises:
        FaceSnapError: there is no such template.
    """
    name = unit.template if unit.pose == "template" else "front"
    if name not in TEMPLATES:
        raise FaceSnapError(f"FaceSnap has no pose template named {name!r}; it has {', '.join(TEMPLATES)}.")
    pose = TEMPLATES[name]
    if unit.pose == "sliders":
        turned = ("yaw", "pitch", "roll", "mouth", "brows", "eyes")
        pose = replace(pose, **{name: getattr(unit, name) for name in turned})
    pose = replace(pose, size=pose.size * min(1.0, width / height))
    given = {name: getattr(unit, name) for name in ("x", "y", "size")}
    return replace(pose, **{name: value for name, value in given.items() if value is not None})


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """[3,3] float64, R = Rz(-roll) · Ry(yaw) · Rx(pitch); degrees."""
    (sy, sp, sr), (cy, cp, cr) = ([f(math.radians(a)) for a in (yaw, pitch, roll)] for f in (math.sin, math.cos))
    return np.array(
        [
            [cr * cy, cr * sy * sp + sr * cp, cr * sy * cp - sr * sp],
            [-sr * cy, cr * cp - sr * sy * sp, -cr * sp - sr * sy * cp],
            [-sy, cy * sp, cy * cp],
        ]
    )


def pose_points(rig: Rig, pose: Pose, width: float, height: float) -> np.ndarray:
    """[72,2] float64 pixels of a picture of `width` × `height`: the module's formula."""
    amounts = np.array([pose.mouth, pose.brows, max(-pose.eyes, 0.0), max(pose.eyes, 0.0)])
    points = rig.rest + np.tensordot(amounts, rig.directions.astype(np.float64), 1)
    turned = points @ rotation(pose.yaw, pose.pitch, pose.roll).T
    return np.array([pose.x * width, pose.y * height]) + pose.size * height * turned[:, :2] * [1, -1]


def pose_landmarks(rig: Rig, pose: Pose, width: float, height: float) -> Landmarks:
    """The rig's points in a pose, in a picture of `width` × `height`."""
    return Landmarks(pose_points(rig, pose, width, height).astype(np.float32), width, height)


def placement(landmarks: Landmarks) -> tuple[float, float, float]:
    """Where points lie, as `Unit` says it: the middle of their box as parts of the picture's width and height, and the
    box's height as a part of the picture's."""
    left, top, right, bottom = landmarks.box.tolist()
    width, height = landmarks.width, landmarks.height
    return (left + right) / 2 / width, (top + bottom) / 2 / height, (bottom - top) / height


def moved(landmarks: Landmarks, x: float | None = None, y: float | None = None, size: float | None = None) -> Landmarks:
    """Points of a photo brought to another place and size in their picture, in `placement`'s terms; what is None stays,
    and with all three None the landmarks are given back as they are."""
    if x is None and y is None and size is None:
        return landmarks
    now = placement(landmarks)
    x, y, size = (old if new is None else new for old, new in zip(now, (x, y, size)))
    picture = np.array([landmarks.width, landmarks.height])
    scale = size / now[2] if now[2] else 1.0
    points = (landmarks.points - now[:2] * picture) * scale + (x, y) * picture
    return Landmarks(points.astype(np.float32), landmarks.width, landmarks.height)


def for_browser(rig: Rig) -> dict[str, Any]:
    """What `facesnapPose` of javascript/facesnap.js wants, ready for JSON: the rig's numbers, the lines to draw with
    their colours in drawing order, and the templates."""
    return {
        "rest": rig.rest.tolist(),
        "directions": {name: direction.tolist() for name, direction in zip(DIRECTIONS, rig.directions)},
        "parts": [{"colour": list(colour), "lines": POLYLINES[part]} for part, colour in COLOURS.items()],
        "templates": {name: asdict(pose) for name, pose in TEMPLATES.items()},
    }
