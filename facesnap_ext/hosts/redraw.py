"""Redraw the small faces of a finished image: img2img of an enlarged square around each face, which is pasted back.

The crop's own job runs no scripts except FaceSnap's conditioning, saves nothing, and leaves the host unchanged. After
an error or an interrupt, the image is unchanged, and a comment explains why.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from facesnap_ext import photos
from facesnap_ext.conditioning import Conditioning
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts.errors import forget_stop, report_stop
from facesnap_ext.identity.faces import Face, longer_side
from facesnap_ext.identity.likeness import box_centre
from facesnap_ext.photos import Photo

SMALL = 0.25
"""A face is small if the height of its box, from brows to chin, is below this fraction of the image's height."""

CROP_SCALE = 2.2
"""Side of the redrawn square, relative to the longer side of the face's box; it includes hair and neck."""

FEATHER = 0.12
"""Width of the blend from the old to the new image at each edge of the square, as a fraction of its side."""

CELL = 64
"""The sides of a redrawn crop are multiples of this number of pixels, which SDXL's UNet can halve exactly."""

COPIED = (  # settings copied from the image's job; some exist only in Forge or in newer hosts
    *("outpath_samples", "outpath_grids", "sampler_name", "scheduler", "steps", "cfg_scale", "distilled_cfg_scale"),
    *("eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "s_min_uncond", "subseed_strength", "tiling"),
    "disable_extra_networks",
)

REDRAWING = "redrawing small faces"
log = logging.getLogger("facesnap")


@dataclass(frozen=True)
class Crop:
    """A part of an image, in whole pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        return (self.left, self.top, self.left + self.width, self.top + self.height)


def crop_around(box: np.ndarray, width: int, height: int) -> Crop:
    """The square around a face, `CROP_SCALE` times as large as its box.

    It is centred on the face as far as the image's edges allow, and is cut off if the image is smaller.

    Args:
        box: [4] left, top, right, bottom in pixels of the image; parts outside the image are ignored.
        width, height: size of the image.
    """
    box = np.clip(np.asarray(box, np.float64), 0, [width, height, width, height])
    side = max(2, math.ceil(CROP_SCALE * longer_side(box)))
    spans = []
    for (low, high), length in zip(box.reshape(2, 2).T, (width, height)):
        size = min(side, length)
        spans.append((min(max(round((low + high - size) / 2), 0), length - size), size))
    (left, width), (top, height) = spans
    return Crop(left, top, width, height)


def redraw_size(crop: Crop, area: int) -> tuple[int, int]:
    """Width and height at which a crop is redrawn: the crop's aspect ratio at about this area, in multiples of
    `CELL`."""
    scale = math.sqrt(area / (crop.width * crop.height))
    width, height = (max(CELL, CELL * round(scale * side / CELL)) for side in (crop.width, crop.height))
    return width, height


def paste_back(image: Image.Image, crop: Crop, patch: Image.Image) -> Image.Image:
    """Paste a patch of any size over the crop.

    The patch fades in inside the crop, except at the edges of the image. No pixel outside the crop changes.
    """
    pixels = np.array(image.convert("RGB"))
    new = np.asarray(patch.convert("RGB").resize((crop.width, crop.height), Image.Resampling.LANCZOS), np.float32)
    left, top, right, bottom = crop.box
    inside = pixels[top:bottom, left:right]
    across = _ramp(crop.width, left > 0, right < image.width)
    down = _ramp(crop.height, top > 0, bottom < image.height)
    share = (down[:, None] * across)[:, :, None]
    inside[:] = np.rint(inside + share * (new - inside))
    pasted = Image.fromarray(pixels)
    pasted.info = dict(image.info)
    return pasted


def _ramp(length: int, at_start: bool, at_end: bool) -> np.ndarray:
    """[length] float32: a smooth step from 0 to 1 over `FEATHER` of the length, at the start, the end or both."""
    band = max(1.0, FEATHER * length)
    steps = np.clip((np.arange(length) + 0.5) / band, 0, 1)
    steps = (steps * steps * (3 - 2 * steps)).astype(np.float32)
    return (steps if at_start else 1) * (steps[::-1] if at_end else 1) * np.ones(length, np.float32)


def small_faces(
    faces: Sequence[Face], people: Sequence[Conditioning], width: int, height: int, area: int
) -> list[tuple[Crop, list[int]]]:
    """The crops around small faces, each with the indices of the people it belongs to.

    A face is small if its height is below `SMALL` and its crop has fewer pixels than `area`. It belongs to the people
    whose landmarks are closer to it than to any other face, centre to centre: to all whose landmarks are centred in its
    box (several people at one position share a face), or else to the closest one whose landmarks are centred in the
    crop.

    Args:
        faces: all faces of the image.
        people: all people in the image, with landmarks for this image at any size.
        width, height: size of the image.
        area: number of pixels at which crops are redrawn.
    """
    places = {
        number: box_centre(conditioning.landmarks.scaled(width, height).box)
        for number, conditioning in enumerate(people)
        if conditioning.landmarks is not None
    }

    def away(face: Face, place: np.ndarray) -> float:
        return float(np.linalg.norm(box_centre(face.box) - place))

    nearest = {number: min(faces, key=lambda face: away(face, place)) for number, place in places.items() if faces}
    crops = []
    for face in faces:
        crop = crop_around(face.box, width, height)
        if face.box[3] - face.box[1] >= SMALL * height or crop.width * crop.height >= area:
            continue
        own = [number for number, theirs in nearest.items() if theirs is face and _inside(places[number], crop.box)]
        own.sort(key=lambda number: away(face, places[number]))
        if own := [number for number in own if _inside(places[number], face.box)] or own[:1]:
            crops.append((crop, own))
    return crops


def _inside(place: np.ndarray, box: Iterable[float]) -> bool:
    left, top, right, bottom = box
    return bool(left <= place[0] <= right and top <= place[1] <= bottom)


def redraw(
    p: Any,
    image: Image.Image,
    people: Sequence[Conditioning],
    strengths: Sequence[float],
    find: Callable[[Photo], list[Face]],
    host: ModuleType,
) -> Image.Image:
    """Redraw the small faces of a job's finished image.

    Args:
        p: the host's job; the image is at its `batch_index`.
        people: all people in the image, with landmarks for this image.
        strengths: denoising strength for each person; 0 leaves the face unchanged.
        find: a function that returns all faces in a photo.
        host: the host adapter.
    """
    from modules import shared

    forget_stop(p, REDRAWING)
    area = p.width * p.height
    try:
        faces = find(photos.from_pil(image, "Image"))
    except Exception as error:
        _report(p, error)
        return image
    if not faces:
        report_stop(p, REDRAWING, "FaceSnap: No face was found in the image, so none was redrawn.")
    for crop, owners in small_faces(faces, people, image.width, image.height, area):
        strength = max(strengths[i] for i in owners)
        if not strength:
            continue
        patch = None
        if not (shared.state.interrupted or shared.state.skipped):
            cropped = tuple([_for_crop(people[i], crop, image) for i in owners])
            try:
                patch = _img2img(p, image.crop(crop.box), redraw_size(crop, area), strength, cropped, host)
            except Exception as error:
                _report(p, error)
                continue
        if patch is None:
            report_stop(p, REDRAWING, "FaceSnap: Redrawing a small face was interrupted; that face is unchanged.")
        else:
            image = paste_back(image, crop, patch)
    return image


def _report(p: Any, error: Exception) -> None:
    """Report an error, including the host's own, without losing the image."""
    log.error("FaceSnap: a small face could not be redrawn", exc_info=error)
    report_stop(p, REDRAWING, f"FaceSnap: A small face could not be redrawn ({error}); it is unchanged.")


def _for_crop(person: Conditioning, crop: Crop, image: Image.Image) -> Conditioning:
    assert person.landmarks is not None, "small_faces returns only people with landmarks"
    landmarks = person.landmarks.scaled(image.width, image.height)
    landmarks = landmarks.crop(float(crop.left), float(crop.top), crop.width, crop.height)
    return replace(person, landmarks=landmarks, region=None, strength=replace(person.strength, hires="both"))


def _img2img(
    p: Any,
    crop: Image.Image,
    size: tuple[int, int],
    strength: float,
    people: tuple[Conditioning, ...],
    host: ModuleType,
) -> Image.Image | None:
    """Redraw a crop at this size; None after an interrupt."""
    from modules import processing, shared

    i = p.batch_index
    job = processing.StableDiffusionProcessingImg2Img(
        init_images=[crop.resize(size, Image.Resampling.LANCZOS)],
        denoising_strength=strength,
        width=size[0],
        height=size[1],
        prompt=p.prompts[i],  # styles have already been applied to this prompt
        negative_prompt=p.negative_prompts[i],
        seed=p.seeds[i],
        subseed=p.subseeds[i],
        restore_faces=False,
        do_not_save_samples=True,
        do_not_save_grid=True,
        **{name: getattr(p, name) for name in COPIED if hasattr(p, name)},
    )
    job.cached_c, job.cached_uc = (
        [None, None],
        [None, None],
    )  # instead of the class attributes, which the user's next job reads
    job.color_corrections = []  # do not derive colour corrections from the crop
    job.script_args = []
    job.scripts = _only_conditioned(p.scripts, people, host)
    try:
        with _restored(p), _without_controlnet(p):
            made = processing.process_images(job)
            interrupted = shared.state.interrupted or shared.state.skipped
    finally:
        host.detach(job)
        job.close()
    if interrupted or not made.images:
        return None
    if not job.scripts.alwayson_scripts[0].conditioned:  # the host swallows exceptions raised by scripts
        raise FaceSnapError("the conditioning could not be attached; the console shows the reason")
    return made.images[0]


def _only_conditioned(runner: Any, people: tuple[Conditioning, ...], host: ModuleType) -> Any:
    """A copy of the host's script runner whose only script attaches FaceSnap's conditioning."""
    from modules import scripts

    class Condition(scripts.Script):
        filename = __file__
        args_from = args_to = 0
        conditioned = False

        def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
            host.attach(p, people)
            self.conditioned = True

        def post_sample(self, p: Any, ps: Any, *args: Any) -> None:
            host.detach(p)

    own = copy.copy(runner)
    own.alwayson_scripts, own.callback_map = [Condition()], {}
    return own


@contextmanager
def _restored(p: Any) -> Iterator[None]:
    """Restore what a job inside the `with` block changes for the job `p` around it: the job count, the page's text,
    A1111's token merging, and the file with the last parameters."""
    from modules import sd_models, shared

    state, options = shared.state, shared.cmd_opts
    kept = {name: getattr(state, name) for name in ("job", "job_no", "job_count", "textinfo")}
    merging = getattr(p.sd_model, "applied_token_merged_ratio", 0)
    no_history, options.no_prompt_history = options.no_prompt_history, True
    state.job_count += 1
    state.textinfo = "FaceSnap: redrawing a small face"
    try:
        yield
    finally:
        options.no_prompt_history = no_history
        for name, value in kept.items():
            setattr(state, name, value)
        if merging:
            sd_models.apply_token_merging(p.sd_model, merging)


@contextmanager
def _without_controlnet(p: Any) -> Iterator[None]:
    """Restore the UNet's original `forward` inside the `with` block. sd-webui-controlnet replaces it for the whole
    image (`UnetHook.hook` in https://github.com/Mikubill/sd-webui-controlnet), and its control would act on the crop
    too."""
    unet: Any = getattr(getattr(p.sd_model, "model", None), "diffusion_model", None)
    hooked = getattr(unet, "forward", None)
    original = getattr(unet, "_original_forward", None)
    if original is None:
        yield
        return
    unet.forward = original
    try:
        yield
    finally:
        unet.forward = hooked
