"""Square pictures of a face out of a photo: upright and in the middle, or scaled, turned, moved and padded."""

from __future__ import annotations

import math

import numpy as np

PLAIN_SCALE = 2.0
"""Side of the plain crop in units of the longer side of the face's box: head and shoulders."""

SCALES = (1.3, 3.2)
TURN = 20.0  # degrees to either side
SHIFT = 0.5  # of the room beside the face's box


def random_of(digest: str, crop: int) -> np.random.Generator:
    """The random numbers of a photo's crop: of its pixels (`Photo.digest`), not of its name or place."""
    return np.random.default_rng([int(digest[:32], 16), crop])


def plain_frame(box: np.ndarray, width: int, height: int, resolution: int) -> np.ndarray:
    """The upright square around a face, moved into the photo and made smaller where the photo is too small for it.

    Args:
        box: [4] left, top, right, bottom in pixels of the photo.
        width, height: of the photo.
        resolution: side of the crop in pixels.

    Returns:
        [2,3] affine map from the photo's pixels to the crop's, both from the upper left corner.
    """
    low, high = np.split(np.asarray(box, np.float64), 2)
    limits = np.array([width, height])
    visible = (np.clip(high, 0, limits) - np.clip(low, 0, limits)).max()
    side = min(PLAIN_SCALE * (high - low).max(), max(visible, limits.min()))
    centre = (low + high) / 2
    inside = np.clip(centre, np.minimum(side, limits) / 2, limits - np.minimum(side, limits) / 2)
    return _similarity(inside, side, 0.0, resolution)


def random_frame(box: np.ndarray, resolution: int, random: np.random.Generator) -> np.ndarray:
    """A square around a face at a scale (log-uniform in `SCALES`), angle and place of its own, as `plain_frame`.

    It may reach beyond the photo, which then has black padding.
    """
    low, high = np.split(np.asarray(box, np.float64), 2)
    face = (high - low).max()
    side = face * math.exp(random.uniform(*np.log(SCALES)))
    angle = math.radians(random.uniform(-TURN, TURN))
    shift = random.uniform(-SHIFT, SHIFT, 2) * (side - face) / 2
    return _similarity((low + high) / 2 + shift, side, angle, resolution)


def _similarity(centre: np.ndarray, side: float, angle: float, resolution: int) -> np.ndarray:
    scale = resolution / side
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return np.column_stack([turn, resolution / 2 - turn @ centre])


def move(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points [P,2] of the photo in the crop."""
    return points @ frame[:, :2].T + frame[:, 2]


def move_box(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
    """A face's box [4] in the crop: as a detector's, it is not turned with the face."""
    low, high = np.split(np.asarray(box, np.float64), 2)
    centre = move(frame, ((low + high) / 2)[None])[0]
    half = (high - low) / 2 * math.sqrt(np.linalg.det(frame[:, :2]))
    return np.concatenate([centre - half, centre + half])


def cut(pixels: np.ndarray, frame: np.ndarray, resolution: int) -> np.ndarray:
    """The crop [S,S,3] uint8 of a photo [H,W,3] uint8: bicubic, averaged first where it gets smaller, black outside."""
    import cv2

    scale = math.sqrt(np.linalg.det(frame[:, :2]))
    # only the window that the crop reads is looked at; a margin of 4 pixels, of the smaller picture, is for the filter
    back = np.linalg.inv(np.vstack([frame, (0, 0, 1)]))[:2]
    corners = move(back, resolution * np.array([[0, 0], [0, 1], [1, 0], [1, 1]]))
    margin, limits = 4 / min(scale, 1), np.array(pixels.shape[1::-1])
    left, top = np.clip(np.floor(corners.min(0) - margin), 0, limits - 1).astype(int)
    right, bottom = np.clip(np.ceil(corners.max(0) + margin), (left + 1, top + 1), limits).astype(int)
    window = np.ascontiguousarray(pixels[top:bottom, left:right])
    shrunk = np.ones(2)
    if scale < 1:
        size = [max(1, round(length * scale)) for length in window.shape[1::-1]]
        shrunk = np.array(size) / window.shape[1::-1]
        window = cv2.resize(window, size, interpolation=cv2.INTER_AREA)
    matrix = np.column_stack([frame[:, :2] / shrunk, move(frame, np.array([[left, top]]))[0]])
    # OpenCV counts from the centre of the first pixel
    matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5
    return cv2.warpAffine(window, matrix, (resolution, resolution), flags=cv2.INTER_CUBIC)
