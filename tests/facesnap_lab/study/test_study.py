"""A study from its images to its table: blind, driven in a browser, and evaluated exactly."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.cli.main import main
from facesnap_lab.evaluation.protocol import read_protocol
from facesnap_lab.study import evaluate as module
from facesnap_lab.study.evaluate import Answers, Key, evaluate, holm, read_answers, read_key
from facesnap_lab.study.make import choose, key_file, make

METHODS = {"FaceSnap": "red", "rival": "green", "other": "blue"}
COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A list with three people, two poses and two prompts, and each method's images in its colour."""
    folder = tmp_path_factory.mktemp("study")
    for name in ("ada", "bob", "eve", "left", "right"):
        Image.new("RGB", (8, 8), "grey").save(folder / f"{name}.png")
    content = {
        "identities": {name: f"{name}.png" for name in ("ada", "bob", "eve")},
        "poses": {name: f"{name}.png" for name in ("left", "right")},
        "prompts": {"beach": "a person on a beach", "oil": "an oil painting"},
    }
    (folder / "list.json").write_text(json.dumps(content))
    for i, (method, colour) in enumerate(METHODS.items()):
        for case in read_protocol(folder / "list.json").cases():
            file = folder / method / case.file
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16 + 8 * i, 16 + 8 * i), colour).save(file, comment=method)
    return folder


@pytest.fixture
def study(world, tmp_path):
    out = tmp_path / "page"
    pictures = [f"--pictures={method}={world / method}" for method in METHODS]
    assert main(["study", "make", str(world / "list.json"), *pictures, "--out", str(out), "--items", "4"]) == 0
    return out


def test_the_page_says_nothing_about_methods(study):
    key = json.loads(key_file(study).read_text())
    page = (study / "index.html").read_text()
    files = list((study / "images").iterdir())
    assert len(files) == 4 * 4
    for word in (*METHODS, *(item["file"] for item in key["items"]), "ada", "beach"):
        assert word not in page
        assert not any(word in file.name or word.encode() in file.read_bytes() for file in files)
    assert {Image.open(file).size for file in files} == {(512, 512)}
    assert len({tuple(item["methods"]) for item in key["items"]}) > 1
    assert all(sorted(item["methods"]) == sorted(METHODS) for item in key["items"])


def test_the_key_knows_every_image(study):
    """The page lists an item's images in the order of the key's methods."""
    content = (study / "index.html").read_text().split("const STUDY = ")[1].split(";\n")[0]
    items = json.loads(content)["items"]
    for shown, item in zip(items, json.loads(key_file(study).read_text())["items"]):
        for image, method in zip(shown["images"], item["methods"]):
            assert Image.open(study / image).getpixel((5, 5)) == COLOURS[METHODS[method]]
        assert Image.open(study / shown["reference"]).getpixel((5, 5)) == (128, 128, 128)


def test_people_are_used_evenly(world):
    protocol = read_protocol(world / "list.json")
    for count in (1, 3, 7, 12):
        cases = choose(protocol, count, np.random.default_rng(count))
        assert len({case.file for case in cases}) == count
        per_person = Counter(case.identity.name for case in cases)
        assert max(per_person.values()) <= math.ceil(count / 3)


def test_a_study_is_not_overwritten_and_needs_two_methods(world, tmp_path):
    protocol = read_protocol(world / "list.json")
    folders = {method: world / method for method in METHODS}
    with pytest.raises(FaceSnapError, match="at least two methods"):
        make(protocol, {"FaceSnap": world / "FaceSnap"}, tmp_path / "a", 2)
    with pytest.raises(FaceSnapError, match="ask for 1 to 12 items"):
        make(protocol, folders, tmp_path / "a", 13)
    with pytest.raises(FaceSnapError, match=r"lacks 12 of the list's 12 images|does not exist"):
        make(protocol, {**folders, "fourth": tmp_path / "fourth"}, tmp_path / "a", 2)
    assert not list(tmp_path.glob("a*"))
    make(protocol, folders, tmp_path / "a", 2)
    with pytest.raises(FaceSnapError, match="already exists"):
        make(protocol, folders, tmp_path / "a", 2)


