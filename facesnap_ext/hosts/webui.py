"""From a WebUI's job (`p`, `StableDiffusionProcessing`) to guidance, alike in every WebUI."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from facesnap_ext import photos
from facesnap_ext.conditioning import Conditioning
from facesnap_ext.engine import Engine, Prepared
from facesnap_ext.errors import FaceSnapError, error_prefix
from facesnap_ext.hosts import redraw
from facesnap_ext.identity import likeness
from facesnap_ext.networks import compiled
from facesnap_ext.photos import Photo
from facesnap_ext.regions import PaintedRegion, Window
from facesnap_ext.settings.infotext import MARK, to_infotext
from facesnap_ext.settings.unit import Unit, person
from facesnap_ext.weights.instantid import takes_clip
from facesnap_ext.weights.places import ModelFiles

_engine: Engine | None = None


def the_engine(find_models: Callable[[], ModelFiles]) -> Engine:
    """The one engine of the process, which jobs, page and routes share."""
    global _engine
    _engine = _engine or Engine(find_models)
    return _engine


@dataclass(frozen=True, eq=False)
class Job:
    """What was prepared for a job, or for its pictures of one photo: somebody for each unit, in the page's order."""

    people: tuple[Prepared, ...]
    init_size: tuple[int, int] | None = None  # of img2img's init picture, in which drawn regions lie
    infotext: Mapping[str, Any] = field(default_factory=dict)
    redraw: tuple[float, ...] = ()  # for each of the people, see `Unit.redraw`


ENCODED_TOGETHER = 16
"""Photos of a person each that are encoded at a time: the encoder takes long to load, and not all results are kept."""

REPEATED = ("prompt", "negative_prompt", "seed", "subseed")  # of a job; other scripts give lists, one for each picture


def expand_iterations(
    p: Any, sittings: list[dict[int, Unit]], find_models: Callable[[], ModelFiles]
) -> list[dict[int, Unit]]:
    """Make room in a job, before the host makes its seeds and prompts, for all of `settings.sittings`: it makes its
    pictures once for each of them, one after the other. `restore` takes this back.

    Returns:
        The sittings of this job; ADetailer's own pass over a finished picture has the one of that picture.

    Raises:
        FaceSnapError: some photos have no face, which is told of all before anything is made; or other scripts ask for
            pictures that fill no whole batches; or the job makes one finished picture larger.
    """
    from modules import shared

    counted = "facesnap_before" in vars(p)  # ADetailer begins anew with a copy of a job that is under way
    restore_job(p)
    if len(sittings) < 2:
        return sittings
    if getattr(p, "_ad_inner", False):
        return [next(units for units in sittings if to_infotext(units).items() <= p.extra_generation_params.items())]
    if getattr(p, "txt2img_upscale", False):
        raise FaceSnapError(
            "One finished picture cannot be made larger while there are photos of a person each; remove all photos but "
            "that of the person in it."
        )
    first = min(sittings[0])
    references = [units[first].references[0] for units in sittings]
    with error_prefix(person(first, sittings[0])):
        engine = the_engine(find_models)
        engine.encoders.require_faces(engine.files(progress), references, sittings[0][first].face, progress)
    lists = {name: value for name in REPEATED if isinstance(value := getattr(p, name, None), list)}
    if any(len(value) != p.n_iter * p.batch_size for value in lists.values()):
        raise FaceSnapError(
            "A script asks for pictures that fill no whole batches, which cannot be repeated for a person each; set "
            "the batch size to 1."
        )
    p.facesnap_before = {"n_iter": p.n_iter, **lists}
    for name, value in lists.items():
        setattr(p, name, value * len(sittings))
    if shared.state.job_count > 0 and not counted:  # by a script, as if there were one photo
        shared.state.job_count += p.n_iter * (len(sittings) - 1)
    p.n_iter *= len(sittings)
    return sittings


def restore_job(p: Any) -> None:
    """Give a job back what `make_room` changed of it."""
    for name, value in vars(p).pop("facesnap_before", {}).items():
        setattr(p, name, value)


def forget_infotext(p: Any) -> None:
    """The X/Y/Z plot's cells share their parameters; what another cell said of FaceSnap is not this one's."""
    params = p.extra_generation_params
    p.extra_generation_params = {name: value for name, value in params.items() if not name.startswith(MARK)}


def current_job(p: Any) -> Job | FaceSnapError | None:
    """What was prepared for the batch under way, or why the job must stop; None where there is nobody."""
    made = getattr(p, "facesnap", None)
    return made[_index(p)] if isinstance(made, tuple) else made


