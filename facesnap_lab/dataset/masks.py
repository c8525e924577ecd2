"""The face mask: the silhouette of the head mesh that DECA fits to the photo.

All triangles of the projected mesh are drawn, including the back of the head: skull, ears, face and neck, without hair
that sticks out. The 72 points lie on the mesh. The mask is one pixel wider than the silhouette, so that they lie inside
it despite rounding. It ends at the photo's edge, because padding is not part of a face.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SUBPIXEL_BITS = 4  # fractional bits of OpenCV's fixed-point coordinates
SUBPIXELS = 2**SUBPIXEL_BITS


def silhouette(vertices: np.ndarray, triangles: np.ndarray, side: int) -> list[np.ndarray]:
    """Return the outlines of the union of all triangles.

    Args:
        vertices: [V,2] in pixels of the photo, measured from its corner.
        triangles: [F,3] vertex indices.
        side: raster resolution: number of pixels along the longer side of the head's bounding box.

    Returns:
        Polygons [P,2] in pixels of the photo.
    """
    import cv2

    low = vertices.min(0)
    scale = side / max((vertices.max(0) - low).max(), 1e-6)
    raster = np.zeros((side + 3, side + 3), np.uint8)
    # OpenCV's coordinates are 0 at the centre of the first pixel; a margin of 1 keeps the outline off the edge
    corners = np.rint(((vertices - low) * scale + 0.5) * SUBPIXELS).astype(np.int32)[triangles]
    for triangle in corners:
        cv2.fillConvexPoly(raster, triangle, 255, cv2.LINE_8, SUBPIXEL_BITS)
    outlines, _ = cv2.findContours(raster, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [(outline[:, 0] - 0.5) / scale + low for outline in outlines]


def fill_mask(outlines: Sequence[np.ndarray], photo: np.ndarray, resolution: int) -> np.ndarray:
    """Return the mask of a crop.

    Args:
        outlines: from `silhouette`, in pixels of the crop.
        photo: [4,2] corners of the photo, in pixels of the crop.

    Returns:
        [S,S] uint8, 255 up to one pixel outside the outlines, 0 elsewhere and outside the photo.
    """
    import cv2

    # a margin of 1, from which the silhouette grows into the crop
    head, inside = (np.zeros((resolution + 2, resolution + 2), np.uint8) for _ in range(2))
    for mask, polygons in ((head, outlines), (inside, [photo])):
        for polygon in polygons:
            cv2.fillPoly(mask, [np.rint((polygon + 0.5) * SUBPIXELS).astype(np.int32)], 255, cv2.LINE_8, SUBPIXEL_BITS)
    return (cv2.dilate(head, np.ones((3, 3), np.uint8)) & inside)[1:-1, 1:-1]
