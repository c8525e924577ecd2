"""A photo's face without its expression, so that another expression can take its place.

    pixels = neutral + displacement · matrixᵀ

The displacement is in face heights and in the axes of `poses.Rig`, like the directions of a rig.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from facesnap_ext.landmarks.movements import MOVEMENTS
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.landmarks.poses import TEMPLATES, Pose, Rig

ROUNDS = 200  # of coordinate descent in `movements_of`


@dataclass(frozen=True, eq=False)
class NeutralFace:
    """A neutral face in a photo's pose.

    Attributes:
        landmarks: 72 points.
        matrix: [2,3] float64 pixels per face height.
    """

    landmarks: Landmarks
    matrix: np.ndarray

    def with_expression(self, displacement: np.ndarray) -> Landmarks:
        """Return the face's landmarks with its points displaced by [72,3] face heights."""
        points = self.landmarks.points + displacement @ self.matrix.T
        return replace(self.landmarks, points=points.astype(np.float32))

    def moved(self, transform: Callable[[Landmarks], Landmarks]) -> NeutralFace:
        """Return the face after an affine transform, such as the crop to an output image."""
        unit = max(self.landmarks.width, self.landmarks.height)  # large enough to lose no digits in float32
        moved = transform(self.landmarks)
        scale = unit / max(float(np.abs(self.matrix).max()), 1e-9)
        columns = [
            transform(
                replace(self.landmarks, points=(self.landmarks.points + scale * column).astype(np.float32))
            ).points
            for column in self.matrix.T
        ]
        matrix = np.stack([(one.astype(np.float64) - moved.points).mean(axis=0) / scale for one in columns], axis=1)
        return NeutralFace(moved, matrix)


def angles(matrix: np.ndarray) -> tuple[float, float, float]:
    """Return yaw, pitch and roll in degrees of a face whose `NeutralFace.matrix` is [2,3]."""
    right, down = (row / np.linalg.norm(row) for row in matrix)
    depth = np.cross(right, -down)
    yaw = math.asin(min(max(-depth[0], -1.0), 1.0))
    pitch = math.atan2(depth[1], depth[2])
    roll = math.atan2(down[0], right[0])
    return math.degrees(yaw), math.degrees(pitch), math.degrees(roll)


def movements_of(rig: Rig, displacement: np.ndarray) -> dict[str, float]:
    """Return the amounts of a rig's movements that come closest to a displacement [72,3] in face heights.

    The squared errors of the points are minimised within the sliders' ranges, by coordinate descent.
    """
    names = [(name, sign) for name, directions in rig.directions.items() for sign in (1, -1)[: len(directions)]]
    fields = np.stack([rig.directions[name][int(sign < 0)].ravel() for name, sign in names], axis=1)
    normal, gradient = fields.T @ fields, fields.T @ displacement.ravel()
    normal += 1e-4 * np.trace(normal) / len(normal) * np.eye(len(normal))  # prefers small amounts
    amounts = np.zeros(len(names))
    for _ in range(ROUNDS):
        for i in range(len(names)):
            best = (gradient[i] - normal[i] @ amounts + normal[i, i] * amounts[i]) / normal[i, i]
            amounts[i] = min(max(best, 0.0), 1.0)
    result = dict.fromkeys(MOVEMENTS, 0.0)
    for (name, sign), amount in zip(names, amounts):
        result[name] += sign * float(amount)
    return result


def pose_of(rig: Rig, face: NeutralFace, expression: np.ndarray, limits: Mapping[str, tuple[float, float]]) -> Pose:
    """Return the parameters that come closest to a photo's pose and expression.

    Args:
        rig: the person's.
        face: in the output image.
        expression: [72,3] displacement of the neutral face, in face heights.
        limits: lowest and highest value of each parameter.
    """
    turns = dict(zip(("yaw", "pitch", "roll"), angles(face.matrix)))
    width, height = face.landmarks.width, face.landmarks.height
    x, y = (face.landmarks.points - rig.rest @ face.matrix.T).mean(axis=0) / (width, height)
    size = float(np.linalg.norm(face.matrix, axis=1).mean()) / height
    values = {**turns, **movements_of(rig, expression), "x": float(x), "y": float(y), "size": size}
    clipped = {name: min(max(value, limits[name][0]), limits[name][1]) for name, value in values.items()}
    return replace(TEMPLATES["front"], **clipped)
