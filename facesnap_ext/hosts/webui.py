"""From a WebUI's job (`p`, `StableDiffusionProcessing`) to guidance, alike in every WebUI."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from facesnap_ext import likeness, photos
from facesnap_ext.engine import Engine, Prepared
from facesnap_ext.errors import naming
from facesnap_ext.guidance import Guidance
from facesnap_ext.infotext import to_infotext
from facesnap_ext.regions import Drawn, Window
from facesnap_ext.settings import Unit, person
from facesnap_ext.weights.places import ModelFiles

_engine: Engine | None = None


def the_engine(find_models: Callable[[], ModelFiles]) -> Engine:
    """The one engine of the process, which jobs, page and routes share."""
    global _engine
    _engine = _engine or Engine(find_models)
    return _engine


@dataclass(frozen=True)
class Job:
    """What was prepared for one job: somebody for each unit, in the page's order."""

    people: tuple[Prepared, ...]
    init_size: tuple[int, int] | None = None  # of img2img's init picture, in which drawn regions lie


def prepare(p: Any, units: Mapping[int, Unit], find_models: Callable[[], ModelFiles]) -> Job:
    """Prepare a job's guidance, telling the page what is being done.

    Args:
        units: the active ones by their numbers on the page, for messages.

    Raises:
        FaceSnapError: a photo or a model file is missing or unfit; it says of which person where there are several.
    """
    from modules import shared

    def progress(title: str, message: str) -> None:
        shared.state.textinfo = f"FaceSnap: {title}{message}"

    engine = the_engine(find_models)
    init_images = getattr(p, "init_images", None)
    init_picture = photos.from_pil(init_images[0], "Init picture") if init_images else None
    people = []
    files = len({unit.model for unit in units.values()})
    for number, unit in units.items():
        title = person(number, units)
        with naming(title):
            prepared = engine.prepare(unit, p.width, p.height, init_picture, partial(progress, title), files)
        notes = list(prepared.notes)
        if unit.hires == "second" and not getattr(p, "enable_hr", False):
            notes.append("Hires fix is off; a person wanted in its second pass only is left out.")
        for note in notes:
            p.comment(f"FaceSnap: {title}{note}")
        people.append(prepared)
    p.extra_generation_params.update(to_infotext(units))
    progress("", "sampling")
    init_size = None if init_picture is None else init_picture.pixels.shape[1::-1]
    return Job(tuple(people), init_size)


def add_likeness(p: Any, job: Job, image: Any) -> None:
    """Measure a finished picture's likeness to the first person and write it into its infotext."""
    first = job.people[0]
    landmarks = None if job.init_size is not None else first.guidance.landmarks
    value = _engine.likeness(photos.from_pil(image, "Picture"), first.embeddings, landmarks)
    p.extra_generation_params.pop(likeness.MARK, None)  # of the picture before
    p.extra_generation_params.update(likeness.infotext(value))


def for_pass(p: Any, job: Job) -> tuple[Guidance, ...]:
    """Guidance for the sampling pass that is about to begin, of those who act in it.

    Landmarks and regions are cropped as the host crops what they lie in: the init picture for img2img, the first
    pass's picture for hires fix to another shape. Img2img counts as a first pass.
    """
    second = bool(getattr(p, "is_hr_pass", False))
    window = hires_window(p) if second else None if job.init_size is None else init_window(p, job.init_size)
    acting = [prepared for prepared in job.people if prepared.guidance.acts_in(second)]
    if window is None or window == WHOLE:
        return tuple(prepared.guidance for prepared in acting)
    return tuple(_cropped(prepared, window, everything=second) for prepared in acting)


def _cropped(prepared: Prepared, window: Window, everything: bool) -> Guidance:
    """Guidance seen through a window of the init picture, or of the whole output picture (`everything`)."""
    guidance, landmarks, region = prepared.guidance, prepared.guidance.landmarks, prepared.guidance.region
    follows = everything or prepared.in_init_picture
    if landmarks is not None and follows:
        size = np.array([landmarks.width, landmarks.height] * 2)
        landmarks = landmarks.crop(*map(float, window * size))
    if region is not None and (follows or isinstance(region, Drawn)):
        region = region.crop(window)
    return replace(guidance, landmarks=landmarks, region=region)


WHOLE: Window = (0.0, 0.0, 1.0, 1.0)


def init_window(p: Any, size: tuple[int, int]) -> Window:
    """The part of the init picture, of `size`, that fills the output.

    "Only masked" inpainting crops it first to `p.paste_to`, and fills up around that where the crop, at the picture's
    edge, has another shape than the output.
    """
    left, top, width, height = p.paste_to or (0, 0, *size)
    mode = 2 if p.paste_to else p.resize_mode
    x, y, w, h = init_region(mode, (width, height), (p.width, p.height))
    return ((left + x) / size[0], (top + y) / size[1], w / size[0], h / size[1])


def hires_window(p: Any) -> Window:
    """The part of the first pass's picture that hires fix goes on with: it cuts off what a size of another shape has
    no room for, in latent cells of 8 pixels, the odd one on the right and below."""
    window = []
    for size, cut in ((p.hr_upscale_to_x, p.truncate_x), (p.hr_upscale_to_y, p.truncate_y)):
        cells = size // 8
        window.append((cut // 2 / cells, (cells - cut) / cells))
    (left, width), (top, height) = window
    return (left, top, width, height)


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
