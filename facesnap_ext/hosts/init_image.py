"""img2img's init images, and the part of them that a job changes."""

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
    """The init image and mask from the user, kept as `p.facesnap_requested`, because scripts may change both later.

    Attributes:
        size: width and height of the first init image; None if there was no init image, as in the Batch tab.
        has_mask: whether there was a mask.
    """

    size: tuple[int, int] | None
    has_mask: bool


def remember_request(p: Any) -> None:
    """Record the user's request; called when the host creates a job, before any script changes it."""
    first = next(iter(getattr(p, "init_images", None) or ()), None)
    p.facesnap_requested = Requested(getattr(first, "size", None), getattr(p, "image_mask", None) is not None)


def is_batch_tab(p: Any) -> bool:
    """Whether the job belongs to img2img's Batch tab, which reads the init images after it has created the job."""
    requested = getattr(p, "facesnap_requested", None)
    return requested is not None and requested.size is None and bool(getattr(p, "init_images", None))


def init_images(p: Any) -> list[Photo]:
    """The init images of a job: one for each image of the batch, or only one if they are all the same."""
    given = [image for image in getattr(p, "init_images", None) or () if image is not None]
    if all(image is given[0] for image in given):
        return [photos.from_pil(image, "Init image") for image in given[:1]]
    return [photos.from_pil(image, f"Init image {number}") for number, image in enumerate(given, 1)]


def init_part(p: Any) -> InitPart:
    """The part of the init images that a job changes."""
    mask = getattr(p, "image_mask", None)
    return InitPart(None if mask is None else _painted(mask, bool(getattr(p, "inpainting_mask_invert", 0))), is_tile(p))


def is_tile(p: Any) -> bool:
    """Whether a script or another extension chose the init image: a tile of an upscaled image, an enlarged canvas, or a
    detection by ADetailer. Jobs of the X/Y/Z plot and similar scripts use the user's init image."""
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
    """[H, W] uint8, above 0 where a host's mask is painted. As in the host, the alpha channel is used unless it is
    fully opaque."""
    if mask.mode == "RGBA" and mask.getextrema()[-1] != (255, 255):
        mask = mask.getchannel("A")
    painted = np.asarray(mask.convert("L")) > 127
    return (painted ^ inverted).astype(np.uint8)