@pytest.mark.parametrize("favourite", METHODS)
def test_a_participants_choices_reach_the_table(study, browser, tmp_path, capsys, favourite):
    """The participant finds the favourite by its colour, reloads the page in between, goes back once and skips once."""
    wanted = COLOURS[METHODS[favourite]]
    page = browser.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((study / "index.html").as_uri())
    page.get_by_role("button", name="Start").click()
    for step in range(2 * 4):
        assert f"{step + 1} of 8" in page.inner_text("header")
        assert (page.locator(".reference").count() == 1) == (step >= 4)  # realism is judged without a photo
        if step == 3:
            page.reload()
        if step == 5:
            page.get_by_role("button", name="Back").click()
            page.get_by_role("button", name="Skip").click()
        page.locator(".images img").nth(len(METHODS) - 1).wait_for()
        sources = page.eval_on_selector_all(".images img", "images => images.map(image => image.src)")
        place = [Image.open(source.removeprefix("file://")).getpixel((5, 5)) for source in sources].index(wanted)
        page.locator(".images button").nth(place).click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Save the answers").click()
    answers = tmp_path / download.value.suggested_filename
    download.value.save_as(answers)
    page.close()
    assert errors == []
    capsys.readouterr()
    assert main(["study", "evaluate", str(key_file(study)), str(answers), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["questions"]["realism"]["choices"] == 4
    assert found["questions"]["identity"]["choices"] == 3  # one was skipped
    for question in found["questions"].values():
        assert {method: share["mean"] for method, share in question["shares"].items()} == {
            method: float(method == favourite) for method in METHODS
        }
    assert main(["study", "evaluate", str(key_file(study)), str(answers)]) == 0
    assert f"| {favourite} | 100.0 | 100.0 |" in capsys.readouterr().out


def answers_of(*shares):
    """Participants who chose A in these numbers of 10 items, and B otherwise."""
    return [
        Answers(str(i), {("identity", item): "A" if item < count else "B" for item in range(10)})
        for i, count in enumerate(shares)
    ]


def test_shares_and_sign_test_have_their_closed_form():
    key = Key("s", ("A", "B"), ("identity",), (("A", "B"),) * 10)
    found = evaluate(key, answers_of(9, 8, 7, 10, 6, 9, 8, 3, 5))["questions"]["identity"]
    assert found["choices"] == 90
    assert found["shares"]["A"]["mean"] == pytest.approx(65 / 90)
    assert found["shares"]["A"]["low"] < 65 / 90 < found["shares"]["A"]["high"]
    [test] = found["tests"]
    assert (test["more"], test["fewer"]) == (7, 1)  # one participant has no preference
    assert test["p"] == pytest.approx(2 * sum(math.comb(8, k) for k in (0, 1)) / 2**8)


def test_a_participant_counts_once_however_many_items_he_answered():
    key = Key("s", ("A", "B"), ("identity",), (("A", "B"),) * 10)
    short = Answers("short", {("identity", 0): "B"})
    found = evaluate(key, [*answers_of(10), short])["questions"]["identity"]
    assert found["shares"]["A"]["mean"] == 0.5


def test_holm_controls_the_error_of_all_tests_together():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    random = np.random.default_rng(0)
    for values in random.uniform(0, 0.2, (50, 4)):
        corrected = holm(values.tolist())
        # Holm rejects what the closed test procedure with Bonferroni rejects
        for i, value in enumerate(corrected):
            closed = max(
                min(1.0, min(values[list(subset)]) * len(subset))
                for size in range(1, 5)
                for subset in itertools.combinations(range(4), size)
                if i in subset
            )
            assert value == pytest.approx(closed)


CHOICE = {"question": "identity", "item": 0, "image": 1}
WRONG = {
    "not JSON": ("{", "cannot be used"),
    "no choices": ({"study": "s", "participant": "p"}, "cannot be used"),
    "a list": ([], "cannot be used"),
    "another study": ({"study": "t", "participant": "p", "choices": []}, "belong to a different study"),
    "no name": ({"study": "s", "participant": 7, "choices": []}, "wrong type"),
    "a number": ({"study": "s", "participant": "p", "choices": [5]}, "unknown question or item"),
    "unknown question": (
        {"study": "s", "participant": "p", "choices": [CHOICE | {"question": "x"}]},
        "unknown question",
    ),
    "unknown item": ({"study": "s", "participant": "p", "choices": [CHOICE | {"item": 2}]}, "unknown"),
    "negative item": (
        {"study": "s", "participant": "p", "choices": [CHOICE | {"item": -1}]},
        "unknown question or item",
    ),
    "true": ({"study": "s", "participant": "p", "choices": [CHOICE | {"image": True}]}, "unknown image"),
    "unknown image": ({"study": "s", "participant": "p", "choices": [CHOICE | {"image": 2}]}, "unknown image"),
    "twice": ({"study": "s", "participant": "p", "choices": [CHOICE, CHOICE]}, "answered twice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_answers_are_refused_with_their_file(tmp_path, case):
    content, message = WRONG[case]
    file = tmp_path / "answers.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    key = Key("s", ("A", "B"), ("identity",), (("A", "B"),) * 2)
    with pytest.raises(FaceSnapError, match=message) as raised:
        read_answers([file], key)
    assert str(file) in str(raised.value)


def test_two_files_of_a_participant_and_large_files_are_refused(tmp_path, monkeypatch):
    key = Key("s", ("A", "B"), ("identity",), (("A", "B"),) * 2)
    for name in "ab":
        (tmp_path / name).write_text(json.dumps({"study": "s", "participant": "p", "choices": [CHOICE]}))
    with pytest.raises(FaceSnapError, match="same participant; remove the older one"):
        read_answers([tmp_path / "a", tmp_path / "b"], key)
    with pytest.raises(FaceSnapError, match="There are no answers"):
        read_answers([], key)
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(FaceSnapError, match="the file is too large"):
        read_answers([tmp_path / "a"], key)


def test_a_damaged_key_is_reported(tmp_path):
    (tmp_path / "key.json").write_text('{"study": 1}')
    with pytest.raises(FaceSnapError, match="enter the file that 'facesnap study make' wrote"):
        read_key(tmp_path / "key.json")
