"""The mask of a face: the silhouette of the head that DECA fitted to the photo.

All triangles of the projected mesh are painted, with those at the back and at the neck: skull, ears, face and neck,
without the hair that stands off. The 72 points lie on the mesh, so they lie inside but for rounding, for which the
mask is one pixel wider than the silhouette. It ends where the photo ends: padding is no face to learn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FINE = 16  # parts of a pixel in OpenCV's coordinates
SHIFT = 4  # its binary logarithm


def silhouette(vertices: np.ndarray, triangles: np.ndarray, side: int) -> list[np.ndarray]:
    """Outlines of what the triangles cover together.

    Args:
        vertices: [V,2] in pixels of the photo, from its corner.
        triangles: [F,3] numbers of vertices.
        side: pixels along the longer side of the head's bounding box, in which it is painted.

    Returns:
        Polygons [P,2] in pixels of the photo.
    """
    import cv2

    low = vertices.min(0)
    scale = side / max((vertices.max(0) - low).max(), 1e-6)
    painted = np.zeros((side + 3, side + 3), np.uint8)
    # the centre of OpenCV's first pixel is at 0; a margin of 1 keeps the outline off the edge
    corners = np.rint(((vertices - low) * scale + 0.5) * FINE).astype(np.int32)[triangles]
    for triangle in corners:
        cv2.fillConvexPoly(painted, triangle, 255, cv2.LINE_8, SHIFT)
    outlines, _ = cv2.findContours(painted, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [(outline[:, 0] - 0.5) / scale + low for outline in outlines]


def fill(outlines: Sequence[np.ndarray], photo: np.ndarray, resolution: int) -> np.ndarray:
    """The mask of a crop.

    Args:
        outlines: of `silhouette`, in pixels of the crop.
        photo: [4,2] corners of the photo, in pixels of the crop.

    Returns:
        [S,S] uint8, 255 inside the outlines, or at most a pixel outside, where there is a photo.
    """
    import cv2

    head, inside = (np.zeros((resolution, resolution), np.uint8) for _ in range(2))
    for mask, polygons in ((head, outlines), (inside, [photo])):
        for polygon in polygons:
            cv2.fillPoly(mask, [np.rint((polygon - 0.5) * FINE).astype(np.int32)], 255, cv2.LINE_8, SHIFT)
    return cv2.dilate(head, np.ones((3, 3), np.uint8)) & inside
