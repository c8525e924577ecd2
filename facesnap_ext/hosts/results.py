"""What happens to a job's finished images: their likeness is measured, and they are checked, ordered and selected.

If only the best images are kept, the host saves none, and the kept images are saved by the host's function at the end
of the job. Files are never deleted, because a host's record of where it saved an image can name the user's older file:
A1111 1.10.1 sets `already_saved_as` to a name without the number that it adds if that name exists (`save_image` in
modules/images.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from PIL import Image

from facesnap_ext import photos
from facesnap_ext.conditioning import Placement
from facesnap_ext.engine import Engine
from facesnap_ext.errors import reason_of
from facesnap_ext.hosts import image_check, webui
from facesnap_ext.hosts.finished import FinishedImage, Plan
from facesnap_ext.hosts.init_image import is_batch_tab
from facesnap_ext.hosts.job import PreparedBatch, batch_index, resume_saving, save_no_images, state_of
from facesnap_ext.hosts.selected_script import PROMPTS_FROM_FILE, selected_script
from facesnap_ext.hosts.windows import through_window
from facesnap_ext.settings.infotext import label

LIKENESS = "likeness"  # completes the name of the infotext parameter
GAP = 0.01
"""Width of the gap in a strip, as a fraction of the image's height."""

PER_IMAGE = ("all_prompts", "all_negative_prompts", "all_seeds", "all_subseeds")
"""The lists of a host's `Processed` with one entry per image, besides `images` and `infotexts`."""

log = logging.getLogger("facesnap")


def option(name: str, default: Any) -> Any:
    """A setting of FaceSnap on the WebUI's settings page, or from the request's `override_settings`."""
    from modules import shared

    return getattr(shared.opts, f"facesnap_{name}", default)


def begin(p: Any, engine: Engine) -> None:
    """Plan what happens to the images of a prepared job.

    Raises:
        FaceSnapError: the installed image classifier cannot be used.
    """
    state = state_of(p)
    plan = Plan(
        measure=bool(option("likeness", False)),
        order=bool(option("best_first", False)),
        keep=int(option("keep_best", 0)),
        strip=bool(option("strip", False)),
    )
    is_inner = getattr(p, "_ad_inner", False)  # ADetailer's pass over a part of an image, which the job checks itself
    if option("check", True) and not is_inner:
        plan.classifier = engine.image_classifier()
    if plan.arranges and (is_inner or (reason := _counted_by(p))):
        if not is_inner:
            p.comment(f"FaceSnap: Images are not ordered, selected or shown beside the reference in {reason}.")
        plan.order, plan.keep, plan.strip = False, 0, False
    if plan.keep and len(p.all_prompts) // len(state.prepared) <= plan.keep:
        plan.keep = 0
    plan.measure |= plan.order or plan.keep > 0
    if plan.keep:
        save_no_images(p)
    state.plan = plan


def _counted_by(p: Any) -> str:
    """What created the job and depends on its number of images; empty if nothing does."""
    script = selected_script(p)
    if script and script != PROMPTS_FROM_FILE:
        return f"the script {script}, which depends on their number and order"
    return "img2img's Batch tab, which depends on their number and order" if is_batch_tab(p) else ""


def finish_image(p: Any, batch: PreparedBatch, image: Image.Image, host: ModuleType, engine: Engine) -> Image.Image:
    """Redraw, measure and check a finished image before the host saves it."""
    plan, i = state_of(p).plan, getattr(p, "batch_index", 0)
    prompt, seed = (next(iter(values[i:]), None) for values in (p.prompts, p.seeds))  # extensions may add images
    finished = FinishedImage(batch_index(p), p.iteration, i, prompt or "", seed)
    plan.finished.append(finished)  # before anything can fail, so that `finish_composite` checks the image
    image = webui.redraw_small_faces(p, batch, image, host, engine)
    if plan.measure:
        finished.likenesses = _measure(p, batch, image, engine)
        for number in batch.numbers:
            p.extra_generation_params.pop(label(LIKENESS, number), None)  # may be left from the previous image
        p.extra_generation_params.update(
            {
                label(LIKENESS, number): f"{value:.2f}"
                for number, value in finished.likenesses.items()
                if value is not None
            }
        )
    return image_check.check(p, image, finished, plan.classifier)


