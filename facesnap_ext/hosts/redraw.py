"""Small faces of a finished picture are drawn once more, larger: each by img2img of a square around it, and put back.

The crop's own job has nobody's scripts but the adapter's guidance, saves nothing, and leaves the host as it found it.
An error or an interrupt leaves the picture as it was and is told.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from facesnap_ext import photos
from facesnap_ext.conditioning import Conditioning
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.faces import Face, longer_side
from facesnap_ext.identity.likeness import middle
from facesnap_ext.photos import Photo

SMALL = 0.25
"""A face of less than this part of the picture's height, brows to chin as detectors box it, is small."""

GROWN = 2.2
"""Side of the square that is drawn again, of the longer side of the face's box: with hair and neck."""

FEATHER = 0.12
"""Width of the seam at each edge of the square over which the old picture becomes the new one, of that side."""

CELL = 64
"""Pixels that an SDXL UNet halves without a rest; sides of what is drawn again are multiples of it."""

SAME = (  # as in the job whose picture it is; some of them Forge's or newer hosts' only
    *("outpath_samples", "outpath_grids", "sampler_name", "scheduler", "steps", "cfg_scale", "distilled_cfg_scale"),
    *("eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "s_min_uncond", "subseed_strength", "tiling"),
    "disable_extra_networks",
)

log = logging.getLogger("facesnap")


@dataclass(frozen=True)
class Crop:
    """A part of a picture in whole pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        return (self.left, self.top, self.left + self.width, self.top + self.height)


def crop_around(box: np.ndarray, width: int, height: int) -> Crop:
    """The square around a face, `GROWN` times as large, with the same middle as far as the picture's edges allow; cut
    off where the picture is smaller than that.

    Args:
        box: [4] left, top, right, bottom in pixels of the picture; what lies outside it is left out.
        width, height: of the picture.
    """
    box = np.clip(np.asarray(box, np.float64), 0, [width, height, width, height])
    side = max(2, math.ceil(GROWN * longer_side(box)))
    spans = []
    for (low, high), length in zip(box.reshape(2, 2).T, (width, height)):
        size = min(side, length)
        spans.append((min(max(round((low + high - size) / 2), 0), length - size), size))
    (left, width), (top, height) = spans
    return Crop(left, top, width, height)


def drawn_size(crop: Crop, area: int) -> tuple[int, int]:
    """Width and height at which a crop is drawn again: of its shape and about this area, in multiples of `CELL`."""
    scale = math.sqrt(area / (crop.width * crop.height))
    width, height = (max(CELL, CELL * round(scale * side / CELL)) for side in (crop.width, crop.height))
    return width, height


def paste_back(picture: Image.Image, crop: Crop, patch: Image.Image) -> Image.Image:
    """The picture with a patch, of any size, in place of the crop. The seam is feathered inside the crop, but for its
    edges that are the picture's; outside no pixel changes."""
    pixels = np.array(picture.convert("RGB"))
    new = np.asarray(patch.convert("RGB").resize((crop.width, crop.height), Image.Resampling.LANCZOS), np.float32)
    left, top, right, bottom = crop.box
    inside = pixels[top:bottom, left:right]
    across = _ramp(crop.width, left > 0, right < picture.width)
    down = _ramp(crop.height, top > 0, bottom < picture.height)
    share = (down[:, None] * across)[:, :, None]
    inside[:] = np.rint(inside + share * (new - inside))
    pasted = Image.fromarray(pixels)
    pasted.info = dict(picture.info)
    return pasted


def _ramp(length: int, at_start: bool, at_end: bool) -> np.ndarray:
    """[length] float32: a smooth step from 0 to 1 over `FEATHER` of the length, at the start, the end or both."""
    band = max(1.0, FEATHER * length)
    steps = np.clip((np.arange(length) + 0.5) / band, 0, 1)
    steps = (steps * steps * (3 - 2 * steps)).astype(np.float32)
    return (steps if at_start else 1) * (steps[::-1] if at_end else 1) * np.ones(length, np.float32)


def small_faces(
    faces: Sequence[Face], conditionings: Sequence[Conditioning], width: int, height: int, area: int
) -> list[tuple[Crop, list[int]]]:
    """The crops around small faces, each with the numbers of those whose face it is.

    A face is small if it is `SMALL` and its crop has fewer pixels than are drawn. It is that of the people to whose
    landmarks no other face is nearer, middle to middle: of those whose landmarks have their middle in its box (several
    people in one place share a face), else of the nearest one whose have it in the crop.

    Args:
        faces: of the picture. guidances: of all people in it, their landmarks for this picture, of any size.
        width, height: of the picture. area: in pixels, that is drawn.
    """
    places = {
        number: middle(conditioning.landmarks.scaled(width, height).box)
        for number, conditioning in enumerate(conditionings)
        if conditioning.landmarks is not None
    }

    def away(face: Face, place: np.ndarray) -> float:
        return float(np.linalg.norm(middle(face.box) - place))

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


def _inside(place: np.ndarray, box: Sequence[float]) -> bool:
    left, top, right, bottom = box
    return bool(left <= place[0] <= right and top <= place[1] <= bottom)


def redraw(
    p: Any,
    picture: Image.Image,
    conditionings: Sequence[Conditioning],
    strengths: Sequence[float],
    find: Callable[[Photo], list[Face]],
    host: ModuleType,
) -> Image.Image:
    """A finished picture of a job with the small faces of those who want it drawn again.

    Args:
        p: the host's job; the picture is that of its `batch_index`.
        guidances: of all people in the picture, their landmarks for this picture.
        strengths: denoising strength for each of them; 0: the face stays as it is.
        find: all faces of a photo. host: the adapter.
    """
    from modules import shared

    area = p.width * p.height
    try:
        faces = find(photos.from_pil(picture, "Picture"))
    except Exception as error:
        _failed(p, error)
        return picture
    if not faces:
        p.comment("FaceSnap: No face was found in the picture, so none was drawn again.")
    for crop, people in small_faces(faces, conditionings, picture.width, picture.height, area):
        strength = max(strengths[number] for number in people)
        if not strength:
            continue
        patch = None
        if not (shared.state.interrupted or shared.state.skipped):
            guided = tuple(_for_crop(conditionings[number], crop, picture) for number in people)
            try:
                patch = _img2img(p, picture.crop(crop.box), drawn_size(crop, area), strength, guided, host)
            except Exception as error:
                _failed(p, error)
                continue
        if patch is None:
            p.comment("FaceSnap: Drawing a small face again was interrupted; it is as it was.")
        else:
            picture = paste_back(picture, crop, patch)
    return picture


def _failed(p: Any, error: Exception) -> None:
    """Tell of an error, the host's own too: the picture that there is is worth more than its face's second drawing."""
    log.error("FaceSnap: a small face could not be drawn again", exc_info=error)
    p.comment(f"FaceSnap: A small face could not be drawn again ({error}); it is as it was.")


def _for_crop(conditioning: Conditioning, crop: Crop, picture: Image.Image) -> Conditioning:
    landmarks = conditioning.landmarks.scaled(picture.width, picture.height)
    landmarks = landmarks.crop(float(crop.left), float(crop.top), crop.width, crop.height)
    return replace(conditioning, landmarks=landmarks, region=None, hires="both")


def _img2img(
    p: Any,
    crop: Image.Image,
    size: tuple[int, int],
    strength: float,
    conditionings: tuple[Conditioning, ...],
    host: ModuleType,
) -> Image.Image | None:
    """The crop drawn again at this size, or None after an interrupt."""
    from modules import processing, shared

    i = p.batch_index
    job = processing.StableDiffusionProcessingImg2Img(
        init_images=[crop.resize(size, Image.Resampling.LANCZOS)],
        denoising_strength=strength,
        width=size[0],
        height=size[1],
        prompt=p.prompts[i],  # with the styles in it
        negative_prompt=p.negative_prompts[i],
        seed=p.seeds[i],
        subseed=p.subseeds[i],
        restore_faces=False,
        do_not_save_samples=True,
        do_not_save_grid=True,
        **{name: getattr(p, name) for name in SAME if hasattr(p, name)},
    )
    job.cached_c, job.cached_uc = [None, None], [None, None]  # not the class's, which are the user's next job's
    job.color_corrections = []  # none are made of the crop
    job.script_args = []
    job.scripts = _only_guided(p.scripts, conditionings, host)
    try:
        with _as_it_was(p), _without_controlnet(p):
            made = processing.process_images(job)
            interrupted = shared.state.interrupted or shared.state.skipped
    finally:
        host.detach(job)
        job.close()
    if interrupted or not made.images:
        return None
    if not job.scripts.alwayson_scripts[0].guided:  # the host swallows what a script raises
        raise FaceSnapError("the guidance did not get in; the console says why")
    return made.images[0]


def _only_guided(runner: Any, conditionings: tuple[Conditioning, ...], host: ModuleType) -> Any:
    """The host's runner of scripts with one script, which does no more than guide."""
    from modules import scripts

    class Guide(scripts.Script):
        filename = __file__
        args_from = args_to = 0
        guided = False

        def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
            host.attach(p, conditionings)
            self.guided = True

        def post_sample(self, p: Any, ps: Any, *args: Any) -> None:
            host.detach(p)

    own = copy.copy(runner)
    own.alwayson_scripts, own.callback_map = [Guide()], {}
    return own


@contextmanager
def _as_it_was(p: Any) -> Iterator[None]:
    """Take from a job inside the `with` block what it would change for the job `p` around it: the count of jobs, the
    page's text, A1111's token merging, and the file of the last parameters."""
    from modules import sd_models, shared

    state, options = shared.state, shared.cmd_opts
    kept = {name: getattr(state, name) for name in ("job", "job_no", "job_count", "textinfo")}
    merging = getattr(p.sd_model, "applied_token_merged_ratio", 0)
    no_history, options.no_prompt_history = options.no_prompt_history, True
    state.job_count += 1
    state.textinfo = "FaceSnap: drawing a small face again"
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
    """Inside the `with` block the UNet is free of what sd-webui-controlnet put in its forward's place for the whole
    picture (`UnetHook.hook` in https://github.com/Mikubill/sd-webui-controlnet), which would act on the crop too."""
    unet = getattr(getattr(p.sd_model, "model", None), "diffusion_model", None)
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
