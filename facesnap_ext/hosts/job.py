"""A WebUI's job (`p`, `StableDiffusionProcessing`) and FaceSnap's state in it, from before_process to postprocess."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from PIL import Image

from facesnap_ext.engine import Engine, Prepared
from facesnap_ext.errors import FaceSnapError, error_prefix
from facesnap_ext.hosts.errors import Refusal
from facesnap_ext.hosts.finished import Plan
from facesnap_ext.hosts.init_image import init_images, init_part
from facesnap_ext.hosts.selected_script import check_image_count
from facesnap_ext.identity.init_part import InitPart
from facesnap_ext.identity.likeness import faces_by_person
from facesnap_ext.photos import Photo
from facesnap_ext.settings.infotext import STOPPED, to_infotext
from facesnap_ext.settings.script_args import person_prefix
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights.source import takes_clip

ENCODED_TOGETHER = 16
"""Maximum number of photos that CLIP encodes together: the encoder is slow to load, and the cache does not hold all
results."""

PORTRAIT = 1024
"""Maximum side in pixels of a reference photo that is shown beside a finished image."""

PER_IMAGE = ("prompt", "negative_prompt", "seed", "subseed")
"""Settings of a job that other scripts may set to lists with one entry per image."""


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """The data prepared for one image; see `PreparedBatch`."""

    people: tuple[Prepared, ...]
    init_size: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """Everything prepared for a job, or for the images of one reference and one driving photo.

    Attributes:
        people: one for each unit, in the order of the page; those in the first image if the images of a batch differ.
        init_size: width and height of img2img's init image, which painted regions are relative to; None in txt2img.
        images: people and init size of each image if the batch starts from several init images; otherwise empty.
        infotext: the units as generation parameters.
        redraw_strengths: `Unit.redraw_strength` of each person.
        numbers: the unit number of each person.
        portraits: the first reference photo of each person, scaled down; empty if they are not needed.
    """

    people: tuple[Prepared, ...]
    init_size: tuple[int, int] | None = None
    infotext: Mapping[str, Any] = field(default_factory=dict)
    redraw_strengths: tuple[float, ...] = ()
    images: tuple[PreparedImage, ...] = ()
    numbers: tuple[int, ...] = ()
    portraits: tuple[Image.Image | None, ...] = ()

    def of_image(self, index: int) -> PreparedImage:
        """The data prepared for an image of the batch."""
        return self.images[index % len(self.images)] if self.images else PreparedImage(self.people, self.init_size)


@dataclass
class JobState:
    """FaceSnap's state in a job, kept as `p.facesnap`.

    Attributes:
        requested: the active units of each batch by unit number, see `script_args.batches_by_photo`; empty if no
            one is active.
        prepared: the prepared batches; empty before `process`.
        plan: what happens to the finished images.
        refusal: the reason why the job must stop; None if it can continue.
    """

    requested: list[dict[int, Unit]] = field(default_factory=list)
    prepared: tuple[PreparedBatch, ...] = ()
    plan: Plan = field(default_factory=Plan)
    refusal: Refusal | None = None


def state_of(p: Any) -> JobState:
    """FaceSnap's state in a job; an empty state if the job has none."""
    state = getattr(p, "facesnap", None)
    return state if isinstance(state, JobState) else JobState()


def current_batch(p: Any) -> PreparedBatch | None:
    """The batch prepared for the current iteration; None if no one is active or the job is refused."""
    prepared = state_of(p).prepared
    return prepared[batch_index(p)] if prepared else None