def _measure(p: Any, batch: PreparedBatch, image: Image.Image, engine: Engine) -> dict[int, float | None]:
    """The likeness of an image to each person in it, by unit number; empty if it cannot be measured."""
    shown = batch.of_image(getattr(p, "batch_index", 0))
    present = [i for i, person in enumerate(shown.people) if not person.absent]
    try:
        seen = through_window(p, shown, shown.people, bool(getattr(p, "enable_hr", False)))
        places = [Placement(seen[i].landmarks, seen[i].region) for i in present]
        values = engine.likenesses(photos.from_pil(image, "Image"), [shown.people[i] for i in present], places)
    except Exception as error:
        log.error("FaceSnap: the likeness could not be measured", exc_info=error)
        p.comment(f"FaceSnap: The likeness of an image could not be measured ({reason_of(error)}).")
        return {}
    measurable = [shown.people[i].embeddings is not None for i in present]
    return {batch.numbers[i]: value for i, value, known in zip(present, values, measurable) if known}


def finish_composite(p: Any, image: Image.Image) -> Image.Image:
    """Record an image as the host shows it. It is checked again if the host or an extension has changed it."""
    plan = state_of(p).plan
    finished = plan.finished[-1] if plan.finished else None
    if finished is None or (finished.iteration, finished.index) != (p.iteration, p.batch_index):
        return image
    finished.image = image_check.check(p, image, finished, plan.classifier)
    if saving := getattr(p, "facesnap_saving", None):
        p.do_not_save_samples = saving["do_not_save_samples"]
        finished.save = p.save_samples()
        p.do_not_save_samples = True
    return finished.image


def finish_job(p: Any, processed: Any) -> None:
    """Order and select a job's images, save the selected ones, add strips, and report likeness and blurring."""
    plan = state_of(p).plan
    if not processed.images or not plan.finished:  # ADetailer calls this without images after each batch
        return
    saving = resume_saving(p)
    shown = list(range(len(plan.finished)))
    layout = _layout(processed, plan.finished)
    try:
        if layout is not None:
            shown = _chosen(plan, processed)
            _arrange(processed, layout, shown)
        elif plan.arranges:
            _comment(processed, "The images are in their original order, because an extension changed their list.")
        if plan.keep:
            _save(p, processed, plan, shown, saving)
        if plan.strip and layout is not None:
            _add_strips(state_of(p).prepared, processed, layout, [plan.finished[i] for i in shown])
    except Exception as error:  # the host would swallow it
        log.error("FaceSnap: the images could not be arranged", exc_info=error)
        _comment(processed, f"Not all images could be arranged or saved ({reason_of(error)}).")
    _report(processed, {number: plan.finished[i] for number, i in enumerate(shown, 1)})
    plan.finished = []


def _comment(processed: Any, sentence: str) -> None:
    """Add a sentence below the images. `p.comment` would be too late."""
    processed.comments += f"FaceSnap: {sentence}\n"


@dataclass
class Layout:
    """Where the finished images are in a host's list of images, and their infotexts in its list of infotexts.

    Attributes:
        groups: the images of each finished image: itself, and its masks if the host returns them.
        first, text: indices of the first group and of its infotext. A grid is before it.
    """

    groups: list[list[Image.Image]]
    first: int
    text: int


def _layout(processed: Any, finished: Sequence[FinishedImage]) -> Layout | None:
    """The layout of a host's lists; None if they do not have the order in which the host makes them."""
    where = {id(image): position for position, image in enumerate(processed.images)}
    starts = [where.get(id(one.image), -1) for one in finished]
    text = processed.index_of_first_image
    if -1 in starts or starts != sorted(set(starts)) or len(processed.infotexts) < text + len(finished):
        return None
    last = starts[-1] + (starts[-1] - starts[-2] if len(starts) > 1 else 1)
    ends = [*starts[1:], min(last, len(processed.images))]
    return Layout([processed.images[start:end] for start, end in zip(starts, ends)], starts[0], text)


def _chosen(plan: Plan, processed: Any) -> list[int]:
    """The indices of the images to show, in this order."""
    chosen: list[int] = []
    for batch in sorted({one.batch for one in plan.finished}):
        made = [i for i, one in enumerate(plan.finished) if one.batch == batch]
        best = sorted(made, key=lambda i: (bool(plan.finished[i].rejected), -plan.finished[i].score))
        measured = any(plan.finished[i].measured for i in made)
        if plan.keep and not measured:
            _comment(processed, "All images were kept, because no likeness could be measured.")
        elif plan.keep:
            best = best[: plan.keep]
        chosen += best if plan.order else sorted(best)
    if left_out := len(plan.finished) - len(chosen):
        verb = "was" if left_out == 1 else "were"
        what = f"{left_out} of {len(plan.finished)} images {verb} left out"
        _comment(processed, f"{what}, because others have a higher likeness.")
    return chosen


