"""The part of the init image, or of the first pass's image, that a sampling pass sees.

Landmarks and regions are cropped as the host crops the image that they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from facesnap_ext.conditioning import Conditioning, Placement
from facesnap_ext.engine import Prepared
from facesnap_ext.hosts.job import PreparedBatch, PreparedImage
from facesnap_ext.regions import PaintedRegion, Window

WHOLE: Window = (0.0, 0.0, 1.0, 1.0)


def for_pass(p: Any, batch: PreparedBatch) -> tuple[Conditioning, ...]:
    """The conditioning of all people active in the sampling pass that is about to begin; img2img is a first pass."""
    second = bool(getattr(p, "is_hr_pass", False))
    acting = [i for i, one in enumerate(batch.people) if one.conditioning.strength.acts_in(second)]
    if not batch.images:
        people = [batch.people[i] for i in acting if not batch.people[i].absent]
        return through_window(p, batch, people, second)
    images = []
    for image in batch.images:
        here = [image.people[i] for i in acting]
        images.append(list(zip(here, through_window(p, image, here, second))))
    return tuple([_placed(each) for each in zip(*images) if not all(prepared.absent for prepared, _ in each)])


def _placed(images: Sequence[tuple[Prepared, Conditioning]]) -> Conditioning:
    """One person's conditioning in a batch of different images."""
    placements = tuple([None if one.absent else Placement(seen.landmarks, seen.region) for one, seen in images])
    return replace(images[0][1], placements=placements)


def through_window(
    p: Any, batch: PreparedBatch | PreparedImage, people: Sequence[Prepared], second_pass: bool
) -> tuple[Conditioning, ...]:
    """The conditioning of people, transformed to the image of a pass.

    Args:
        second_pass: whether it is hires fix's second pass.
    """
    window = None
    if second_pass:
        window = hires_window(p)
    elif batch.init_size is not None:
        window = init_window(p, batch.init_size)
    if window is None or window == WHOLE:
        return tuple([prepared.conditioning for prepared in people])
    return tuple([_cropped(prepared, window, everything=second_pass) for prepared in people])


def _cropped(prepared: Prepared, window: Window, everything: bool) -> Conditioning:
    """Conditioning cropped to a window of the init image, or of the whole output image (`everything`)."""
    conditioning = prepared.conditioning
    landmarks, region = conditioning.landmarks, conditioning.region
    follows = everything or prepared.in_init_image
    if landmarks is not None and follows:
        size = np.array([landmarks.width, landmarks.height] * 2)
        landmarks = landmarks.crop(*map(float, window * size))
    if region is not None and (follows or isinstance(region, PaintedRegion)):
        region = region.crop(window)
    return replace(conditioning, landmarks=landmarks, region=region)


def init_window(p: Any, size: tuple[int, int]) -> Window:
    """The part of the init image, of `size`, that fills the output.

    "Only masked" inpainting first crops the image to `p.paste_to`. At the image's edge, it pads that crop if its aspect
    ratio differs from the output's.
    """
    left, top, width, height = p.paste_to or (0, 0, *size)
    mode = 2 if p.paste_to else p.resize_mode
    x, y, w, h = init_region(mode, (width, height), (p.width, p.height))
    return ((left + x) / size[0], (top + y) / size[1], w / size[0], h / size[1])


def hires_window(p: Any) -> Window:
    """The part of the first pass's image that hires fix continues with.

    If the second pass has a different shape, the host cuts off latent cells of 8 pixels on both sides. An odd cell is
    cut off on the right or at the bottom.
    """
    (left, width), (top, height) = (
        _kept(size, cut) for size, cut in ((p.hr_upscale_to_x, p.truncate_x), (p.hr_upscale_to_y, p.truncate_y))
    )
    return (left, top, width, height)


def _kept(size: int, cut: int) -> tuple[float, float]:
    """Start and length of the remaining part of `size` pixels after `cut` latent cells are cut off, as fractions."""
    cells = size // 8
    return cut // 2 / cells, (cells - cut) / cells


def init_region(resize_mode: int, size: tuple[int, int], output: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of an init image that fills the output: x, y, width, height in the init image's pixels.

    Args:
        resize_mode: the host's resize mode: 0 stretches, 1 crops to cover, 2 pads around the whole image, 3 stretches
            the latent.
        size, output: width and height of both images.
    """
    if resize_mode not in (1, 2):
        return (0, 0, *size)
    choose = min if resize_mode == 1 else max
    scale = choose(size[0] / output[0], size[1] / output[1])  # init pixels per output pixel
    width, height = output[0] * scale, output[1] * scale
    return ((size[0] - width) / 2, (size[1] - height) / 2, width, height)
