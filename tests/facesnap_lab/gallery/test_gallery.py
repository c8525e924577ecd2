"""The gallery is generated with a WebUI's API, can be resumed, and refuses unsuitable WebUIs with one sentence."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("skimage")

import numpy as np
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.settings.script_args import from_script_args
from facesnap_lab.cli.main import main
from facesnap_lab.gallery import page
from facesnap_lab.gallery.make import make, read_results
from facesnap_lab.gallery.make import request as job_of
from facesnap_lab.gallery.plan import read_plan
from tests.facesnap_lab.gallery.fake_webui import INFOTEXT, colour_of, encoded, serve

DOCS = Path(__file__).parents[3] / "docs"
PLAN = {
    "defaults": {"prompt": "a portrait", "steps": 4, "cfg_scale": 4},
    "photos": {
        "astronaut": {"file": "skimage:astronaut", "credit": "NASA", "shown": True},
        "second": {"file": "photos/second.png", "credit": "Bert"},
    },
    "pictures": {
        "plain": {"title": "Without", "job": {"seed": 1}},
        "front": {
            "title": "Front",
            "readme": True,
            "job": {"seed": 2, "cfg_scale": 7},
            "people": [{"references": ["astronaut"], "pose": "template"}],
        },
        "both": {
            "title": "Both",
            "job": {"seed": 3},
            "people": [{"references": ["astronaut"]}, {"references": ["second"], "driving": "astronaut"}],
        },
    },
}


@pytest.fixture
def webui():
    with serve() as started:
        yield started


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder with the plan, next to a README with the gallery's section."""
    folder = tmp_path / "docs"
    (folder / "gallery" / "photos").mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"Before\n\n{page.BEGIN}\nold\n{page.END}\n\nAfter\n", "utf-8")
    write_plan(folder, PLAN)
    Image.new("RGB", (16, 16), "red").save(folder / "gallery" / "photos" / "second.png")
    return folder


def write_plan(docs: Path, plan: dict) -> None:
    (docs / "gallery" / "plan.json").write_text(json.dumps(plan), "utf-8")


def run(webui, docs: Path, *options: str) -> int:
    return main(["gallery", webui.url, "--docs", str(docs), *options])


def test_every_planned_image_is_generated_with_its_seed_and_photos(webui, docs, capsys):
    assert run(webui, docs, "--device", "a card") == 0
    plain, front, both = webui.pictures
    assert [job["seed"] for job in (plain, front, both)] == [1, 2, 3]
    assert [job["cfg_scale"] for job in (plain, front, both)] == [4, 7, 4]
    assert plain["alwayson_scripts"] == {}
    people = both["alwayson_scripts"]["FaceSnap"]["args"]
    second = (docs / "gallery" / "photos" / "second.png").read_bytes()
    assert base64.b64decode(people[1]["references"][0]) == second
    assert people[1]["driving"] == people[0]["references"][0]
    assert from_script_args(front["alwayson_scripts"]["FaceSnap"]["args"])[1].pose == "template"
    for job, name in ((plain, "plain"), (front, "front"), (both, "both")):
        pixels = np.asarray(Image.open(docs / "gallery" / f"{name}.jpg"), np.int16)
        assert np.abs(pixels - colour_of(job)).max() <= 3, "the image is the server's, apart from JPEG's loss"
    assert capsys.readouterr().out.endswith("3 of 3 images\n")


def test_pages_show_images_settings_and_photos(webui, docs):
    run(webui, docs, "--device", "a card")
    text = (docs / "gallery.md").read_text("utf-8")
    for words in (
        "xl \\| one.safetensors",
        "1.2.3 with InstantID",
        "v1.10.1",
        "a card",
        "## Front",
        "Reference photo: NASA",
    ):
        assert words in text
    assert INFOTEXT.splitlines()[-1] in text
    linked = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert len(linked) == 4
    assert all((docs / file).is_file() for file in linked)
    readme = (docs.parent / "README.md").read_text("utf-8")
    assert readme.startswith("Before\n")
    assert readme.endswith("\nAfter\n")
    assert 'src="docs/gallery/front.jpg"' in readme
    assert "plain.jpg" not in readme


def test_a_second_run_generates_nothing(webui, docs):
    run(webui, docs)
    before = {path: path.read_bytes() for path in docs.rglob("*.*")}
    count = len(webui.jobs)
    assert run(webui, docs) == 0
    assert len(webui.jobs) == count
    assert {path: path.read_bytes() for path in docs.rglob("*.*")} == before


def test_an_interrupted_run_is_resumed(webui, docs, capsys):
    webui.fails_at, webui.refusal = 3, {"error": "FaceSnapError", "errors": "The GPU is full; free some memory."}
    assert run(webui, docs) == 1
    assert "The image front could not be generated: The GPU is full; free some memory." in capsys.readouterr().err
    assert set(read_results(docs / "gallery")) == {"plain"}
    assert "![Without](gallery/plain.jpg)" in (docs / "gallery.md").read_text("utf-8")
    webui.fails_at = None
    webui.jobs.clear()
    assert run(webui, docs) == 0
    assert [job["seed"] for job in webui.pictures] == [2, 3]


