"""Turn sideways and upside-down images upright, together with points in them."""

from __future__ import annotations

import math

import numpy as np


def turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Undo the clockwise rotation of an image [H, W, …] by `turn` degrees (a multiple of 90)."""
    return np.rot90(pixels, turn // 90) if turn else pixels


def turn_points(points: np.ndarray, turn: int, width: float, height: float) -> np.ndarray:
    """Map points [N, 2] of an image to the image after `turned`.

    Args:
        width, height: size of the image before it is turned, in the unit of the points.
    """
    x, y = points[:, 0], points[:, 1]
    quarters = {0: (x, y), 90: (y, width - x), 180: (width - x, height - y), 270: (height - y, x)}
    return np.stack(quarters[turn % 360], 1)


def turn_box(box: np.ndarray, turn: int, width: float, height: float) -> np.ndarray:
    """Map a box [4] of an image to the image after `turned`; see `turn_points`."""
    corners = turn_points(box.reshape(2, 2), turn, width, height)
    return np.concatenate([corners.min(0), corners.max(0)])


def roll_of(keypoints: np.ndarray, turn: int = 0) -> float:
    """The tilt of a face in the photo after it was turned upright by `turn`, in degrees from -180 to 180; positive is
    clockwise."""
    across, down = keypoints[3:].mean(0) - keypoints[:2].mean(0)  # from the eyes to the mouth
    roll = math.degrees(math.atan2(-float(across), float(down))) - turn
    return (roll + 180) % 360 - 180
