"""The 72 facial points: where they lie on FLAME's mesh, how they are placed in a picture, and how they are drawn.

Points, polylines and colours are those of Face2FaceRHO (Yang et al., ECCV 2022; `landmarks72.json` names source and
licence): 17 on the face's contour, 10 on the brows, 9 on the nose, 16 around the eyes, 20 on the lips. "Left" and
"right" are the picture's.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_EMBEDDING = json.loads(Path(__file__).with_name("landmarks72.json").read_text(encoding="utf-8"))

TRIANGLES: int = _EMBEDDING["triangles"]  # of the mesh that the embedding was made for
POINT_TRIANGLES = np.array(_EMBEDDING["faces"])  # [72]
POINT_WEIGHTS = np.array(_EMBEDDING["barycentric"], dtype=np.float32)  # [72,3], of the triangle's vertices
POLYLINES: dict[str, list[list[int]]] = _EMBEDDING["polylines"]

# RGB, in drawing order: later parts lie over earlier ones
COLOURS: dict[str, tuple[int, int, int]] = {
    "left_eyebrow": (255, 0, 0),
    "right_eyebrow": (0, 255, 0),
    "left_eye": (0, 0, 255),
    "right_eye": (0, 255, 255),
    "nose": (255, 0, 255),
    "mouth": (255, 255, 0),
    "face_contour": (125, 125, 125),
}


@dataclass(frozen=True)
class Landmarks:
    """72 points in a picture of `width` × `height` pixels, or a face detector's five (in `five_points`' order) where
    nothing predicts more.

    Attributes:
        points: [72,2] or [5,2] float32, x to the right and y down, in pixels from the picture's upper left corner (the
            centre of the first pixel is at 0.5, 0.5); points may lie outside the picture.
    """

    points: np.ndarray
    width: float
    height: float

    def __post_init__(self) -> None:
        if self.points.shape not in ((len(POINT_TRIANGLES), 2), (5, 2)) or not np.isfinite(self.points).all():
            raise ValueError(f"landmarks must be {len(POINT_TRIANGLES)} or 5 finite points, not {self.points.shape}")

    @property
    def box(self) -> np.ndarray:
        """[4] left, top, right, bottom of the points; of five, which reach from the eyes to the mouth, the box twice
        as large, about as far as a face goes from brows to chin."""
        low, high = self.points.min(axis=0), self.points.max(axis=0)
        margin = (high - low) / 2 if len(self.points) == 5 else 0
        return np.concatenate([low - margin, high + margin])

    def scaled(self, width: int, height: int) -> Landmarks:
        """The points in the same picture stretched to another size."""
        scale = np.array([width / self.width, height / self.height])
        return Landmarks((self.points * scale).astype(np.float32), width, height)

    def crop(self, x: float, y: float, width: float, height: float) -> Landmarks:
        """The points in a window of the picture, which may reach beyond it; all in the picture's pixels."""
        return Landmarks((self.points - (x, y)).astype(np.float32), width, height)


def points_on(vertices: Tensor, faces: Tensor) -> Tensor:
    """The 72 points on meshes of FLAME's topology.

    Args:
        vertices: [N,V,3]
        faces: [F,3] vertex indices of the triangles.

    Returns:
        [N,72,3]
    """
    corners = vertices[:, faces[torch.from_numpy(POINT_TRIANGLES).to(faces.device)]]
    return torch.einsum("pk,npkc->npc", torch.from_numpy(POINT_WEIGHTS).to(vertices), corners)


LEFT_EYE, RIGHT_EYE = range(36, 44), range(44, 52)
NOSE_TIP, LEFT_CORNER, RIGHT_CORNER = 30, 52, 57


def five_points(points: np.ndarray) -> np.ndarray:
    """A face detector's five points, [...,5,2] of [...,72,2]: centres of the eyes, tip of the nose, corners of the
    mouth, those on the picture's left first."""
    eyes = [points[..., list(eye), :].mean(axis=-2) for eye in (LEFT_EYE, RIGHT_EYE)]
    return np.stack([*eyes, *(points[..., i, :] for i in (NOSE_TIP, LEFT_CORNER, RIGHT_CORNER))], axis=-2)


# for each of iBUG's 68 points, in their order, the one of the 72 that is the same; of those around the eyes the corners
# alone: lids have four points there (two above, two below) and six here
_SAME_AS_68 = (
    *range(9),
    *range(16, 8, -1),
    *range(17, 36),
    *(36, None, None, 40, None, None),
    *(44, None, None, 48, None, None),
    *(52, 54, 53, 62, 58, 59, 57, 65, 66, 71, 69, 68),
    *(55, 56, 63, 61, 60, 64, 70, 67),
)
# a lid of the 68 from corner to corner, and the three points of the 72 on it in the same direction
_LIDS = {
    (36, 37, 38, 39): (37, 38, 39),
    (39, 40, 41, 36): (41, 42, 43),
    (42, 43, 44, 45): (45, 46, 47),
    (45, 46, 47, 42): (49, 50, 51),
}


