"""A job's finished images: likeness, order, selection, saving, strips, and the check by an image classifier.

The mock host makes, saves and lists images as A1111's and Forge's `process_images_inner` do.
"""

from __future__ import annotations

import copy
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts import image_check, results, webui
from facesnap_ext.hosts.init_image import remember_request
from tests.support import mock_processing
from tests.support.classifiers import change_json, make_decided
from tests.support.mock_processing import Img2Img, Processing, Runner, process_images

SIDE = 64
ENGINES = {}  # one for all tests, whose cache holds the reference photos' faces
TITLES = ("Prompt matrix", "X/Y/Z plot", "SD upscale", "Loopback", "Prompts from file or textbox")
LISTS = ("all_prompts", "all_negative_prompts", "all_seeds", "all_subseeds")


@pytest.fixture
def page(host, tmp_path, monkeypatch):
    """The mock host, which saves into `tmp_path`. An image's likeness is its seed's value in `page.likeness`."""
    defaults = {"samples_save": True, "samples_format": "png", "save_incomplete_images": False, "enable_pnginfo": True}
    defaults |= {"return_grid": False, "grid_save": False, "grid_only_if_multiple": True, "grid_format": "png"}
    defaults |= {"grid_extended_filename": False, "return_mask": False, "return_mask_composite": False}
    vars(host.opts).update(defaults)
    host.folder = tmp_path / "outputs"
    host.likeness, host.saved = {}, []

    def save_image(image, path, basename, seed, prompt, extension="png", *, info, p, grid=False, **values):
        number = p.iteration * p.batch_size + p.batch_index + 1  # the host's [generation_number]
        (host.folder / path).mkdir(parents=True, exist_ok=True)
        file = host.folder / path / f"{len(host.saved):02}-{basename or seed}-{number}.{extension}"
        image.save(file)
        image.already_saved_as = str(file)
        host.saved.append(SimpleNamespace(file=file, image=image, info=info, prompt=prompt, seed=seed, grid=grid))

    def image_grid(images, batch_size):
        grid = Image.new("RGB", (SIDE * len(images), SIDE))
        for i, image in enumerate(images):
            grid.paste(image, (i * SIDE, 0))
        return grid

    host.save_image, host.image_grid = save_image, image_grid
    monkeypatch.setitem(
        sys.modules,
        "modules.images",
        SimpleNamespace(save_image=lambda *args, **values: host.save_image(*args, **values), image_grid=image_grid),
    )
    monkeypatch.setattr(sys.modules["modules"], "images", sys.modules["modules.images"], False)
    engine = ENGINES.setdefault(0, Engine(host.module.model_files))
    monkeypatch.setattr(webui, "_engine", engine)
    host.measured = []

    def likenesses(photo, people, places):
        host.measured.append(photo)
        value = host.likeness.get(tuple(photo.pixels[0, 0]), None)
        if isinstance(value, Exception):
            raise value
        return [value] * len(people) if not isinstance(value, list) else value

    monkeypatch.setattr(engine, "likenesses", likenesses)
    host.engine = engine
    return host


def colour_of(seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 256, 3, np.uint8))


def job(page, photo, likenesses=(), title=None, kind=Processing, person=None, **values):
    """A job whose images have these likenesses, in the order in which they are made."""
    runner = Runner(page.script)
    runner.selectable_scripts = [SimpleNamespace(title=lambda title=title: title) for title in TITLES]
    page.script.args_from = 1
    page.likeness = {colour_of(11 + i): value for i, value in enumerate(likenesses)}
    person = {"references": [Image.fromarray(photo.pixels)], "model": "random.safetensors"} | (person or {})
    values = {"seed": 11, "width": SIDE, "height": SIDE, "scripts": runner} | values
    script = TITLES.index(title) + 1 if title else 0
    return kind(world=page, script_args=[script, person], **values)