def _arrange(processed: Any, layout: Layout, shown: Sequence[int]) -> None:
    """Put the images with these indices, and everything that the host keeps for each image, in this order."""
    count = len(layout.groups)
    if list(shown) == list(range(count)):
        return
    before, after = layout.first, layout.first + sum(map(len, layout.groups))
    moved = [image for i in shown for image in layout.groups[i]]
    processed.images = [*processed.images[:before], *moved, *processed.images[after:]]
    texts, first = processed.infotexts, layout.text
    processed.infotexts = [*texts[:first], *(texts[first + i] for i in shown), *texts[first + count :]]
    for name in PER_IMAGE:
        values = getattr(processed, name)
        if len(values) >= count:
            setattr(processed, name, [values[i] for i in shown])
    processed.seed, processed.subseed = processed.all_seeds[0], processed.all_subseeds[0]
    processed.info = processed.infotexts[0]
    layout.groups = [layout.groups[i] for i in shown]


def _save(p: Any, processed: Any, plan: Plan, shown: Sequence[int], saving: dict[str, bool]) -> None:
    """Save the kept images, and make and save their grid, as the host does at the end of a job."""
    from modules import images, shared

    opts = shared.opts
    kept = [plan.finished[i] for i in shown]
    texts = processed.infotexts[processed.index_of_first_image :]
    before = p.iteration, p.batch_index
    for one, text in zip(kept, texts):
        if one.save:
            p.iteration, p.batch_index = one.iteration, one.index  # file names may contain them
            images.save_image(
                one.image, p.outpath_samples, "", one.seed, one.prompt, opts.samples_format, info=text, p=p
            )
    p.iteration, p.batch_index = before
    if saving["do_not_save_grid"] or (len(kept) < 2 and opts.grid_only_if_multiple):
        return
    if not (opts.return_grid or opts.grid_save):
        return
    grid = images.image_grid([one.image for one in kept], p.batch_size)
    if opts.return_grid:
        if opts.enable_pnginfo:
            grid.info["parameters"] = texts[0]
        processed.images.insert(0, grid)
        processed.infotexts.insert(0, texts[0])
        processed.index_of_first_image = 1
    if opts.grid_save:
        images.save_image(
            grid,
            p.outpath_grids,
            "grid",
            kept[0].seed,
            kept[0].prompt,
            opts.grid_format,
            info=texts[0],
            short_filename=not opts.grid_extended_filename,
            p=p,
            grid=True,
        )


def _add_strips(
    batches: Sequence[PreparedBatch], processed: Any, layout: Layout, shown: Sequence[FinishedImage]
) -> None:
    """Add a strip for each image after all images, with the infotext of its image."""
    from modules import shared

    strips, texts = [], []
    start = processed.index_of_first_image
    for one, text in zip(shown, processed.infotexts[start:]):
        portraits = [portrait for portrait in batches[one.batch].portraits if portrait is not None]
        if portraits and one.image is not None:
            made = strip(portraits, one.image)
            if shared.opts.enable_pnginfo:
                made.info["parameters"] = text
            strips.append(made)
            texts.append(text)
    if len(strips) < len(shown):
        _comment(processed, "The reference photo is not shown beside the result, because a saved person has no photo.")
    last = layout.groups[-1][-1]
    after = next(i for i, image in enumerate(processed.images, 1) if image is last)  # == would compare pixels
    processed.images[after:after] = strips
    processed.infotexts[start + len(shown) : start + len(shown)] = texts


def strip(portraits: Sequence[Image.Image], image: Image.Image) -> Image.Image:
    """An image with portraits, one below the other, to the left of a finished image; its height is the image's."""
    gap = max(2, round(GAP * image.height))
    height = (image.height - gap * (len(portraits) - 1)) // len(portraits)
    fitted = [one.resize((max(1, round(one.width * height / one.height)), height)) for one in portraits]
    column = max(one.width for one in fitted)
    made = Image.new("RGB", (column + gap + image.width, image.height), "white")
    for row, one in enumerate(fitted):
        made.paste(one, ((column - one.width) // 2, row * (height + gap)))
    made.paste(image.convert("RGB"), (column + gap, 0))
    return made


def _report(processed: Any, shown: dict[int, FinishedImage]) -> None:
    """Report the likeness of the images, and which of them were blurred, by their number in the gallery."""
    lines = []
    for number, one in shown.items():
        people = [
            (f"person {person} " if len(one.likenesses) > 1 else "") + ("no face" if value is None else f"{value:.2f}")
            for person, value in one.likenesses.items()
        ]
        lines += [f"image {number}: {', '.join(people)}"] if people else []
    if lines:
        _comment(processed, f"Likeness (1 is identical): {'; '.join(lines)}.")
    if blurred := image_check.sentence(shown):
        _comment(processed, blurred)
