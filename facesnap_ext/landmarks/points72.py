"""The 72 facial landmarks: their positions on FLAME's mesh and in an image, and the landmark image drawn from them.

Points, polylines and colours come from Face2FaceRHO (Yang et al., ECCV 2022; see `landmarks72.json` for source and
licence): 17 points on the face contour, 10 on the eyebrows, 9 on the nose, 16 around the eyes and 20 on the lips.
"Left" and "right" are as seen in the image.
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

from facesnap_ext.turns import turn_points

_EMBEDDING = json.loads(Path(__file__).with_name("landmarks72.json").read_text(encoding="utf-8"))

TRIANGLES: int = _EMBEDDING["triangles"]  # number of triangles in the mesh that the embedding refers to
POINT_TRIANGLES = np.array(_EMBEDDING["faces"])  # [72] index of the triangle that each point lies on
POINT_WEIGHTS = np.array(_EMBEDDING["barycentric"], dtype=np.float32)  # [72,3] barycentric coordinates in that triangle
POLYLINES: dict[str, list[list[int]]] = _EMBEDDING["polylines"]

# RGB, in drawing order: later parts cover earlier ones
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
    """Facial landmarks in an image: 72 points, or a face detector's five points if no others are available.

    Attributes:
        points: [72,2], or [5,2] in the order of `five_points`; float32 pixels from the image's upper left corner, x to
            the right and y down. The centre of the first pixel is at (0.5, 0.5). Points may lie outside the image.
        width: width of the image in pixels.
        height: height of the image in pixels.
    """

    points: np.ndarray
    width: float
    height: float

    def __post_init__(self) -> None:
        if self.points.shape not in ((len(POINT_TRIANGLES), 2), (5, 2)) or not np.isfinite(self.points).all():
            raise ValueError(f"landmarks must be {len(POINT_TRIANGLES)} or 5 finite points, not {self.points.shape}")

    @property
    def box(self) -> np.ndarray:
        """Bounding box of the points: [4] left, top, right, bottom in pixels.

        Five points only span eyes and mouth, so their box is doubled in size, to reach roughly from brows to chin.
        """
        low, high = self.points.min(axis=0), self.points.max(axis=0)
        margin = (high - low) / 2 if len(self.points) == 5 else 0
        return np.concatenate([low - margin, high + margin])

    def scaled(self, width: int, height: int) -> Landmarks:
        """Return the points for the same image resized to `width` × `height` pixels."""
        scale = np.array([width / self.width, height / self.height])
        return Landmarks((self.points * scale).astype(np.float32), width, height)

    def upright(self, turn: int) -> Landmarks:
        """Return the points for the upright version of an image that is rotated by `turn` degrees clockwise."""
        if not turn:
            return self
        sideways = turn % 180 != 0
        width, height = (self.height, self.width) if sideways else (self.width, self.height)
        points = turn_points(self.points, turn, self.width, self.height)
        return Landmarks(points.astype(np.float32), width, height)

    def crop(self, x: float, y: float, width: float, height: float) -> Landmarks:
        """Return the points relative to a window of the image, which may extend beyond it.

        Args:
            x: left edge of the window in pixels of the image.
            y: top edge of the window in pixels of the image.
            width: width of the window in pixels.
            height: height of the window in pixels.
        """
        return Landmarks((self.points - (x, y)).astype(np.float32), width, height)


def points_on(vertices: Tensor, faces: Tensor) -> Tensor:
    """Return the 72 points on meshes with FLAME's topology.

    Args:
        vertices: [N,V,3] positions of the vertices, in any unit.
        faces: [F,3] vertex indices of the triangles, F = `TRIANGLES`.

    Returns:
        [N,72,3] in the unit of `vertices`.
    """
    corners = vertices[:, faces[torch.from_numpy(POINT_TRIANGLES).to(faces.device)]]
    return torch.einsum("pk,npkc->npc", torch.from_numpy(POINT_WEIGHTS).to(vertices), corners)


LEFT_EYE, RIGHT_EYE = range(36, 44), range(44, 52)
NOSE_TIP, LEFT_CORNER, RIGHT_CORNER = 30, 52, 57


def five_points(points: np.ndarray) -> np.ndarray:
    """Derive a face detector's five points from the 72.

    Args:
        points: [...,72,2]

    Returns:
        [...,5,2] left eye, right eye, tip of the nose, left and right corner of the mouth. The point of an eye is the
        mean of the eight points around it.
    """
    eyes = [points[..., list(eye), :].mean(axis=-2) for eye in (LEFT_EYE, RIGHT_EYE)]
    return np.stack([*eyes, *(points[..., i, :] for i in (NOSE_TIP, LEFT_CORNER, RIGHT_CORNER))], axis=-2)


# For each of iBUG's 68 points, in order, the index of the same point among the 72. Around the eyes, only the corners
# match: iBUG has two points on each lid, and the 72 have three.
_SAME_AS_68 = (
    *range(9),
    *range(16, 8, -1),
    *range(17, 36),
    *(36, None, None, 40, None, None),
    *(44, None, None, 48, None, None),
    *(52, 54, 53, 62, 58, 59, 57, 65, 66, 71, 69, 68),
    *(55, 56, 63, 61, 60, 64, 70, 67),
)
# For each lid, the four iBUG points from corner to corner → the three of the 72 points, in the same direction
_LIDS = {
    (36, 37, 38, 39): (37, 38, 39),
    (39, 40, 41, 36): (41, 42, 43),
    (42, 43, 44, 45): (45, 46, 47),
    (45, 46, 47, 42): (49, 50, 51),
}


def from_68(points: np.ndarray) -> np.ndarray:
    """Convert iBUG's 68 points, as landmark detectors return them, to the 72.

    Only the points on the eyelids differ. For each lid, a cubic is fitted through iBUG's four points at parameters 0,
    1/3, 2/3 and 1, and evaluated at 1/4, 1/2 and 3/4.

    Args:
        points: [68,D] in any unit.

    Returns:
        [72,D] float32 in the same unit.
    """
    result = np.zeros((len(POINT_TRIANGLES), points.shape[1]), np.float64)
    for index68, index72 in enumerate(_SAME_AS_68):
        if index72 is not None:
            result[index72] = points[index68]
    thirds = np.vander(np.arange(4) / 3)
    quarters = np.vander(np.array([1, 2, 3]) / 4, 4)
    for lid68, lid72 in _LIDS.items():
        result[list(lid72)] = quarters @ np.linalg.solve(thirds, points[list(lid68)].astype(np.float64))
    return result.astype(np.float32)


def crop_and_resize(landmarks: Landmarks, width: int, height: int, face_box: np.ndarray | None = None) -> Landmarks:
    """Transfer the points to an image of a different size and aspect ratio ("crop and resize").

    The crop is the largest window with the new aspect ratio that fits into the original image. It starts centred and
    is moved only as far as needed to contain the face, never beyond the image's edges. A face larger than the window is
    centred as far as the edges allow. A face that lies inside the original image and fits the window therefore stays
    inside.

    Args:
        landmarks: points in the original image.
        width: width of the new image in pixels.
        height: height of the new image in pixels.
        face_box: [4] left, top, right, bottom in pixels of the original image; by default the bounding box of the
            points.

    Returns:
        The points in pixels of the new image.
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
    """Return the line width of a landmark image in pixels: 1/256 of the side of a square of equal area, at least 1.

    That is 4 for SDXL's sizes around 1024², and 1 for 256² and below.
    """
    return max(1.0, math.sqrt(width * height) / 256)


