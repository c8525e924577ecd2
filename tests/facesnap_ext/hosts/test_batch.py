"""Reference mode `batch`: a job is repeated once per reference photo, and other jobs are not affected."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
from PIL import Image

from facesnap_ext import photos
from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts import job as host_job
from facesnap_ext.hosts import webui
from facesnap_ext.settings.infotext import DIGITS
from facesnap_ext.settings.script_args import batches_by_photo
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights.search import find_models
from tests.support import mock_processing
from tests.support.mock_processing import Processing, Runner, process_images

BATCH = {"reference_mode": "batch", "model": "random.safetensors"}
GREY = Image.new("RGB", (64, 64), "grey")


@pytest.fixture
def people(astronaut, group, grace_hopper):
    return [Image.fromarray(photo.pixels) for photo in (astronaut, grace_hopper, group)]


def job(host, *args, **values) -> Processing:
    return Processing(world=host, script_args=list(args), scripts=Runner(host.script), **values)


def digest(image) -> str:
    return photos.from_pil(image, "").digest[:DIGITS]


def tokens_of(image, stand_ins, **values):
    unit = Unit(True, references=(photos.from_pil(image, "alone"),), model="random.safetensors", **values)
    return webui.shared_engine(lambda: find_models(stand_ins)).prepare(unit, 512, 512).conditioning.tokens


@pytest.fixture
def drawn(host):
    """The identity tokens used for each image."""
    seen = []

    def draw(p, index, conditionings):
        seen.append(conditionings[0].tokens if conditionings else None)
        return mock_processing.colour(p, index, conditionings)

    host.draw = draw
    return seen


@pytest.mark.parametrize(("n_iter", "batch_size"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_the_job_is_repeated_for_each_photo(host, people, drawn, stand_ins, n_iter, batch_size):
    p = job(host, {**BATCH, "references": people}, n_iter=n_iter, batch_size=batch_size)
    result = process_images(p)
    each = n_iter * batch_size
    expected = [image for image in people for _ in range(each)]
    assert [text["FaceSnap references"] for text in result.infotexts] == [digest(image) for image in expected]
    assert [text["Seed"] for text in result.infotexts] == list(range(1, 1 + 3 * each))
    assert all(text["FaceSnap reference mode"] == "batch" for text in result.infotexts)
    for tokens, image in zip(drawn, expected, strict=True):
        assert tokens.equal(tokens_of(image, stand_ins))
    assert p.n_iter == n_iter
    assert host.state.job_count == 3 * n_iter
    assert "photo 3 of 3" in host.state.textinfo


def test_the_job_is_repeated_for_each_driving_photo(host, people, drawn, stand_ins):
    reference = people[0]
    person = {"model": "random.safetensors", "references": [reference], "driving": people}
    p = job(host, person, n_iter=2)
    result = process_images(p)
    expected = [image for image in people for _ in range(2)]
    assert [text["FaceSnap driving"] for text in result.infotexts] == [digest(image) for image in expected]
    assert {text["FaceSnap references"] for text in result.infotexts} == {digest(reference)}
    assert all(tokens.equal(tokens_of(reference, stand_ins)) for tokens in drawn)
    assert len(drawn) == 6
    assert p.n_iter == 2
    assert "photo 3 of 3" in host.state.textinfo


def test_reference_and_driving_photos_are_combined(host, people, drawn, stand_ins):
    result = process_images(job(host, {**BATCH, "references": people[:2], "driving": people[1:]}))
    pairs = [(digest(reference), digest(driving)) for reference in people[:2] for driving in people[1:]]
    texts = result.infotexts
    assert [(text["FaceSnap references"], text["FaceSnap driving"]) for text in texts] == pairs


@pytest.mark.parametrize("values", [{"pose": "template"}, {"pose": "own", "expression_source": "custom"}])
def test_driving_photos_that_are_not_used_do_not_repeat_the_job(host, people, drawn, values):
    process_images(job(host, {"model": "random.safetensors", "references": people[:1], "driving": people, **values}))
    assert len(drawn) == 1


def test_driving_photos_of_an_expression_repeat_the_job(host, people, drawn):
    person = {"model": "random.safetensors", "references": people[:1], "driving": people[:2], "pose": "template"}
    process_images(job(host, {**person, "expression_source": "driving"}))
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{}, {"driving": 2}], "Person 2: Only the first person can use one image per driving photo; remove all but"),
        ([{"driving": "grey"}], "Driving photo 2 has no detectable face; remove or replace"),
        ([{"driving": "text"}], "Driving photo 2 is not base64"),
    ],
)
def test_unusable_driving_photos_are_refused_at_the_start(host, people, changes, message):
    driving = {2: people[:2], "grey": [people[0], GREY], "text": [people[0], "https://example.org/a.png"]}
    person = {"model": "random.safetensors", "references": people[:1]}
    args = [{**person, **{name: driving[value] for name, value in change.items()}} for change in changes]
    p = job(host, *args)
    with pytest.raises(FaceSnapError, match=message):
        process_images(p)
    assert p.n_iter == 1


def test_upscaling_a_finished_image_requires_a_single_photo(host, people, drawn):
    """The button under the gallery runs only the hires pass, for the selected image."""
    p = job(host, {**BATCH, "references": people})
    p.txt2img_upscale = True
    with pytest.raises(FaceSnapError, match="remove all reference and driving photos except those"):
        process_images(p)
    assert drawn == []
    alone = job(host, {**BATCH, "references": people[:1]})
    alone.txt2img_upscale = True
    assert len(process_images(alone).images) == 1


def test_a_batch_of_one_photo_is_an_ordinary_job(host, people, drawn):
    result = process_images(job(host, {**BATCH, "references": people[:1]}, n_iter=2))
    assert len(result.images) == len(drawn) == 2


def test_the_clip_encoder_is_loaded_once_for_all_photos(host, people, drawn, monkeypatch):
    from facesnap_ext.identity import encoders

    loaded = []
    load = encoders.load_image_encoder
    monkeypatch.setattr(encoders, "load_image_encoder", lambda path: loaded.append(path) or load(path))
    process_images(job(host, {**BATCH, "references": people}))
    assert len(drawn) == 3
    assert len(loaded) == 1


def test_a_second_person_is_in_every_image(host, people, stand_ins):
    seen = []
    host.draw = lambda p, i, conditionings: seen.append(conditionings) or mock_processing.colour(p, i, conditionings)
    beside = {"references": people[2:], "model": "random.safetensors", "region": "face"}
    result = process_images(job(host, {**BATCH, "references": people[:2]}, beside))
    for (first, second), image in zip(seen, people[:2], strict=True):
        assert first.tokens.equal(tokens_of(image, stand_ins))
        assert second.tokens.equal(tokens_of(people[2], stand_ins))
    assert [text["FaceSnap 2 references"] for text in result.infotexts] == [digest(people[2])] * 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            [{**BATCH, "references": [0, None, 1, None]}],
            r"^Reference photo 2 and Reference photo 4 have no detectable face",
        ),
        (
            [{**BATCH, "references": [0, 1], "face_index": 1}],
            r"^Reference photo 1 and Reference photo 2 have no face with index 1 ",
        ),
        ([{"references": [0], "model": BATCH["model"]}, {**BATCH, "references": [0, 1]}], "^Person 2: Only the first"),
        ([{**BATCH, "references": [0, 1], "identity": "Ada"}], "cannot be combined with the saved identity Ada"),
        ([{**BATCH, "references": ["bm90", "bm90"]}], r"Reference photo 1 .* Reference photo 2"),
    ],
)
def test_invalid_batches_are_refused_at_the_start_and_leave_the_job_unchanged(host, people, args, message):
    for values in args:
        one = {0: people[0], 1: people[1], None: GREY}
        values["references"] = [one.get(photo, photo) for photo in values["references"]]
    p = job(host, *args, n_iter=2)
    with pytest.raises(FaceSnapError, match=message):
        process_images(p)
    assert p.n_iter == 2


def test_an_error_during_preparation_restores_the_job(host, people, monkeypatch):
    monkeypatch.setattr(host_job, "prepare", lambda *args: 1 / 0)
    p = job(host, {**BATCH, "references": people})
    with pytest.raises(FaceSnapError, match="ZeroDivisionError"):
        process_images(p)
    assert p.n_iter == 1


def test_an_inactive_unit_does_not_repeat_the_job(host, people, drawn):
    for values in ({"enabled": False}, {"weight": 0}):
        p = job(host, {**BATCH, "references": people, **values}, n_iter=2)
        assert len(process_images(p).images) == 2
        assert p.n_iter == 2
    assert drawn == [None] * 4


def test_the_same_job_can_run_again(host, people):
    """This happens in img2img's batch tab."""
    p = job(host, {**BATCH, "references": people}, n_iter=2)
    assert [len(process_images(p).images) for _ in range(2)] == [6, 6]
    p.script_args = [{"enabled": False}]
    assert len(process_images(p).images) == 2