def batch_index(p: Any) -> int:
    """The index of the prepared batch that the current iteration belongs to."""
    count = len(state_of(p).prepared)
    return min(p.iteration * count // p.n_iter, count - 1) if count > 1 else 0


def expand_iterations(
    p: Any, batches: list[dict[int, Unit]], engine: Engine, progress: Callable[..., None]
) -> list[dict[int, Unit]]:
    """Multiply a job's iterations by the number of batches, before the host creates its seeds and prompts.

    The job then makes its images once for each batch, one after the other. `restore_job` undoes this.

    Args:
        batches: see `script_args.batches_by_photo`.

    Returns:
        The batches of this job. ADetailer's own pass over a finished image has only the batch of that image.

    Raises:
        FaceSnapError: some photos have no face (all of them are reported before any image is generated); the selected
            script depends on the number of images; another script requests images that do not fill complete batches; or
            the job upscales one finished image.
    """
    from modules import shared

    counted = "facesnap_before" in vars(p)  # ADetailer starts again with a copy of a running job
    restore_job(p)
    if len(batches) < 2:
        return batches
    if getattr(p, "_ad_inner", False):
        written = p.extra_generation_params.items()
        return [next(units for units in batches if to_infotext(units, with_names=False).items() <= written)]
    if getattr(p, "txt2img_upscale", False):
        raise FaceSnapError(
            "A single finished image cannot be upscaled with one image per photo; remove all reference and driving "
            "photos except those of the image."
        )
    check_image_count(p)
    first = min(batches[0])
    with error_prefix(person_prefix(first, batches[0])):
        _require_faces(engine, [units[first] for units in batches], progress)
    lists = {name: value for name in PER_IMAGE if isinstance(value := getattr(p, name, None), list)}
    if any(len(value) != p.n_iter * p.batch_size for value in lists.values()):
        raise FaceSnapError(
            "Another script requests a number of images that is not a multiple of the batch size, so they cannot be "
            "repeated for each photo; set the batch size to 1."
        )
    p.facesnap_before = {"n_iter": p.n_iter, **lists}
    for name, value in lists.items():
        setattr(p, name, value * len(batches))
    if shared.state.job_count > 0 and not counted:  # set by a script that assumes a single photo
        shared.state.job_count += p.n_iter * (len(batches) - 1)
    p.n_iter *= len(batches)
    return batches


def _require_faces(engine: Engine, units: Sequence[Unit], progress: Callable[..., None]) -> None:
    """Check that all photos of one person's batches show a face, before any image is generated."""
    encoders = engine.encoders(engine.files(progress))
    references = list({id(photo): photo for unit in units for photo in unit.references}.values())
    encoders.require_faces(references, units[0].face_index, progress)
    driving = {id(unit.driving_photo): unit.driving_photo for unit in units if unit.driving_photo is not None}
    if units[0].uses_driving and len(driving) > 1:
        encoders.require_faces(list(driving.values()), units[0].driving_face_index, progress)


def restore_job(p: Any) -> None:
    """Undo `expand_iterations`."""
    for name, value in vars(p).pop("facesnap_before", {}).items():
        setattr(p, name, value)


def save_no_images(p: Any) -> None:
    """Make the host save none of a job's images until `resume_saving`."""
    p.facesnap_saving = {name: getattr(p, name) for name in ("do_not_save_samples", "do_not_save_grid")}
    p.do_not_save_samples = p.do_not_save_grid = True


def resume_saving(p: Any) -> dict[str, bool]:
    """Restore the settings about saving that `save_no_images` changed, and return them."""
    saving = vars(p).pop("facesnap_saving", {})
    for name, value in saving.items():
        setattr(p, name, value)
    return saving


def begin_batch(p: Any, progress: Callable[..., None]) -> None:
    """Update the infotext and the page for the batch whose images come next."""
    batch = current_batch(p)
    if batch is not None:
        p.extra_generation_params.pop(STOPPED, None)  # left by the previous batch
        p.extra_generation_params.update(batch.infotext)
        progress(_photo_prefix(batch_index(p), len(state_of(p).prepared)), "sampling")


def _photo_prefix(index: int, count: int) -> str:
    return f"photo {index + 1} of {count}: " if count > 1 else ""


def prepare(
    p: Any,
    batches: Sequence[Mapping[int, Unit]],
    engine: Engine,
    progress: Callable[..., None],
    compile: bool = False,
    with_names: bool = True,
    with_portraits: bool = False,
) -> tuple[PreparedBatch, ...]:
    """Prepare a job's conditioning, one batch after the other.

    Args:
        batches: from `expand_iterations`.
        progress: receives parts of a description of each step.
        compile: see `Conditioning.compile`.
        with_names: whether infotext may contain the names of saved identities.
        with_portraits: whether to keep the first reference photo of each person.

    Raises:
        FaceSnapError: a photo or a model file is missing or unusable. With several people, the message names the
            person.
    """
    inits = init_images(p)
    part = init_part(p)
    prepared = []
    for i, units in enumerate(batches):
        if len(batches) > 1 and i % ENCODED_TOGETHER == 0:
            progress("encoding the faces")
            _encode_together(engine, batches[i : i + ENCODED_TOGETHER])
        report = partial(progress, _photo_prefix(i, len(batches)))
        images = []
        each: list[Photo | None] = [*inits] or [None]
        for init in each:
            people = _prepare_people(p, units, engine, init, report, compile, part)
            images.append(PreparedImage(people, None if init is None else (init.pixels.shape[1], init.pixels.shape[0])))
        strengths = tuple([unit.redraw_strength for unit in units.values()])
        several = tuple(images) if len(images) > 1 else ()
        infotext = to_infotext(units, with_names) | _never_acting(p, units)
        portraits = tuple([_portrait(unit) for unit in units.values()]) if with_portraits else ()
        first = images[0]
        prepared.append(
            PreparedBatch(first.people, first.init_size, infotext, strengths, several, tuple(units), portraits)
        )
    return tuple(prepared)


def _portrait(unit: Unit) -> Image.Image | None:
    """A person's first reference photo, scaled down; None if the person is a saved identity without photos."""
    if not unit.references:
        return None
    portrait = Image.fromarray(unit.references[0].pixels)
    portrait.thumbnail((PORTRAIT, PORTRAIT))
    return portrait


def _lacks_its_pass(p: Any, unit: Unit) -> bool:
    return unit.strength.hires == "second" and not getattr(p, "enable_hr", False)


def _never_acting(p: Any, units: Mapping[int, Unit]) -> dict[str, str]:
    """The infotext for people who are not active because hires fix is off; see `errors.report_stop`."""
    who = [
        f"{person_prefix(number, units)}no second pass" for number, unit in units.items() if _lacks_its_pass(p, unit)
    ]
    return {STOPPED: "; ".join(who)} if who else {}


def _encode_together(engine: Engine, batches: Sequence[Mapping[int, Unit]]) -> None:
    """Put the CLIP tokens of several photos into the cache, loading the encoder only once."""
    files, first = engine.files(), min(batches[0])
    units = [units[first] for units in batches]
    if takes_clip(files.choose_facesnap(units[0].model)):
        encoders = engine.encoders(files)
        references = {photo.digest: photo for unit in units for photo in unit.references}.values()
        encoders.clip_tokens([encoders.face(photo, units[0].face_index) for photo in references])


def _parts_of_people(
    units: Mapping[int, Unit], engine: Engine, init_image: Photo | None, part: InitPart
) -> list[InitPart]:
    """The part of the init image for each person. In a tile, nothing but the faces tells who is where, so each face
    belongs to the person whom it resembles most."""
    if not part.tile or init_image is None or len(units) < 2:
        return [part] * len(units)
    scores = []
    for number, unit in units.items():
        with error_prefix(person_prefix(number, units)):
            scores.append(engine.likenesses_to(unit, init_image))
    if len({len(row) for row in scores}) > 1:
        raise FaceSnapError(
            "The people of this job need different face model packs, which do not find the same faces in a part of the "
            "image; save the people again with one pack, or use one person."
        )
    return [replace(part, among=own) for own in faces_by_person(scores)]


def _prepare_people(
    p: Any,
    units: Mapping[int, Unit],
    engine: Engine,
    init_image: Photo | None,
    progress: Callable[..., None],
    compile: bool,
    part: InitPart,
) -> tuple[Prepared, ...]:
    people = []
    files = len({unit.model for unit in units.values()})
    for (number, unit), own_part in zip(units.items(), _parts_of_people(units, engine, init_image, part)):
        prefix = person_prefix(number, units)
        with error_prefix(prefix):
            prepared = engine.prepare(unit, p.width, p.height, init_image, partial(progress, prefix), files, own_part)
        notes = list(prepared.notes)
        if _lacks_its_pass(p, unit):
            notes.append("This person is active only in the second pass of hires fix, which is off.")
        for note in notes:
            p.comment(f"FaceSnap: {prefix}{note}")
        conditioning = replace(prepared.conditioning, compile=compile)
        # drop the photos, which are large
        people.append(replace(prepared, conditioning=conditioning, references=(), driving=None))
    return tuple(people)