def seeds(processed):
    """The seeds of the images, by their colour."""
    known = {colour_of(seed): seed for seed in range(11, 40)}
    return [known.get(tuple(np.asarray(image.convert("RGB"))[0, 0])) for image in processed.images]


def test_nothing_changes_by_default(page, astronaut):
    p = job(page, astronaut, [0.1, 0.5, 0.3], batch_size=3)
    processed = process_images(p)
    assert seeds(processed) == [11, 12, 13]
    assert page.measured == []
    assert processed.comments == ""
    assert [one.seed for one in page.saved] == [11, 12, 13]


@pytest.mark.parametrize("grid", [True, False])
@pytest.mark.parametrize("shape", [(4, 1), (2, 2), (1, 4)])
def test_best_first_moves_everything_that_belongs_to_an_image(page, astronaut, grid, shape):
    page.opts.facesnap_best_first, page.opts.return_grid = True, grid
    prompts = ["a", "b", "c", "d"]
    n_iter, batch_size = shape
    values = [0.2, 0.7, None, 0.5]
    p = job(page, astronaut, values, n_iter=n_iter, batch_size=batch_size, prompt=prompts, subseed=[1, 2, 3, 4])
    processed = process_images(p)
    first = processed.index_of_first_image
    assert first == int(grid)
    assert seeds(processed)[first:] == processed.all_seeds == [12, 14, 11, 13]
    assert [text["Seed"] for text in processed.infotexts[first:]] == processed.all_seeds
    assert [text.get("FaceSnap likeness") for text in processed.infotexts[first:]] == ["0.70", "0.50", "0.20", None]
    assert (processed.all_prompts, processed.all_subseeds) == (["b", "d", "a", "c"], [2, 4, 1, 3])
    assert (processed.seed, processed.subseed, processed.info) == (12, 2, processed.infotexts[0])
    assert "image 1: 0.70; image 2: 0.50; image 3: 0.20; image 4: no face." in processed.comments
    assert p.all_seeds == [11, 12, 13, 14], "other scripts still read the job's own lists"
    assert [one.seed for one in page.saved] == [11, 12, 13, 14], "the host has saved them before"
    if grid:
        assert np.array_equal(np.asarray(processed.images[0])[0, ::SIDE], [colour_of(seed) for seed in range(11, 15)])


