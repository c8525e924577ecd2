"""Tasks about saved people and poses, as the page sends them."""

from __future__ import annotations

import html
import json
import re
import shutil
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from facesnap_ext.engine import Engine
from facesnap_ext.identity.framing import face_thumbnail
from facesnap_ext.photos import from_base64
from facesnap_ext.settings import page_settings
from facesnap_ext.settings.saved_poses import load_pose
from facesnap_ext.weights import identity_file
from facesnap_ext.weights.identity_folder import find_identities
from facesnap_ext.weights.search import find_models
from tests.facesnap_ext.ui.test_reference_photos import png

pytest.importorskip("insightface")


class Updates(NamedTuple):
    """Updates of the components; an empty dictionary changes nothing."""

    task: Any
    report: Any
    pose_report: Any
    chosen: Any
    references: Any
    settings: Any

    def names(self) -> dict[str, list[str]]:
        """The names in the page's lists of saved people and poses."""
        return json.loads(html.unescape(re.findall(r"data-facesnap-lists='([^']*)'", self.chosen)[0]))


@pytest.fixture
def models(stand_ins, tmp_path):
    return shutil.copytree(stand_ins, tmp_path / "facesnap")


@pytest.fixture
def run(page, models, astronaut):
    """Run a task with a photo of the astronaut, and return the report and the updates."""
    engine = Engine(lambda: find_models(models))

    def run(chosen: str = "", **task):
        text = json.dumps({"number": 7, **task})
        settings = json.dumps({"identity": chosen})
        updates = page.tasks.run_task(engine, text, "", "", True, [png(astronaut.pixels)], None, None, "", settings)
        return Updates(*updates)

    return run


def test_saving_replaces_the_photos_by_the_saved_person(run, models):
    done = run(do="save", name="Eileen")
    words = re.sub("<[^>]*>", "", done.report)
    assert words.startswith("Saved as Eileen.safetensors. The file contains features of the face, but no pixels.")
    assert "data-facesnap-new='Eileen'" in done.report
    assert done.names()["identity"] == ["Eileen"]
    assert done.references is None
    chosen = page_settings.parse(done.settings)
    assert (chosen["identity"], chosen["face_index"]) == ("Eileen", 0)
    assert (chosen["pose"], chosen["template"]) == ("template", "front"), "a saved person has no pose"
    assert identity_file.load(models / "identities" / "Eileen.safetensors").picture is None


@pytest.mark.parametrize("picture", [False, True])
def test_a_picture_is_kept_only_on_request_and_shown(run, page, models, astronaut, picture):
    _, report, *_ = run(do="save", name="Eileen", picture=picture)
    assert ("small picture" in report) == picture
    shown = page.people.describe(models, "Eileen")
    pictures = re.findall(r"src='([^']*)'", shown)
    assert len(pictures) == picture
    assert ("a small picture of it" in shown) == picture
    if picture:
        engine = Engine(lambda: find_models(models))
        expected = np.asarray(face_thumbnail(engine.encoders().faces(astronaut)[0], identity_file.PICTURE_SIDE))
        assert np.abs(from_base64(pictures[0], "Picture").pixels.astype(int) - expected).mean() < 4


def test_an_existing_name_is_refused_and_the_photos_stay(run, models):
    run(do="save", name="Eileen")
    done, report, *updates = run(do="save", name="Eileen")
    assert done == "", "the page can send another task"
    assert "There is already an identity named Eileen" in report
    assert "data-facesnap-new" not in report
    assert updates == [{}] * 4


def test_renaming_keeps_every_byte_and_deleting_removes_the_file(run, models):
    run(do="save", name="Eileen", picture=True)
    before = (models / "identities" / "Eileen.safetensors").read_bytes()
    done = run("Eileen", do="rename", person="Eileen", name="Eve/<b>")
    assert done.names()["identity"] == ["Eve__b_"]
    assert page_settings.parse(done.settings)["identity"] == "Eve__b_"
    assert done.references == {}, "the photos stay"
    assert "Eileen → Eve__b_" in done.report
    assert "Eve__b_</span>" in done.chosen
    path = models / "identities" / "Eve__b_.safetensors"
    assert path.read_bytes() == before
    assert identity_file.load(path).name == "Eve__b_"
    done = run("Eve__b_", do="delete", person="Eve__b_")
    assert done.names()["identity"] == []
    assert page_settings.parse(done.settings)["identity"] == ""
    assert "facesnap-saved" not in done.chosen
    assert list((models / "identities").iterdir()) == []


def test_renaming_does_not_replace_a_different_person(run, models):
    run(do="save", name="Eileen")
    shutil.copy(models / "identities" / "Eileen.safetensors", models / "identities" / "Grace.safetensors")
    _, report, *updates = run(do="rename", person="Eileen", name="Grace")
    assert "already an identity named Grace" in report
    assert set(find_identities(models)) == {"Eileen", "Grace"}
    assert updates == [{}] * 4