def from_68(points: np.ndarray) -> np.ndarray:
    """The 72 points [72,D] of iBUG's 68 [68,D], as detectors find them.

    All but those on the lids are the same. A lid is the cubic through its four points, at thirds of its way from corner
    to corner; the 72's three lie at its quarters.
    """
    result = np.zeros((len(POINT_TRIANGLES), points.shape[1]), np.float64)
    for theirs, ours in enumerate(_SAME_AS_68):
        if ours is not None:
            result[ours] = points[theirs]
    thirds = np.vander(np.arange(4) / 3)
    quarters = np.vander(np.array([1, 2, 3]) / 4, 4)
    for theirs, ours in _LIDS.items():
        result[list(ours)] = quarters @ np.linalg.solve(thirds, points[list(theirs)].astype(np.float64))
    return result.astype(np.float32)


def place(landmarks: Landmarks, width: int, height: int, face_box: np.ndarray | None = None) -> Landmarks:
    """Put the points into a picture of another size and shape that a window of the first one fills ("crop and resize").

    The window is the largest one of the new shape that fits into the first picture. It starts in the middle and moves
    as little as it must for the face to be inside, never beyond the picture's edge; a face larger than the window is
    centred as far as the edge allows. So a face inside its photo stays inside unless it does not fit.

    Args:
        face_box: [4] left, top, right, bottom in pixels of the first picture; by default the points' own box.
    """
    scale = max(width / landmarks.width, height / landmarks.height)
    window = np.array([width, height]) / scale
    spare = np.maximum(np.array([landmarks.width, landmarks.height]) - window, 0)
    low, high = np.split(landmarks.box if face_box is None else np.asarray(face_box, np.float64), 2)
    nearest = np.clip(spare / 2, np.minimum(high - window, low), np.maximum(high - window, low))
    fits = high - low <= window
    corner = np.clip(np.where(fits, nearest, (low + high - window) / 2), 0, spare)
    return Landmarks(((landmarks.points - corner) * scale).astype(np.float32), width, height)


def line_width(width: int, height: int) -> float:
    """Width in pixels of the lines in a drawing: 1/256 of the side of a square of the same area, but at least 1.

    That is 4 for all of SDXL's sizes around 1024², and 1 at 256² and below.
    """
    return max(1.0, math.sqrt(width * height) / 256)


def draw(landmarks: Landmarks, width: int, height: int) -> np.ndarray:
    """Draw the points' polylines, each facial part in a colour of its own, on black.

    The lines are drawn from the vectors at the size asked for, with sub-pixel positions, round ends and smooth edges:
    a pixel is covered as far as the line's edge lies beyond its centre, from half a pixel short to half a pixel past.

    Args:
        width, height: of the drawing in pixels; the points are stretched to it.

    Returns:
        [height,width,3] uint8 RGB.
    """
    points = landmarks.scaled(width, height).points.astype(np.float64)
    reach = line_width(width, height) / 2 + 0.5
    picture = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = _box(points, reach, width, height)
    drawn = np.zeros((bottom - top, right - left, 3), np.float32)
    for part, colour in COLOURS.items():
        lines = [points[line] for line in POLYLINES[part]]
        box = _box(np.concatenate(lines), reach, width, height)
        coverage = np.zeros((box[3] - box[1], box[2] - box[0]), np.float32)
        for line in lines:
            for start, end in itertools.pairwise(line):
                _cover_segment(coverage, box[:2], start, end, reach)
        window = drawn[box[1] - top : box[3] - top, box[0] - left : box[2] - left]
        window += coverage[..., None] * (np.array(colour, np.float32) - window)
    picture[top:bottom, left:right] = np.rint(drawn)
    return picture


def _box(points: np.ndarray, reach: float, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the pixels that may be nearer to points [N,2] than `reach`; empty outside."""
    left, top = np.clip(np.floor(points.min(0) - reach), 0, (width, height)).astype(int).tolist()
    right, bottom = np.clip(np.ceil(points.max(0) + reach), 0, (width, height)).astype(int).tolist()
    return left, top, right, bottom


def _cover_segment(
    coverage: np.ndarray, corner: tuple[int, int], start: np.ndarray, end: np.ndarray, reach: float
) -> None:
    """Raise `coverage` [H,W], whose first pixel is `corner`, to what the segment between two points covers."""
    height, width = coverage.shape
    left, top, right, bottom = _box(np.stack([start, end]) - corner, reach, width, height)
    if left >= right or top >= bottom:
        return
    x = np.arange(left, right) + corner[0] + 0.5 - start[0]
    y = np.arange(top, bottom)[:, None] + corner[1] + 0.5 - start[1]
    dx, dy = end - start
    along = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-12), 0, 1)
    distance = np.hypot(x - along * dx, y - along * dy)
    window = coverage[top:bottom, left:right]
    np.maximum(window, np.clip(reach - distance, 0, 1), out=window, casting="same_kind")