def test_each_cell_of_a_plot_is_expanded_separately(host, people):
    """A cell is a shallow copy of the job and shares its infotext. The plot has already counted the cells' batches."""
    p = job(host, {**BATCH, "references": people}, n_iter=2)
    host.state.job_count = 2 * p.n_iter
    texts = []
    for values in ({"weight": 0.5, "yaw": 20.0}, {"reference": 2}):
        cell = copy.copy(p)
        cell.facesnap_axes = values
        texts.append(process_images(cell).infotexts)
    assert [len(cell) for cell in texts] == [6, 2]
    assert p.n_iter == 2
    assert host.state.job_count == 2 * 3 + 2
    assert {text["FaceSnap references"] for text in texts[1]} == {digest(people[1])}
    assert "FaceSnap yaw" in texts[0][0]
    assert "FaceSnap yaw" not in texts[1][0]


def test_other_scripts_lists_are_repeated_if_they_fill_whole_batches(host, people):
    p = job(host, {**BATCH, "references": people[:2]}, prompt=["a", "b"], seed=[5, 9], n_iter=2)
    result = process_images(p)
    assert [text["Seed"] for text in result.infotexts] == [5, 9, 5, 9]
    assert (p.prompt, p.seed, p.n_iter) == (["a", "b"], [5, 9], 2)
    p = job(host, {**BATCH, "references": people[:2]}, prompt=["a", "b", "c"], n_iter=2, batch_size=2)
    with pytest.raises(FaceSnapError, match="not a multiple of the batch size"):
        process_images(p)


