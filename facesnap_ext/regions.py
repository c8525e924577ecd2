"""Where in the image each person is applied, and how several people share the image.

A region is stored as it was defined, around a face or as a painted mask, and is sampled at the size of each residual,
in both passes and at every level of the UNet. Coordinates are fractions of the frame that contains the region: the
output image, or the image it was cropped from.
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
"""Left, top, width and height of a part of an image, as fractions of that image; it may extend beyond the image."""

FADE = 0.3
"""Distance over which a region around a face fades out beyond its box, as a fraction of half the box's sides."""

ROUNDNESS = 4
"""Exponent of the rounded box around a face: 2 is an ellipse, which would cut off the ends of brows and jaw."""

SAMPLES = 4
"""Number of sampling points along each side of a cell of a rounded box; the cell's value is their mean."""


class Region(Protocol):
    """A part of an image with a soft edge."""

    def sample(self, width: int, height: int) -> np.ndarray:
        """[height, width] float32 in 0…1: the fraction of each cell inside the region, for a grid of this size."""
        ...

    def crop(self, window: Window) -> Region:
        """The same region, relative to the part of the image that the window shows."""
        ...


@dataclass(frozen=True)
class RoundedBox:
    """1 inside the rounded box, 0 outside a box 1 + `FADE` times as large, with a smooth step in between.

    Attributes:
        x, y: the centre. half_width, half_height: half the sides of the box.
    """

    x: float
    y: float
    half_width: float
    half_height: float

    def sample(self, width: int, height: int) -> np.ndarray:
        x, y = ((np.arange(cells * SAMPLES) + 0.5) / (cells * SAMPLES) for cells in (width, height))
        columns = np.abs((x - self.x) / self.half_width) ** ROUNDNESS
        rows = np.abs((y - self.y) / self.half_height) ** ROUNDNESS
        distance = (rows[:, None] + columns) ** (1 / ROUNDNESS)
        inside = np.clip((1 + FADE - distance) / FADE, 0, 1)
        inside = inside * inside * (3 - 2 * inside)
        return inside.reshape(height, SAMPLES, width, SAMPLES).mean((1, 3)).astype(np.float32)

    def crop(self, window: Window) -> RoundedBox:
        left, top, width, height = window
        return RoundedBox(
            (self.x - left) / width, (self.y - top) / height, self.half_width / width, self.half_height / height
        )


@dataclass(frozen=True, eq=False)
class PaintedRegion:
    """A region that the user painted.

    Attributes:
        mask: [H, W] float32 in 0…1, stretched over the frame. Its edge pixels extend outwards, just as hosts repeat an
            image's edge when padding it.
        window: the part of the frame that is visible.
    """

    mask: np.ndarray
    window: Window = (0.0, 0.0, 1.0, 1.0)

    def sample(self, width: int, height: int) -> np.ndarray:
        left, top, w, h = self.window
        rows = _overlaps(top, top + h, height, self.mask.shape[0])
        columns = _overlaps(left, left + w, width, self.mask.shape[1])
        return np.clip(rows @ self.mask @ columns.T, 0, 1).astype(np.float32)

    def crop(self, window: Window) -> PaintedRegion:
        left, top, width, height = self.window
        x, y, w, h = window
        return replace(self, window=(left + x * width, top + y * height, w * width, h * height))


def _overlaps(low: float, high: float, cells: int, pixels: int) -> np.ndarray:
    """[cells, pixels]: the fraction of each cell that lies in each pixel. The cells divide the range from `low` to
    `high`, which are fractions of the pixels' total length. The first and the last pixel extend outwards
    indefinitely."""
    edges = np.linspace(low, high, cells + 1) * pixels
    starts, ends = np.arange(pixels, dtype=np.float64), np.arange(1, pixels + 1, dtype=np.float64)
    starts[0], ends[-1] = -np.inf, np.inf
    overlap = np.minimum(edges[1:, None], ends) - np.maximum(edges[:-1, None], starts)
    return np.maximum(overlap, 0) / (edges[1:] - edges[:-1])[:, None]


def blend_weights(masks: Sequence[np.ndarray | None]) -> np.ndarray:
    """Share an image among people so that the weights never add up to more than 1 at any point.

    A person with a region has the weight of their mask. Where masks add up to more than 1, they are scaled to add up to
    1: two regions that fully overlap get half each, and a region elsewhere has no influence. A person without a region
    is the background and gets the weight that the regions leave, because a user who gives one person the whole image
    and a second person a region expects only the second person in that region, not a mixture. Several people without a
    region share this weight evenly. If all people have a region, no one is active outside the regions.

    Args:
        masks: for each person [h, w] in 0…1, all of one size, or None for the whole image.

    Returns:
        [people, h, w] float32 in 0…1; [people, 1, 1] if no one has a region.
    """
    given = [mask for mask in masks if mask is not None]
    total = np.sum(given, axis=0) if given else np.zeros((1, 1))
    rest = np.clip(1 - total, 0, 1) / max(1, len(masks) - len(given))
    scale = np.maximum(total, 1)
    return np.stack([rest if mask is None else mask / scale for mask in masks]).astype(np.float32)


def region_of(unit: Unit, landmarks: Landmarks | None) -> Region | None:
    """The region in which a unit is active; None for the whole image.

    Args:
        landmarks: the predicted points. A region around the face is relative to their image; a painted region is
            stretched over the output image, or over the init image in img2img, where the user paints it.

    Raises:
        FaceSnapError: nothing was painted, or there is no face to place the region around.
    """
    if unit.region == "image":
        return None
    if unit.region == "face":
        if landmarks is None:
            raise FaceSnapError(
                "The region is set to the face, but there are no landmarks to locate it; paint a mask or choose the "
                "whole image."
            )
        return around(landmarks, unit.region_scale)
    if unit.mask is None:
        raise FaceSnapError(
            "The region is set to a painted mask, but nothing is painted; paint a mask or choose another region."
        )
    return painted(unit.mask)


def around(landmarks: Landmarks, scale: float) -> RoundedBox:
    """The bounding box of the points, scaled about its centre; at 1 it reaches from the brows to the chin."""
    left, top, right, bottom = map(float, landmarks.box / np.tile([landmarks.width, landmarks.height], 2))
    return RoundedBox((left + right) / 2, (top + bottom) / 2, scale * (right - left) / 2, scale * (bottom - top) / 2)


def painted(mask: Photo) -> PaintedRegion:
    """A region from a mask image's luminance (ITU-R BT.601): white is inside, black outside.

    Raises:
        FaceSnapError: the mask is entirely black.
    """
    if not mask.pixels.any():
        raise FaceSnapError(f"{mask.name} is entirely black; paint the area for this person white.")
    # integer arithmetic, so that white is exactly 1
    luminance = mask.pixels.astype(np.int32) @ np.array([299, 587, 114], np.int32)
    return PaintedRegion((luminance / 255_000).astype(np.float32))
