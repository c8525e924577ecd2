"""img2img's init images, and which part of them a job changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from facesnap_ext import photos
from facesnap_ext.hosts.selected_script import loops_back, upscales
from facesnap_ext.identity.init_part import InitPart
from facesnap_ext.photos import Photo


@dataclass(frozen=True)
class Requested:
    """The init image and mask that the user gave, kept as `p.facesnap_requested`; scripts change both later.

    Attributes:
        size: width and height of the first init image; None if there was none, as in the tab Batch.
        has_mask: whether there was a mask.
    """

    size: tuple[int, int] | None
    has_mask: bool


def remember_request(p: Any) -> None:
    """Note what the user requested; called when the host makes a job, before any script changes it."""
    first = next(iter(getattr(p, "init_images", None) or ()), None)
    p.facesnap_requested = Requested(getattr(first, "size", None), getattr(p, "image_mask", None) is not None)


def init_images(p: Any) -> list[Photo]:
    """The init images of a job: one for each image of the batch, or only one if they are all the same."""
    given = [image for image in getattr(p, "init_images", None) or () if image is not None]
    if all(image is given[0] for image in given):
        return [photos.from_pil(image, "Init image") for image in given[:1]]
    return [photos.from_pil(image, f"Init image {number}") for number, image in enumerate(given, 1)]


def init_part(p: Any) -> InitPart:
    """What a job does with its init images."""
    mask = getattr(p, "image_mask", None)
    return InitPart(None if mask is None else _painted(mask, bool(getattr(p, "inpainting_mask_invert", 0))), is_tile(p))


def is_tile(p: Any) -> bool:
    """Whether a script or another extension chose what to work on: a tile of an upscaled image, an enlarged canvas, or
    what ADetailer found. Jobs of the X/Y/Z plot and of similar scripts have the user's own init image."""
    if not getattr(p, "init_images", None):
        return False
    if getattr(p, "_ad_inner", False) or upscales(p):
        return True
    requested = getattr(p, "facesnap_requested", None)
    if requested is None or requested.size is None or loops_back(p):
        return False
    new_mask = getattr(p, "image_mask", None) is not None and not requested.has_mask
    return new_mask or getattr(p.init_images[0], "size", None) != requested.size


def _painted(mask: Any, inverted: bool) -> np.ndarray:
    """[H, W] uint8, above 0 where a host's mask is painted; the host reads the alpha channel of one that has any."""
    if mask.mode == "RGBA" and mask.getextrema()[-1] != (255, 255):
        mask = mask.getchannel("A")
    painted = np.asarray(mask.convert("L")) > 127
    return (painted ^ inverted).astype(np.uint8)
