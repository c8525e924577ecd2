"""From a WebUI's job (`p`, `StableDiffusionProcessing`) to guidance, alike in every WebUI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from facesnap_ext import photos
from facesnap_ext.engine import Engine, Prepared
from facesnap_ext.guidance import Guidance
from facesnap_ext.infotext import to_infotext
from facesnap_ext.settings import Unit
from facesnap_ext.weights.places import ModelFiles

_engine: Engine | None = None


def prepare(p: Any, unit: Unit, find_models: Callable[[], ModelFiles]) -> Prepared:
    """Prepare a job's guidance, telling the page what is being done.

    Raises:
        FaceSnapError: a photo or a model file is missing or unfit.
    """
    from modules import shared

    def progress(message: str) -> None:
        shared.state.textinfo = f"FaceSnap: {message}"

    global _engine
    _engine = _engine or Engine(find_models)
    init_images = getattr(p, "init_images", None)
    init_picture = photos.from_pil(init_images[0], "Init picture") if init_images else None
    prepared = _engine.prepare(unit, p.width, p.height, init_picture, progress)
    for note in prepared.notes:
        p.comment(f"FaceSnap: {note}")
    p.extra_generation_params.update(to_infotext([unit]))
    progress("sampling")
    return prepared


def for_pass(p: Any, prepared: Prepared) -> Guidance:
    """Guidance for the sampling pass that is about to begin: landmarks of an init picture are cropped as it was."""
    if not prepared.in_init_picture:
        return prepared.guidance
    landmarks = prepared.guidance.landmarks
    size = (landmarks.width, landmarks.height)
    region = p.paste_to or init_region(p.resize_mode, size, (p.width, p.height))  # "only masked" sets paste_to
    return replace(prepared.guidance, landmarks=landmarks.crop(*region))


def init_region(resize_mode: int, size: tuple[int, int], output: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of an init picture that fills the output, as x, y, width, height in the init picture's pixels.

    Args:
        resize_mode: the host's: 0 stretches, 1 crops to cover, 2 fills up around the whole, 3 stretches the latent.
        size, output: width and height of both pictures.
    """
    if resize_mode not in (1, 2):
        return (0, 0, *size)
    choose = min if resize_mode == 1 else max
    pixels = choose(size[0] / output[0], size[1] / output[1])  # of the init picture to one of the output
    width, height = output[0] * pixels, output[1] * pixels
    return ((size[0] - width) / 2, (size[1] - height) / 2, width, height)