def test_other_people_on_the_page_learn_the_names(run):
    run(do="save", name="Eve")
    for chosen in ("", "Eve"):
        done = run(chosen, do="list")
        assert (done.report, done.references, done.settings) == ({}, {}, {})
        assert done.names() == {"identity": ["Eve"], "saved_pose": []}
        assert ("facesnap-saved" in done.chosen) == bool(chosen)


def choose(page, models, settings: str, references=None, driving=None, init: str = ""):
    """The settings after a saved person has been chosen."""
    engine = Engine(lambda: find_models(models))
    task = json.dumps({"do": "choose", "number": 1})
    return Updates(*page.tasks.run_task(engine, task, "", init, True, references, driving, None, "", settings)).settings


@pytest.mark.parametrize(
    ("settings", "photos"),
    [
        ('{"pose": "template", "template": "far"}', {}),
        ('{"pose": "sliders"}', {}),
        ("{broken", {}),
        ("", {"references": ["photo"]}),
        ("", {"driving": "photo"}),
        ("", {"init": "data:"}),
    ],
)
def test_a_saved_person_keeps_a_pose_that_needs_no_photo_or_has_one(page, models, settings, photos):
    assert choose(page, models, settings, **photos) == {}


def test_choosing_a_saved_person_without_a_photo_chooses_the_front_view(page, models):
    chosen = page_settings.parse(choose(page, models, '{"placed": true, "x": 0.2, "start": 0.1}', references=[]))
    assert (chosen["pose"], chosen["template"]) == ("template", "front")
    assert (chosen["x"], chosen["start"]) == (0.2, 0.1)


def test_a_pose_is_saved_listed_and_deleted(run, page, models):
    engine = Engine(lambda: find_models(models))

    def task(do: str, name: str, **settings) -> Updates:
        text, shown = json.dumps({"do": do, "number": 3, "name": name}), json.dumps(settings)
        return Updates(*page.tasks.run_task(engine, text, "640x512 1", "", True, None, None, None, "", shown))

    done = task("save_pose", "Nod", pose="sliders", pitch=12)
    assert "Saved as</span> <span translate='no'>Nod.json" in done.pose_report
    assert done.names()["saved_pose"] == ["Nod"]
    assert page_settings.parse(done.settings)["saved_pose"] == "Nod"
    assert load_pose(models, "Nod").pitch == 12
    done = task("delete_pose", "", saved_pose="Nod")
    assert done.names()["saved_pose"] == []
    assert page_settings.parse(done.settings)["saved_pose"] == ""
    assert "facesnap-problem" in task("delete_pose", "", saved_pose="Nod").pose_report


def test_a_pose_is_saved_from_the_first_of_several_driving_photos(page, models, astronaut, mirrored):
    """The canvas shows it. More driving photos may also be there without a first one."""
    engine = Engine(lambda: find_models(models))
    first, more = Image.fromarray(mirrored.pixels), [png(astronaut.pixels)]
    for name, driving in (("First", first), ("More", None)):
        task = json.dumps({"do": "save_pose", "number": 1, "name": name})
        shown = (True, [png(astronaut.pixels)], driving, more, "", json.dumps({"pose": "photo"}))
        report = Updates(*page.tasks.run_task(engine, task, "512x512 1", "", *shown)).pose_report
        assert "Saved as" in report
    turned = [load_pose(models, name).yaw for name in ("First", "More")]
    assert abs(turned[0] - turned[1]) > 1, "different photos"


@pytest.mark.parametrize("do", ["rename", "delete"])
@pytest.mark.parametrize("person", ["../random", "..", "", "*", "nobody", "lora"])
def test_no_other_file_is_renamed_or_deleted(run, models, do, person):
    (models / "identities").mkdir()
    shutil.copy(models / "random.safetensors", models / "identities" / "lora.safetensors")
    before = sorted(path for path in models.rglob("*") if path.name != "hashes.json")
    _, report, *_ = run(do=do, person=person, name="new")
    assert "facesnap-problem" in report
    assert sorted(path for path in models.rglob("*") if path.name != "hashes.json") == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=40) | st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists).map(json.dumps))
def test_malformed_tasks_are_refused_in_one_sentence(page, models, task):
    engine = Engine(lambda: find_models(models))
    done, report, *updates = page.tasks.run_task(engine, task, "", "", True, None, None, None, "", "")
    assert updates == [{}] * 4
    assert done == ("" if task else {}), "the page can send another task"
    assert report == {} if not task else "reload the page" in report


def test_a_saved_persons_name_is_escaped(page, models):
    """On systems that allow such file names."""
    name = "'><img src=x onerror=alert(1)>"
    networks = {"face_pack": "0" * 64}
    identity = identity_file.Identity(name, torch.ones(1, 512), None, None, ("0" * 10,), networks)
    identity_file.save(models / "identities" / f"{name}.safetensors", identity)
    assert "<img" not in page.people.describe(models, name)
    assert "There is no identity named" in page.people.describe(models, "nobody")