def test_adetailers_pass_uses_the_person_of_its_image(host, people, drawn, stand_ins):
    """ADetailer copies the script's arguments and the infotext to a separate job. Finally, it calls `before_process`
    and `process` again with a copy of the outer job."""

    class ADetailer:
        args_from = args_to = 0

        def postprocess_image(self, p, pp):
            inner = job(host, *p.script_args, extra_generation_params=dict(p.extra_generation_params))
            inner._ad_inner = True
            pp.image = process_images(inner).images[0]
            again = copy.copy(p)
            p.scripts.call("before_process", again)
            p.scripts.call("process", again)

    p = job(host, {**BATCH, "references": people}, n_iter=2)
    p.scripts = Runner(host.script, ADetailer())
    result = process_images(p)
    assert host.state.job_count == 6
    expected = [image for image in people for _ in range(4)]  # 2 images, each with an inner job
    for tokens, image in zip(drawn, expected, strict=True):
        assert tokens.equal(tokens_of(image, stand_ins))
    assert [text["FaceSnap references"] for text in result.infotexts] == [digest(image) for image in expected[::2]]
    assert p.n_iter == 2


def test_batches_by_photo_makes_one_batch_per_photo():
    photo = photos.from_pil(GREY, "grey")
    two = Unit(True, references=(photo, photo), reference_mode="batch")
    assert batches_by_photo({}) == []
    assert [set(units) for units in batches_by_photo({1: two, 2: Unit(True)})] == [{1, 2}] * 2
    for alone in (Unit(True, references=(photo, photo)), Unit(True, reference_mode="batch", identity="Ada")):
        assert batches_by_photo({3: alone}) == [{3: alone}]
    assert len(batches_by_photo({1: Unit(True), 2: Unit(True, references=(photo,), reference_mode="batch")})) == 1


def test_the_engine_prepares_one_person_at_a_time(stand_ins, astronaut):
    unit = Unit(True, references=(astronaut, astronaut), reference_mode="batch")
    with pytest.raises(ValueError, match="one by one"):
        Engine(lambda: SimpleNamespace()).prepare(unit, 64, 64)
