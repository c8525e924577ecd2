"""Rasterise a triangle mesh, with small helpers for painting on it. Both editions of the world use them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from facesnap_ext.landmarks.flame import Flame


def step(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return 0 below `low`, 1 above `high`, and interpolate linearly in between."""
    return np.clip((x - low) / (high - low), 0, 1)


def between(x: np.ndarray, low: np.ndarray | float, high: np.ndarray | float, soft: float) -> np.ndarray:
    return np.clip((x - low) / soft + 0.5, 0, 1) * np.clip((high - x) / soft + 0.5, 0, 1)


@dataclass(frozen=True, eq=False)
class Mesh:
    rest: np.ndarray  # [V,3]
    faces: np.ndarray  # [F,3]
    gather: Any  # sparse [V,F]: which triangles contain a vertex

    def vertex_normals(self, vertices: np.ndarray) -> np.ndarray:
        a, b, c = (vertices[self.faces[:, i]] for i in range(3))
        normals = self.gather @ np.cross(b - a, c - a)
        return normals / (np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12)


@lru_cache(maxsize=4)
def mesh_of(flame: Flame) -> Mesh:
    """Return the mesh of a head, which must live as long as the process."""
    from scipy.sparse import csr_matrix

    faces = flame.faces.numpy()
    rows, columns = faces.ravel(), np.repeat(np.arange(len(faces)), 3)
    gather = csr_matrix((np.ones(rows.size, np.float32), (rows, columns)), (len(flame.v_template), len(faces)))
    return Mesh(flame.v_template.numpy(), faces, gather)


def rasterise(screen: np.ndarray, depth: np.ndarray, faces: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the visible triangle of each pixel [S,S] (-1: none) and its barycentric weights [S,S,3].

    Triangles that face away are skipped; the others are painted back to front at each pixel centre that they cover.
    """
    a, b, c = (screen[faces[:, i]] for i in range(3))
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    seen = np.flatnonzero(area < -1e-9)  # y points down, which reverses the sign of the area
    seen = seen[np.argsort(depth[faces[seen]].mean(1), kind="stable")]
    a, b, c, area = a[seen], b[seen], c[seen], area[seen]
    # pixel centres (at half-integers) within each triangle's bounds
    low = np.ceil(np.minimum(np.minimum(a, b), c) - 0.5).astype(np.int32).clip(0)
    high = np.floor(np.maximum(np.maximum(a, b), c) - 0.5).astype(np.int32).clip(max=side - 1)
    span = (high - low + 1).clip(0)
    # the pixels of all triangles in one list, in painter's order
    count = span[:, 0] * span[:, 1]
    which = np.repeat(np.arange(len(seen), dtype=np.int32), count)
    within = np.arange(len(which), dtype=np.int32) - np.repeat((np.cumsum(count) - count).astype(np.int32), count)
    column = low[which, 0] + within % span[which, 0]
    row = low[which, 1] + within // span[which, 0]
    # barycentric weights are affine in the pixel, [T,3] each: slopes in x and y, and the value at 0
    edges = np.stack([c - b, a - c, b - a], 1) / area[:, None, None]
    origins = np.stack([b, c, a], 1)
    of_x, of_y = -edges[..., 1], edges[..., 0]
    at_0 = -(origins[..., 0] * of_x + origins[..., 1] * of_y)
    affine = np.stack([of_x, of_y, at_0], 1).astype(np.float32)[which]
    bary = affine[:, 0] * (column + np.float32(0.5))[:, None] + affine[:, 1] * (row + np.float32(0.5))[:, None]
    bary += affine[:, 2]
    inside = (bary[:, 0] >= 0) & (bary[:, 1] >= 0) & (bary[:, 2] >= 0)
    owner = np.full(side * side, -1)
    weights = np.zeros((side * side, 3), np.float32)
    pixel = row[inside] * side + column[inside]
    owner[pixel] = seen[which[inside]]  # the last one, which is the nearest, overwrites the others
    weights[pixel] = bary[inside]
    return owner.reshape(side, side), weights.reshape(side, side, 3)


def halve(picture: np.ndarray) -> np.ndarray:
    """Downsample [2S,2S,3] to [S,S,3] with the filter 1 3 3 1 along rows and columns."""
    for _ in range(2):
        padded = np.pad(picture, ((1, 1), (0, 0), (0, 0)), mode="edge")
        picture = (padded[:-3:2] + 3 * padded[1:-2:2] + 3 * padded[2:-1:2] + padded[3::2]) / 8
        picture = picture.swapaxes(0, 1)
    return picture