def test_an_images_masks_move_with_it(page, astronaut):
    page.opts.facesnap_best_first = page.opts.return_mask = page.opts.return_mask_composite = True
    p = job(page, astronaut, [0.2, 0.7], n_iter=2, kind=Img2Img, mask_for_overlay=Image.new("L", (SIDE, SIDE), 255))
    p.init_images = [Image.fromarray(astronaut.pixels)]
    processed = process_images(p)
    assert [image.mode for image in processed.images] == ["RGB", "RGB", "RGBA"] * 2
    assert (seeds(processed)[0], seeds(processed)[3]) == (12, 11)


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_only_the_best_images_are_shown_and_saved(page, astronaut, order, batch_size):
    page.opts.facesnap_keep_best, page.opts.facesnap_best_first = 2, order
    older = page.folder / "samples" / "older.png"
    older.parent.mkdir(parents=True)
    older.write_bytes(b"another job's")
    p = job(page, astronaut, [0.2, 0.5, None, 0.7], n_iter=4 // batch_size, batch_size=batch_size)
    processed = process_images(p)
    kept = [14, 12] if order else [12, 14]
    assert seeds(processed) == processed.all_seeds == [one.seed for one in page.saved] == kept
    assert [one.info for one in page.saved] == processed.infotexts
    assert all(image.already_saved_as == str(one.file) for image, one in zip(processed.images, page.saved))
    assert sorted(page.folder.rglob("*.png")) == sorted([older, *(one.file for one in page.saved)])
    assert older.read_bytes() == b"another job's"
    assert [one.file.stem[-1] for one in page.saved] == [str(seed - 10) for seed in kept], "[generation_number]"
    assert "2 of 4 images were left out" in processed.comments
    assert (p.do_not_save_samples, p.do_not_save_grid) == (False, False)


def test_the_grid_shows_only_kept_images(page, astronaut):
    page.opts.facesnap_keep_best, page.opts.facesnap_best_first = 2, True
    page.opts.return_grid = page.opts.grid_save = True
    processed = process_images(job(page, astronaut, [0.2, 0.5, 0.7], batch_size=3))
    assert processed.index_of_first_image == 1
    assert len(processed.images) == len(processed.infotexts) == 3
    grid = processed.images[0]
    assert np.array_equal(np.asarray(grid)[0, ::SIDE], [colour_of(13), colour_of(12)])
    assert [one.grid for one in page.saved] == [False, False, True]
    assert page.saved[-1].image is grid
    page.saved.clear()
    processed = process_images(job(page, astronaut, [0.2, 0.5, 0.7], batch_size=3, do_not_save_grid=True))
    assert (len(processed.images), processed.index_of_first_image, len(page.saved)) == (2, 0, 2)


@pytest.mark.parametrize(
    ("job_values", "opts"), [({"do_not_save_samples": True}, {}), ({}, {"samples_save": False})], ids=["API", "setting"]
)
def test_images_that_the_host_would_not_save_are_not_saved(page, astronaut, job_values, opts):
    page.opts.facesnap_keep_best = 1
    vars(page.opts).update(opts)
    p = job(page, astronaut, [0.2, 0.5], batch_size=2, **job_values)
    processed = process_images(p)
    assert (seeds(processed), page.saved) == ([12], [])
    assert p.do_not_save_samples == bool(job_values)


def test_an_interrupted_job_keeps_the_best_of_what_it_made(page, astronaut):
    page.opts.facesnap_keep_best = 1
    draw = page.draw

    def interrupt(p, i, people):
        page.state.interrupted = p.iteration == 2
        return draw(p, i, people)

    page.draw = interrupt
    processed = process_images(job(page, astronaut, [0.2, 0.5, 0.1, 0.9], n_iter=4))
    assert seeds(processed) == processed.all_seeds == [12]
    assert [one.seed for one in page.saved] == [12]


def test_each_photo_of_batch_mode_keeps_its_best_images(page, astronaut, grace_hopper):
    page.opts.facesnap_keep_best, page.opts.facesnap_best_first = 1, True
    photos = [Image.fromarray(photo.pixels) for photo in (astronaut, grace_hopper)]
    person = {"references": photos, "reference_mode": "batch"}
    processed = process_images(job(page, astronaut, [0.8, 0.9, 0.3, 0.2], batch_size=2, person=person))
    assert seeds(processed) == [12, 13]
    references = [text["FaceSnap references"] for text in processed.infotexts]
    assert len(set(references)) == 2


@pytest.mark.parametrize("values", [[None, None], [RuntimeError("no memory")] * 2])
def test_without_any_likeness_all_images_are_kept(page, astronaut, values):
    page.opts.facesnap_keep_best = 1
    processed = process_images(job(page, astronaut, values, batch_size=2))
    assert seeds(processed) == [one.seed for one in page.saved] == [11, 12]
    assert "All images were kept, because no likeness could be measured." in processed.comments
    assert ("no memory" in processed.comments) == isinstance(values[0], Exception)


def test_the_lowest_likeness_of_several_people_counts(page, astronaut):
    page.opts.facesnap_best_first = True
    p = job(page, astronaut, [[0.9, 0.1], [0.4, 0.3], [0.8, None]], batch_size=3)
    p.script_args.append(p.script_args[1])
    processed = process_images(p)
    assert seeds(processed) == [12, 11, 13]
    assert (processed.infotexts[0]["FaceSnap likeness"], processed.infotexts[0]["FaceSnap 2 likeness"]) == (
        "0.40",
        "0.30",
    )
    assert "FaceSnap 2 likeness" not in processed.infotexts[2]
    assert "image 1: person 1 0.40, person 2 0.30" in processed.comments
    assert "image 3: person 1 0.80, person 2 no face" in processed.comments


@pytest.mark.parametrize("setting", ["best_first", "keep_best", "strip"])
@pytest.mark.parametrize("title", [*TITLES, None])
def test_scripts_that_count_images_get_all_of_them_in_order(page, astronaut, setting, title):
    setattr(page.opts, f"facesnap_{setting}", 1)
    p = job(page, astronaut, [0.2, 0.5, 0.3], title, batch_size=3)
    processed = process_images(p)
    untouched = seeds(processed) == [one.seed for one in page.saved] == [11, 12, 13]
    assert untouched == (title not in (None, "Prompts from file or textbox"))
    assert (f"in the script {title}, which depends on their number and order" in processed.comments) == untouched


def test_the_batch_tab_of_img2img_gets_all_images_in_order(page, astronaut):
    page.opts.facesnap_keep_best = 1
    p = job(page, astronaut, [0.2, 0.5], batch_size=2, kind=Img2Img, init_images=[None])
    remember_request(p)
    for _ in range(2):  # the tab runs the same job again
        p.init_images = [Image.fromarray(astronaut.pixels)] * 2
        processed = process_images(p)
        assert seeds(processed) == [11, 12]
    assert "img2img's Batch tab" in processed.comments


def test_adetailers_calls_in_the_middle_of_a_job_change_nothing(page, astronaut):
    """After each batch, ADetailer calls `postprocess`, `before_process` and `process` with a copy of the job."""
    page.opts.facesnap_keep_best = 2

    class ADetailer:
        args_from = args_to = 0

        def postprocess_image(self, p, pp):
            page.script.postprocess(copy.copy(p), SimpleNamespace(images=[]), *p.script_args[1:])
            again = copy.copy(p)
            page.script.before_process(again, *p.script_args[1:])
            page.script.process(again, *p.script_args[1:])

    p = job(page, astronaut, [0.2, 0.5, 0.1, 0.9], n_iter=2, batch_size=2)
    p.scripts.alwayson_scripts.append(ADetailer())
    processed = process_images(p)
    assert seeds(processed) == [one.seed for one in page.saved] == [12, 14]
    assert (p.do_not_save_samples, p.do_not_save_grid) == (False, False)


def test_a_pass_of_adetailer_is_neither_selected_nor_checked(page, astronaut):
    page.opts.facesnap_keep_best = 1
    p = job(page, astronaut, [0.2, 0.5], batch_size=2)
    p._ad_inner = True
    processed = process_images(p)
    assert seeds(processed) == [11, 12]
    assert "not ordered" not in processed.comments


def test_images_that_an_extension_replaced_stay_in_order_and_are_saved(page, astronaut):
    class Replacing:
        args_from = args_to = 0

        def postprocess_image_after_composite(self, p, pp):
            pp.image = pp.image.copy()

    page.opts.facesnap_keep_best = 1
    p = job(page, astronaut, [0.2, 0.5], batch_size=2)
    p.scripts.alwayson_scripts.append(Replacing())
    processed = process_images(p)
    assert seeds(processed) == [one.seed for one in page.saved] == [11, 12]
    assert "in their original order, because an extension changed their list" in processed.comments


def test_images_of_other_extensions_stay_at_the_end(page, astronaut):
    class ControlNet:
        args_from = args_to = 0

        def postprocess(self, p, processed):
            processed.images.append(Image.new("RGB", (SIDE, SIDE)))

    page.opts.facesnap_best_first = page.opts.facesnap_strip = True
    p = job(page, astronaut, [0.2, 0.5], batch_size=2)
    p.scripts.alwayson_scripts.insert(0, ControlNet())
    processed = process_images(p)
    assert seeds(processed)[:2] == [12, 11]
    assert [image.width > SIDE for image in processed.images] == [False, False, True, True, False]
    assert [text["Seed"] for text in processed.infotexts] == [12, 11, 12, 11]


def test_a_failure_to_save_is_reported(page, astronaut):
    page.opts.facesnap_keep_best = 1
    page.save_image = lambda *args, **values: (_ for _ in ()).throw(OSError("No space left on device"))
    processed = process_images(job(page, astronaut, [0.2, 0.5], batch_size=2))
    assert "Not all images could be arranged or saved (No space left on device)." in processed.comments


def test_the_next_job_is_saved_by_the_host_again(page, astronaut):
    """Also if sampling raised an error, after which hosts do not call `postprocess`."""
    page.opts.facesnap_keep_best = 1
    p = job(page, astronaut, [0.2, 0.5], batch_size=2)
    page.draw = lambda *args: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError):
        process_images(p)
    assert p.do_not_save_samples
    page.draw = mock_processing.colour
    page.opts.facesnap_keep_best = 0
    process_images(p)
    assert not p.do_not_save_samples
    assert [one.seed for one in page.saved] == [11, 12]