def _index(p: Any) -> int:
    """Of the photo whose batch is under way."""
    photos = len(p.facesnap)
    return min(p.iteration * photos // p.n_iter, photos - 1) if photos > 1 else 0


def begin_batch(p: Any) -> None:
    """Let the infotext and the page say whose pictures are being made."""
    job = current_job(p)
    if isinstance(job, Job):
        p.extra_generation_params.update(job.infotext)
        progress(_which(_index(p), len(p.facesnap)), "sampling")


def progress(*parts: str) -> None:
    """Tell the page what is being done."""
    from modules import shared

    shared.state.textinfo = "".join(["FaceSnap: ", *parts])


def _which(index: int, photos: int) -> str:
    return f"photo {index + 1} of {photos}: " if photos > 1 else ""


def prepare(
    p: Any,
    sittings: Sequence[Mapping[int, Unit]],
    find_models: Callable[[], ModelFiles],
    compile: bool = False,
) -> tuple[Job, ...]:
    """Prepare a job's guidance, telling the page what is being done.

    Args:
        sittings: as `make_room` gives them: the active units by their numbers on the page, which are for messages.
        compile: see `Guidance.compile`.

    Returns:
        One for each sitting.

    Raises:
        FaceSnapError: a photo or a model file is missing or unfit; it says of which person where there are several.
    """
    engine = the_engine(find_models)
    init_images = getattr(p, "init_images", None)
    init_picture = photos.from_pil(init_images[0], "Init picture") if init_images else None
    init_size = None if init_picture is None else init_picture.pixels.shape[1::-1]
    jobs = []
    for i, units in enumerate(sittings):
        if len(sittings) > 1 and i % ENCODED_TOGETHER == 0:
            progress("encoding the faces")
            _encode(engine, sittings[i : i + ENCODED_TOGETHER])
        tell = partial(progress, _which(i, len(sittings)))
        people = _prepare_people(p, units, engine, init_picture, tell, compile)
        jobs.append(Job(people, init_size, to_infotext(units), tuple(unit.redraw for unit in units.values())))
    return tuple(jobs)


def _encode(engine: Engine, sittings: Sequence[Mapping[int, Unit]]) -> None:
    files, first = engine.files(), min(sittings[0])
    units = [units[first] for units in sittings]
    if takes_clip(files.choose_facesnap(units[0].model)):
        encoders = engine.encoders
        encoders.clip_tokens(files, [encoders.face(files, unit.references[0], unit.face) for unit in units])


def _prepare_people(
    p: Any,
    units: Mapping[int, Unit],
    engine: Engine,
    init_picture: Photo | None,
    tell: Callable[..., None],
    compile: bool,
) -> tuple[Prepared, ...]:
    people = []
    files = len({unit.model for unit in units.values()})
    for number, unit in units.items():
        title = person(number, units)
        with error_prefix(title):
            prepared = engine.prepare(unit, p.width, p.height, init_picture, partial(tell, title), files)
        notes = list(prepared.notes)
        if unit.hires == "second" and not getattr(p, "enable_hr", False):
            notes.append("Hires fix is off; a person wanted in its second pass only is left out.")
        for note in notes:
            p.comment(f"FaceSnap: {title}{note}")
        conditioning = replace(prepared.conditioning, compile=compile)
        people.append(
            replace(prepared, conditioning=conditioning, references=(), driving=None)
        )  # a folder of photos is large
    return tuple(people)


def comment_on_compiling(p: Any, job: Job) -> None:
    """Say with the picture that FFRNet was to be compiled and could not be."""
    if compiled.failure is not None and any(prepared.conditioning.compile for prepared in job.people):
        p.comment(f"FaceSnap: {compiled.failure}")


def add_likeness(p: Any, job: Job, image: Any) -> None:
    """Measure a finished picture's likeness to the first person and write it into its infotext."""
    first = job.people[0]
    landmarks = None if job.init_size is not None else first.conditioning.landmarks
    value = _engine.likeness(photos.from_pil(image, "Picture"), first.embeddings, landmarks, first.recognition)
    p.extra_generation_params.pop(likeness.MARK, None)  # of the picture before
    p.extra_generation_params.update(likeness.infotext(value))


def redraw_small_faces(p: Any, job: Job, image: Any, host: ModuleType) -> Any:
    """A finished picture with its small faces drawn again, where that is wanted; see `redraw.redraw`."""
    if not any(job.redraw):
        return image
    last_was_second = bool(getattr(p, "enable_hr", False))
    conditionings = _through_windows(p, job, job.people, last_was_second)
    engine = _engine
    return redraw.redraw(p, image, conditionings, job.redraw, partial(engine.encoders.faces, engine.files()), host)


def for_pass(p: Any, job: Job) -> tuple[Conditioning, ...]:
    """Guidance for the sampling pass that is about to begin, of those who act in it.

    Landmarks and regions are cropped as the host crops what they lie in: the init picture for img2img, the first
    pass's picture for hires fix to another shape. Img2img counts as a first pass.
    """
    second = bool(getattr(p, "is_hr_pass", False))
    return _through_windows(p, job, [one for one in job.people if one.conditioning.acts_in(second)], second)


def _through_windows(p: Any, job: Job, people: Sequence[Prepared], second: bool) -> tuple[Conditioning, ...]:
    """Guidance as it lies in the picture of a pass, `second` where that is hires fix's second one."""
    window = hires_window(p) if second else None if job.init_size is None else init_window(p, job.init_size)
    if window is None or window == WHOLE:
        return tuple(prepared.conditioning for prepared in people)
    return tuple(_cropped(prepared, window, everything=second) for prepared in people)


def _cropped(prepared: Prepared, window: Window, everything: bool) -> Conditioning:
    """Guidance seen through a window of the init picture, or of the whole output picture (`everything`)."""
    conditioning, landmarks, region = (
        prepared.conditioning,
        prepared.conditioning.landmarks,
        prepared.conditioning.region,
    )
    follows = everything or prepared.in_init_picture
    if landmarks is not None and follows:
        size = np.array([landmarks.width, landmarks.height] * 2)
        landmarks = landmarks.crop(*map(float, window * size))
    if region is not None and (follows or isinstance(region, PaintedRegion)):
        region = region.crop(window)
    return replace(conditioning, landmarks=landmarks, region=region)


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
