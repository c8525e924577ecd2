"""Where in the picture a person is wanted, and how several people share it out.

Regions are kept as they were meant, around a face or as drawn, and sampled at whatever size a residual has: of either
pass and each level of the UNet. Coordinates are fractions of the frame in which the region lies, the output picture or
what it was cropped from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.photos import Photo
from facesnap_ext.settings.unit import Unit

Window = tuple[float, float, float, float]
"""Left, top, width and height of a part of a picture, of the picture's own; it may reach beyond it."""

EDGE = 0.3
"""How far a region around a face fades out beyond its box, of half the box's width and height."""

ROUNDNESS = 4
"""Exponent of the rounded box around a face: 2 is an ellipse, which would cut the ends of brows and jaw."""

SAMPLES = 4
"""Points along one side of a cell at which a rounded box is looked up; the cell gets their mean."""


class Region(Protocol):
    """Part of a picture, softly bounded."""

    def mask(self, width: int, height: int) -> np.ndarray:
        """[height, width] float32 in 0…1: how much of each cell of a picture of that size is inside."""
        ...

    def crop(self, window: Window) -> Region:
        """The same region in the part of the picture that the window shows."""
        ...


@dataclass(frozen=True)
class RoundedBox:
    """Whole inside the rounded box, nothing where it is 1 + `EDGE` times as large, a smooth step between."""

    x: float  # of the centre
    y: float
    half_width: float
    half_height: float

    def mask(self, width: int, height: int) -> np.ndarray:
        x, y = ((np.arange(cells * SAMPLES) + 0.5) / (cells * SAMPLES) for cells in (width, height))
        columns = np.abs((x - self.x) / self.half_width) ** ROUNDNESS
        rows = np.abs((y - self.y) / self.half_height) ** ROUNDNESS
        distance = (rows[:, None] + columns) ** (1 / ROUNDNESS)
        inside = np.clip((1 + EDGE - distance) / EDGE, 0, 1)
        inside = inside * inside * (3 - 2 * inside)
        return inside.reshape(height, SAMPLES, width, SAMPLES).mean((1, 3)).astype(np.float32)

    def crop(self, window: Window) -> RoundedBox:
        left, top, width, height = window
        return RoundedBox(
            (self.x - left) / width, (self.y - top) / height, self.half_width / width, self.half_height / height
        )


@dataclass(frozen=True, eq=False)
class PaintedRegion:
    """As somebody drew it.

    Attributes:
        white: [H, W] float32 in 0…1, stretched over the frame; its edge goes on outside, as the hosts repeat a
            picture's edge where they fill up around it.
        window: the part of the frame that is seen.
    """

    white: np.ndarray
    window: Window = (0.0, 0.0, 1.0, 1.0)

    def mask(self, width: int, height: int) -> np.ndarray:
        left, top, w, h = self.window
        rows = _overlaps(top, top + h, height, self.white.shape[0])
        columns = _overlaps(left, left + w, width, self.white.shape[1])
        return np.clip(rows @ self.white @ columns.T, 0, 1).astype(np.float32)

    def crop(self, window: Window) -> PaintedRegion:
        left, top, width, height = self.window
        x, y, w, h = window
        return replace(self, window=(left + x * width, top + y * height, w * width, h * height))


def _overlaps(low: float, high: float, cells: int, pixels: int) -> np.ndarray:
    """[cells, pixels] part of each cell between two places (of the pixels' whole length) that lies in each pixel; the
    first and the last pixel go on outside."""
    edges = np.linspace(low, high, cells + 1) * pixels
    starts, ends = np.arange(pixels, dtype=np.float64), np.arange(1, pixels + 1, dtype=np.float64)
    starts[0], ends[-1] = -np.inf, np.inf
    overlap = np.minimum(edges[1:, None], ends) - np.maximum(edges[:-1, None], starts)
    return np.maximum(overlap, 0) / (edges[1:] - edges[:-1])[:, None]


def blend_weights(masks: Sequence[np.ndarray | None]) -> np.ndarray:
    """Share a picture out among people, so that nowhere more than one person is asked for.

    People with a region have their own mask there, and where masks add up to more than 1 they are scaled to add up
    to 1: two regions overlapping wholly are half and half, and one alone is never weakened by another elsewhere.
    Outside every region nobody acts, unless somebody has no region. Such a person is the picture's ground and gets
    what the regions leave: whoever sets one person everywhere and another one to a region expects the second person
    there alone, not a mixture of both. Several people everywhere part that evenly.

    Args:
        masks: for each person [h, w] in 0…1, all of one size, or None for everywhere.

    Returns:
        [people, h, w] float32 in 0…1; [people, 1, 1] where nobody has a region.
    """
    given = [mask for mask in masks if mask is not None]
    total = np.sum(given, axis=0) if given else np.zeros((1, 1))
    rest = np.clip(1 - total, 0, 1) / max(1, len(masks) - len(given))
    crowd = np.maximum(total, 1)
    return np.stack([rest if mask is None else mask / crowd for mask in masks]).astype(np.float32)


def region_of(unit: Unit, landmarks: Landmarks | None) -> Region | None:
    """Where a unit acts; None is everywhere.

    Args:
        landmarks: the predicted points. A region around the face lies in their picture; a drawn one is stretched over
            the output picture, or over the init picture in img2img, on which people draw it.

    Raises:
        FaceSnapError: there is nothing drawn, or no face to be around.
    """
    if unit.region == "everywhere":
        return None
    if unit.region == "face":
        if landmarks is None:
            raise FaceSnapError(
                "The region is around the face, and no landmarks say where that is; draw it or choose everywhere."
            )
        return around(landmarks, unit.grow)
    if unit.mask is None:
        raise FaceSnapError("The region is to be drawn and nothing was; draw it or choose another region.")
    return drawn(unit.mask)


def around(landmarks: Landmarks, grow: float) -> RoundedBox:
    """The points' box, grown about its centre; at 1 it reaches from the brows to the chin."""
    left, top, right, bottom = map(float, landmarks.box / np.tile([landmarks.width, landmarks.height], 2))
    return RoundedBox((left + right) / 2, (top + bottom) / 2, grow * (right - left) / 2, grow * (bottom - top) / 2)


def drawn(mask: Photo) -> PaintedRegion:
    """A picture's luminance (ITU-R 601): white is inside, black outside.

    Raises:
        FaceSnapError: it is black everywhere.
    """
    if not mask.pixels.any():
        raise FaceSnapError(f"{mask.name} is black everywhere; paint white where the person is to be.")
    luminance = mask.pixels.astype(np.int32) @ np.array([299, 587, 114], np.int32)  # whole numbers: white is 1 exactly
    return PaintedRegion((luminance / 255_000).astype(np.float32))