def test_a_strip_shows_reference_and_image_and_carries_infotext(page, astronaut, grace_hopper):
    page.opts.facesnap_strip = page.opts.return_grid = True
    processed = process_images(job(page, grace_hopper, batch_size=2))
    first = processed.index_of_first_image
    assert len(processed.images) == len(processed.infotexts) == 5
    assert [text["Seed"] for text in processed.infotexts[first:]] == [11, 12, 11, 12]
    for image, made, text in zip(processed.images[1:3], processed.images[3:], processed.infotexts[3:]):
        assert made.info["parameters"] == text
        assert made.height == SIDE
        assert np.array_equal(np.asarray(made)[:, -SIDE:], np.asarray(image))
        width = made.width - SIDE - 2
        assert width == round(512 * SIDE / 600)
        expected = Image.fromarray(grace_hopper.pixels).resize((width, SIDE))
        assert np.abs(np.asarray(made, float)[:, :width] - np.asarray(expected, float)).mean() < 3
    assert len(page.saved) == 2, "strips contain a photo and are not saved"
    assert processed.all_seeds == [11, 12]


def test_a_strip_of_several_people_shows_all_of_them():
    colours = ["red", "lime", "blue"]
    made = results.strip([Image.new("RGB", (30, 60), colour) for colour in colours], Image.new("RGB", (90, 90)))
    assert made.height == 90
    middle = np.asarray(made)[[15, 45, 75], (made.width - 92) // 2]
    assert [tuple(one) for one in middle] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


@pytest.fixture
def check(page, tmp_path, monkeypatch):
    """Install an image classifier that gives this label to every image."""

    def install(label):
        folder = tmp_path / "classifier"
        make_decided(folder, label)
        files = page.module.model_files

        def with_classifier():
            found = files()
            found.image_classifier = folder
            return found

        monkeypatch.setattr(page.engine, "_find_models", with_classifier)
        return folder

    yield install
    shutil.rmtree(tmp_path / "classifier", ignore_errors=True)


def is_blurred(image):
    return image.size == (SIDE, SIDE) and image.getpixel((0, 0)) != image.getpixel((SIDE - 1, 0))


def noise(p, i, people):
    values = np.random.default_rng(p.seeds[i]).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("label", ["nsfw", "normal"])
@pytest.mark.parametrize("on", [True, False])
def test_rejected_images_are_blurred_wherever_they_go(page, astronaut, check, label, on):
    check(label)
    page.opts.facesnap_check = page.opts.facesnap_likeness = page.opts.facesnap_strip = on
    page.draw = noise
    p = job(page, astronaut, batch_size=2)
    processed = process_images(p)
    expected = [noise(p, i, ()) for i in range(2)]
    blurred = label == "nsfw" and on
    for sharp, shown, saved in zip(expected, processed.images, page.saved):
        assert np.array_equal(np.asarray(shown), np.asarray(image_check.blur(sharp) if blurred else sharp))
        assert saved.image is shown
    for made, shown in zip(processed.images[2:], processed.images):
        assert np.array_equal(np.asarray(made)[:, -SIDE:], np.asarray(shown))
    assert [text.get("FaceSnap blurred") for text in processed.infotexts[:2]] == ["nsfw 1.00" if blurred else None] * 2
    sentence = "The image classifier rejected image 1 (nsfw 1.00), image 2 (nsfw 1.00), which were blurred"
    assert (sentence in processed.comments) == blurred
    if on:
        assert all(np.array_equal(photo.pixels, np.asarray(sharp)) for photo, sharp in zip(page.measured, expected))


def test_an_image_that_changes_after_its_check_is_checked_again(page, astronaut, check, monkeypatch):
    check("normal")
    seen = []
    classify = image_check.rejection
    monkeypatch.setattr(image_check, "rejection", lambda scores: seen.append(scores) or classify(scores))
    process_images(job(page, astronaut))
    assert len(seen) == 1
    page.overlay = lambda image: image.copy()
    process_images(job(page, astronaut))
    assert len(seen) == 3


def test_rejected_images_are_not_the_best(page, astronaut, check, monkeypatch):
    check("normal")
    page.opts.facesnap_best_first = True
    made = []
    monkeypatch.setattr(
        image_check, "rejection", lambda scores: made.append(1) or (("nsfw", 0.9) if made == [1] else None)
    )
    processed = process_images(job(page, astronaut, [0.9, 0.2, 0.4], batch_size=3))
    assert processed.all_seeds == [13, 12, 11]
    assert [text.get("FaceSnap blurred") for text in processed.infotexts] == [None, None, "nsfw 0.90"]
    assert "rejected image 3 (nsfw 0.90), which was blurred" in processed.comments


def test_an_error_before_the_check_does_not_skip_it(page, astronaut, check, monkeypatch):
    check("nsfw")
    page.draw = noise
    monkeypatch.setattr(webui, "redraw_small_faces", lambda *args: 1 / 0)
    p = job(page, astronaut)
    processed = process_images(p)
    assert np.array_equal(np.asarray(processed.images[0]), np.asarray(image_check.blur(noise(p, 0, ()))))
    assert processed.infotexts[0]["FaceSnap blurred"] == "nsfw 1.00"


def test_an_image_that_cannot_be_checked_is_not_shown(page, astronaut, check, monkeypatch):
    check("normal")
    page.draw = noise
    monkeypatch.setattr(image_check, "rejection", lambda scores: (_ for _ in ()).throw(MemoryError()))
    p = job(page, astronaut)
    processed = process_images(p)
    assert np.array_equal(np.asarray(processed.images[0]), np.asarray(image_check.blur(noise(p, 0, ()))))
    assert processed.infotexts[0]["FaceSnap blurred"] == "not checked"


def test_a_classifier_that_cannot_be_used_stops_the_job(page, astronaut, check):
    folder = check("nsfw")
    change_json(folder / "config.json", id2label={"0": "cat", "1": "dog"})
    page.draw = lambda *args: pytest.fail("computed")
    with pytest.raises(FaceSnapError, match="does not know its label 'cat'"):
        process_images(job(page, astronaut))
    page.draw, page.opts.facesnap_check = mock_processing.colour, False
    assert seeds(process_images(job(page, astronaut))) == [11]


def test_jobs_without_facesnap_are_not_checked(page, astronaut, check):
    check("nsfw")
    processed = process_images(job(page, astronaut, person={"weight": 0}))
    assert seeds(processed) == [11]
    assert processed.comments == ""


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (640, 480), (333, 1024)])
def test_a_blurred_image_keeps_its_size_and_at_most_a_few_colours(size):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    blurred = image_check.blur(Image.fromarray(values))
    assert blurred.size == size
    cells = image_check.CELLS
    again = np.asarray(blurred.resize((cells * 4, cells * 4), Image.Resampling.BOX), float)
    steps = np.abs(np.diff(again, axis=0)).max() + np.abs(np.diff(again, axis=1)).max()
    assert min(size) < cells or steps < 160