def draw(landmarks: Landmarks, width: int, height: int) -> np.ndarray:
    """Draw the landmark image: the polylines of all facial parts on black, each part in its own colour (`COLOURS`).

    Lines are drawn from the points at the requested size, with subpixel positions, round caps and anti-aliased edges: a
    pixel's coverage falls linearly from 1 to 0 as its centre moves from half a pixel inside the line's edge to half a
    pixel outside.

    Args:
        landmarks: 72 points.
        width: width of the image in pixels; the points are scaled to it.
        height: height of the image in pixels; the points are scaled to it.

    Returns:
        [height,width,3] uint8 RGB.
    """
    points = landmarks.scaled(width, height).points.astype(np.float64)
    reach = line_width(width, height) / 2 + 0.5
    image = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = _pixel_bounds(points, reach, width, height)
    drawn = np.zeros((bottom - top, right - left, 3), np.float32)
    for part, colour in COLOURS.items():
        lines = [points[line] for line in POLYLINES[part]]
        box = _pixel_bounds(np.concatenate(lines), reach, width, height)
        coverage = np.zeros((box[3] - box[1], box[2] - box[0]), np.float32)
        for line in lines:
            for start, end in itertools.pairwise(line):
                _draw_segment(coverage, box[:2], start, end, reach)
        window = drawn[box[1] - top : box[3] - top, box[0] - left : box[2] - left]
        window += coverage[..., None] * (np.array(colour, np.float32) - window)
    image[top:bottom, left:right] = np.rint(drawn)
    return image


def _pixel_bounds(points: np.ndarray, reach: float, width: int, height: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the pixels that may lie within `reach` of points [N,2], clipped to the
    image."""
    left, top = np.clip(np.floor(points.min(0) - reach), 0, (width, height)).astype(int).tolist()
    right, bottom = np.clip(np.ceil(points.max(0) + reach), 0, (width, height)).astype(int).tolist()
    return left, top, right, bottom


def _draw_segment(
    coverage: np.ndarray, corner: tuple[int, int], start: np.ndarray, end: np.ndarray, reach: float
) -> None:
    """Rasterise a line segment: set each pixel of `coverage` to the maximum of its value and the segment's coverage.

    Args:
        coverage: [H,W] float32 in 0…1, changed in place.
        corner: position (x, y) of its first pixel in the image.
        start: [2] pixels of the image.
        end: [2] pixels of the image.
        reach: distance from the segment at which coverage becomes 0: half the line width plus half a pixel.
    """
    height, width = coverage.shape
    left, top, right, bottom = _pixel_bounds(np.stack([start, end]) - corner, reach, width, height)
    if left >= right or top >= bottom:
        return
    x = np.arange(left, right) + corner[0] + 0.5 - start[0]
    y = np.arange(top, bottom)[:, None] + corner[1] + 0.5 - start[1]
    dx, dy = end - start
    along = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-12), 0, 1)
    distance = np.hypot(x - along * dx, y - along * dy)
    window = coverage[top:bottom, left:right]
    np.maximum(window, np.clip(reach - distance, 0, 1), out=window, casting="same_kind")