@pytest.mark.parametrize(
    ("change", "seeds"),
    [
        (lambda plan, docs, webui: plan["pictures"]["front"]["job"].update(prompt="other"), [2]),
        (lambda plan, docs, webui: plan["pictures"]["both"]["people"][0].update(weight=0.5), [3]),
        (lambda plan, docs, webui: plan["defaults"].update(steps=5), [1, 2, 3]),
        (lambda plan, docs, webui: (docs / "gallery" / "photos" / "second.png").write_bytes(b"new"), [3]),
        (lambda plan, docs, webui: (docs / "gallery" / "front.jpg").unlink(), [2]),
        (lambda plan, docs, webui: (docs / "gallery" / "front.jpg").write_bytes(b"damaged"), [2]),
        (
            lambda plan, docs, webui: webui.answers.update({"/sdapi/v1/options": (200, {"sd_model_checkpoint": "b"})}),
            [1, 2, 3],
        ),
        (lambda plan, docs, webui: plan["pictures"]["front"].update(title="Renamed"), []),
    ],
)
def test_exactly_the_images_whose_recipe_changed_are_generated_again(webui, docs, change, seeds):
    run(webui, docs)
    webui.jobs.clear()
    plan = json.loads(json.dumps(PLAN))
    change(plan, docs, webui)
    write_plan(docs, plan)
    run(webui, docs)
    assert [job["seed"] for job in webui.pictures] == seeds


def test_an_image_without_its_photo_is_skipped_and_reported(webui, docs, capsys):
    (docs / "gallery" / "photos" / "second.png").unlink()
    assert run(webui, docs) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^both: skipped, because there is no photo .*second\.png$", printed, re.M)
    assert printed.endswith("2 of 3 images\n")
    assert "not generated yet:\n\n- Both\n" in (docs / "gallery.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"/facesnap/version": (404, {"detail": "Not Found"})}, "has no FaceSnap; install the extension there"),
        ({"/facesnap/version": (200, "<html>")}, "has no FaceSnap; install the extension there"),
        ({"/facesnap/models": (200, {"facesnap": [], "missing": {"clip": "No CLIP."}})}, "is not ready: No CLIP."),
        ({"/facesnap/models": (200, {"facesnap": ["a", "b"], "missing": {}})}, "has several FaceSnap files (a, b)"),
        ({"/facesnap/models": (200, [])}, "sent an unexpected answer"),
        ({"/sdapi/v1/options": (404, {"detail": "Not Found"})}, "has no API; start it with --api"),
        ({"/sdapi/v1/txt2img": (500, {"message": "No face was found."})}, "No face was found."),
        ({"/sdapi/v1/txt2img": (500, "")}, "answered with HTTP status 500"),
        ({"/sdapi/v1/txt2img": (200, {"images": [], "info": "{}"})}, "sent an unexpected answer"),
    ],
)
def test_an_unsuitable_webui_is_refused_with_one_sentence(webui, docs, capsys, answers, words):
    webui.answers |= answers
    assert run(webui, docs) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list((docs / "gallery").glob("*[!t].jpg"))


def test_an_image_that_cannot_be_read_is_refused(webui, docs):
    plan = read_plan(docs / "gallery" / "plan.json")
    info = json.dumps({"infotexts": [INFOTEXT]})
    for content in ("not base64!", base64.b64encode(b"no image").decode(), encoded((1, 2, 3))[:40]):
        webui.answers["/sdapi/v1/txt2img"] = (200, {"images": [content], "info": info})
        with pytest.raises(FaceSnapError, match="The image plain cannot be read"):
            make(plan, webui.client(), docs / "gallery", report=lambda line: None)


def test_login(webui, docs, capsys):
    webui.login = True
    assert run(webui, docs) == 1
    assert "requires a login; pass --auth USER:PASSWORD" in capsys.readouterr().err
    assert run(webui, docs, "--auth", "ada:secret") == 0


def test_no_webui(docs, capsys):
    assert main(["gallery", "http://127.0.0.1:9", "--docs", str(docs)]) == 1
    assert "No WebUI answers at http://127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.pop("photos"),
        lambda plan: plan["pictures"]["front"].pop("title"),
        lambda plan: plan["pictures"]["front"].update(unknown=1),
        lambda plan: plan["pictures"].update({"../escape": plan["pictures"]["plain"]}),
        lambda plan: plan["pictures"]["front"]["people"][0].update(references=["nobody"]),
        lambda plan: plan["pictures"]["front"].update(people=[1]),
    ],
)
def test_an_invalid_plan_is_refused_before_any_request(webui, docs, capsys, change):
    plan = json.loads(json.dumps(PLAN))
    change(plan)
    write_plan(docs, plan)
    assert run(webui, docs) == 1
    assert "plan.json" in capsys.readouterr().err
    assert not webui.jobs


def test_facesnap_accepts_every_person_of_the_repositorys_plan():
    plan = read_plan(DOCS / "gallery" / "plan.json")
    photo = plan.photos["astronaut"].content
    for name, other in plan.photos.items():
        other.__dict__.setdefault("content", photo)  # photos that are not in the repository
        assert other.credit, name
    for picture in plan.pictures:
        job = job_of(plan, picture)
        assert {"prompt", "seed", "steps", "width", "height", "cfg_scale"} <= set(job)
        people = job["alwayson_scripts"].get("FaceSnap", {"args": []})["args"]
        assert [unit.enabled for unit in from_script_args(people).values()] == [True] * len(people)
