"""Square crops of the face in a photo: upright and centred, or randomly scaled, rotated, shifted and padded."""

from __future__ import annotations

import math

import numpy as np

PLAIN_SCALE = 2.0
"""Side of the plain crop, relative to the longer side of the face's box; it shows head and shoulders."""

SCALES = (1.3, 3.2)  # range of the side of a random crop, relative to the longer side of the face's box
MAX_ROTATION = 20.0  # maximum rotation in degrees, in both directions
MAX_SHIFT = 0.5  # maximum shift, as a fraction of the margin around the face's box


def crop_rng(digest: str, crop: int) -> np.random.Generator:
    """Return the random generator of a photo's crop, seeded by the photo's pixels (`Photo.digest`), not its name."""
    return np.random.default_rng([int(digest[:32], 16), crop])


def plain_transform(box: np.ndarray, width: int, height: int, resolution: int) -> np.ndarray:
    """Return the transform of an upright crop around a face, shifted or shrunk to lie inside the photo.

    Args:
        box: [4] left, top, right, bottom in pixels of the photo.
        width, height: size of the photo in pixels.
        resolution: side of the crop in pixels.

    Returns:
        [2,3] affine transform from photo to crop, both in pixels measured from the upper left corner.
    """
    low, high = np.split(np.asarray(box, np.float64), 2)
    limits = np.array([width, height])
    visible = (np.clip(high, 0, limits) - np.clip(low, 0, limits)).max()
    side = min(PLAIN_SCALE * (high - low).max(), max(visible, limits.min()))
    centre = (low + high) / 2
    inside = np.clip(centre, np.minimum(side, limits) / 2, limits - np.minimum(side, limits) / 2)
    return _similarity(inside, side, 0.0, resolution)


def random_transform(box: np.ndarray, resolution: int, rng: np.random.Generator) -> np.ndarray:
    """Return the transform of a crop with random scale (log-uniform in `SCALES`), rotation and shift.

    The crop may extend beyond the photo, where it is padded with black. The result has the same form as in
    `plain_transform`.
    """
    low, high = np.split(np.asarray(box, np.float64), 2)
    face = (high - low).max()
    side = face * math.exp(rng.uniform(*np.log(SCALES)))
    angle = math.radians(rng.uniform(-MAX_ROTATION, MAX_ROTATION))
    shift = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2) * (side - face) / 2
    return _similarity((low + high) / 2 + shift, side, angle, resolution)


def _similarity(centre: np.ndarray, side: float, angle: float, resolution: int) -> np.ndarray:
    scale = resolution / side
    matrix = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return np.column_stack([matrix, resolution / 2 - matrix @ centre])


def transform_points(transform: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Transform points [P,2]."""
    return points @ transform[:, :2].T + transform[:, 2]


def transform_box(transform: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Transform a face's box [4]. The result stays upright like a detector's box, and keeps its relative size."""
    low, high = np.split(np.asarray(box, np.float64), 2)
    centre = transform_points(transform, ((low + high) / 2)[None])[0]
    half = (high - low) / 2 * math.sqrt(np.linalg.det(transform[:, :2]))
    return np.concatenate([centre - half, centre + half])


def warp(pixels: np.ndarray, transform: np.ndarray, resolution: int) -> np.ndarray:
    """Return the crop [S,S,3] uint8 of a photo [H,W,3] uint8.

    It is resampled bicubically, after area averaging where it is downscaled, and black outside the photo.
    """
    import cv2

    scale = math.sqrt(np.linalg.det(transform[:, :2]))
    # process only the window that the crop covers, with a margin of 4 pixels (at the lower resolution) for the filter
    inverse = np.linalg.inv(np.vstack([transform, (0, 0, 1)]))[:2]
    corners = transform_points(inverse, resolution * np.array([[0, 0], [0, 1], [1, 0], [1, 1]]))
    margin, limits = 4 / min(scale, 1), np.array(pixels.shape[1::-1])
    left, top = np.clip(np.floor(corners.min(0) - margin), 0, limits - 1).astype(int)
    right, bottom = np.clip(np.ceil(corners.max(0) + margin), (left + 1, top + 1), limits).astype(int)
    window = np.ascontiguousarray(pixels[top:bottom, left:right])
    shrunk = np.ones(2)
    if scale < 1:
        size = [max(1, round(length * scale)) for length in window.shape[1::-1]]
        shrunk = np.array(size) / window.shape[1::-1]
        window = cv2.resize(window, size, interpolation=cv2.INTER_AREA)
    matrix = np.column_stack([transform[:, :2] / shrunk, transform_points(transform, np.array([[left, top]]))[0]])
    # OpenCV measures from the centre of the first pixel
    matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5
    return cv2.warpAffine(window, matrix, (resolution, resolution), flags=cv2.INTER_CUBIC)
