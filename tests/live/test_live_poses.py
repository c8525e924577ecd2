"""Every pose and expression in a WebUI whose model folder contains only InstantID's two files and a face model pack.

No job may mention DECA or FLAME. InstantID sees five points of the face, so an image changes exactly if a movement
changes their drawing, which the tests predict from the response of /facesnap/landmarks.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facesnap_ext.landmarks.movements import EXPRESSIONS, SLIDERS
from facesnap_ext.landmarks.points5 import draw_five
from facesnap_ext.landmarks.poses import TEMPLATES, Rig, pose_landmarks
from facesnap_ext.settings.pose import pose_from_unit
from facesnap_ext.settings.unit import from_values
from tests.live.live_host import (
    PLAIN,
    Host,
    Images,
    Job,
    astronaut,
    differ,
    encode,
    equal,
    grace_hopper,
    small,
    with_people,
)
from tests.live.live_page import Page
from tests.live.test_live_plot import plot

MODEL = "InstantID"
REGISTERED = re.compile(r"\b(deca|flame)", re.IGNORECASE)
SMALLEST_CHANGE = 12  # pixels of the drawing that differ; fewer need not change an image of 8 bits
LARGE: Job = {"pose": "sliders", "size": 0.9}
SAVED = "Half a smile of the live tests"

Drawing = Callable[[Job], np.ndarray]


@pytest.fixture(scope="module")
def files(host: Host) -> Job:
    """The response of /facesnap/models; skips unless only InstantID and a face model pack are installed."""
    files: Job = host.get("/facesnap/models")
    if files["facesnap"] != [MODEL] or files["deca"] or files["flame"]:
        pytest.skip("the WebUI's model folder does not contain only InstantID's files and a face model pack")
    return files


@pytest.fixture(scope="module")
def known() -> dict[str, Images]:
    """The images of all jobs of these tests, so that none runs twice."""
    return {}


@pytest.fixture
def posed(probed: Host, files: Job, known: dict[str, Images]) -> Callable[..., Images]:
    """Runs a job with people, by default with the astronaut, and checks its comments."""

    def run(*people: Job, job: Job | None = None) -> Images:
        key = repr((people, job))
        if key not in known:
            known[key] = probed.images(pack_only(job or {}, *people))
            assert not [comment for comment in probed.probe()["comments"] if REGISTERED.search(comment)]
        return known[key]

    return run


@pytest.fixture(scope="module")
def drawing(host: Host, files: Job) -> Drawing:
    """Returns InstantID's control image for a person's settings without a driving photo."""
    answer = host.post("/facesnap/landmarks", {"reference": encode(astronaut())})
    assert not REGISTERED.search(" ".join(answer["notes"]))
    directions = {name: np.array(direction) for name, direction in answer["rig"]["directions"].items()}
    rig = Rig(np.array(answer["rig"]["rest"]), directions)
    width, height = PLAIN["width"], PLAIN["height"]

    def draw(settings: Job) -> np.ndarray:
        pose = pose_from_unit(from_values(settings), width, height)
        return draw_five(pose_landmarks(rig, pose, width, height), width, height)

    return draw


def pack_only(job: Job, *people: Job) -> Job:
    return with_people(job, *({"model": MODEL, **person} for person in people or ({},)))


def changed(one: np.ndarray, other: np.ndarray) -> int:
    """The number of pixels of a drawing that differ."""
    return int((one != other).any(axis=2).sum())


def test_nothing_is_missing(files: Job) -> None:
    assert files["missing"] == {}
    assert files["landmarks"] == "open face model"


def test_every_template_makes_a_different_image(posed: Callable[..., Images]) -> None:
    images = {name: posed({"pose": "template", "template": name}) for name in TEMPLATES}
    assert all(differ(images[one], images[other]) for one, other in itertools.combinations(images, 2))
    assert equal(images["front"], posed({"pose": "sliders"})), "front is the pose of sliders at 0"
    assert differ(images["front"], posed({"pose": "own"}))


ENDS = [(name, end) for name, slider in SLIDERS.items() for end in slider.range if end]


@pytest.mark.parametrize(("name", "value"), ENDS)
def test_a_slider_changes_the_image_exactly_if_it_changes_the_five_points(
    posed: Callable[..., Images], drawing: Drawing, name: str, value: float
) -> None:
    neutral, moved = LARGE, {**LARGE, name: value}
    pixels = changed(drawing(neutral), drawing(moved))
    if pixels >= SMALLEST_CHANGE:
        assert differ(posed(moved), posed(neutral))
    if pixels == 0:
        assert equal(posed(moved), posed(neutral))


def test_movements_that_leave_the_drawing_unchanged_leave_the_image_unchanged(
    posed: Callable[..., Images], drawing: Drawing
) -> None:
    """In a small face, the outer brows do not move a point to another pixel."""
    neutral = {"pose": "template", "template": "far"}
    moved = {**neutral, "expression_source": "custom", "brow_outer_left": 0.4, "brow_outer_right": 0.4}
    assert changed(drawing(neutral), drawing(moved)) == 0
    assert equal(posed(moved), posed(neutral))


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_named_expression_changes_the_image_with_its_strength(
    posed: Callable[..., Images], drawing: Drawing, name: str
) -> None:
    settings = {**LARGE, "expression_source": "custom", "expression": name}
    weak = {**settings, "expression_strength": 0.0}
    if name == "neutral":
        assert equal(posed(settings), posed(LARGE))
    else:
        assert changed(drawing(settings), drawing(weak)) >= SMALLEST_CHANGE
        assert differ(posed(settings), posed(weak))
    assert equal(posed(weak), posed(LARGE))


def test_each_driving_photo_makes_an_image(posed: Callable[..., Images]) -> None:
    photos = [encode(grace_hopper()), encode(np.ascontiguousarray(astronaut()[:, ::-1]))]
    together = posed({"driving": photos})[-2:]
    alone = [posed({"driving": photo}, job={"seed": 1 + i})[0] for i, photo in enumerate(photos)]
    assert equal(together, alone)
    assert differ(alone, [posed({}, job={"seed": 1 + i})[0] for i in range(2)])


def test_the_expression_of_the_pose_of_the_reference_and_of_the_driving_photo_differ(
    posed: Callable[..., Images],
) -> None:
    template = {"pose": "template", "template": "three quarters left", "driving": encode(grace_hopper()), "size": 0.9}
    images = [posed({**template, "expression_source": source})[0] for source in ("pose", "reference", "driving")]
    assert all(not np.array_equal(one, other) for one, other in itertools.combinations(images, 2))


def test_the_face_in_the_init_image_provides_the_pose(posed: Callable[..., Images]) -> None:
    job = {"init_images": [encode(small(grace_hopper()))], "denoising_strength": 0.6, "steps": 4}
    init, own, front = (posed(settings, job=job) for settings in ({}, {"pose": "own"}, {"pose": "template"}))
    assert differ(init, own)
    assert differ(init, front)
    assert differ(own, front)


def test_each_of_two_people_has_a_pose(posed: Callable[..., Images]) -> None:
    region = {"region": "face", "size": 0.5}
    left = {**region, "x": 0.25, "pose": "template", "template": "three quarters left"}
    right = {**region, "x": 0.75, "references": [encode(grace_hopper())], "driving": encode(astronaut())}
    both = posed(left, right)
    others = [
        posed(left),
        posed(right),
        posed({**left, "template": "profile right"}, right),
        posed(left, {**right, "pose": "sliders", "yaw": -40}),
    ]
    assert all(differ(both, other) for other in others)


@pytest.mark.parametrize(
    ("axis", "setting", "implied", "values"),
    [
        ("template", "template", {"pose": "template"}, ("front", "profile left")),
        ("expression", "expression", {"expression_source": "custom"}, ("neutral", "smile", "kiss")),
        ("smile left", "smile_left", {"pose": "sliders"}, ("0.5", "1.0")),
    ],
)
def test_the_cells_of_an_axis_equal_jobs_with_its_values(
    posed: Callable[..., Images], probed: Host, axis: str, setting: str, implied: Job, values: tuple[str, ...]
) -> None:
    base: Job = {"pose": "sliders", "size": 0.9}
    cells = plot(probed, pack_only({}, base), (f"[FaceSnap] {axis}", ", ".join(values)))
    typed: list[Any] = [float(value) if axis == "smile left" else value for value in values]
    assert equal(cells, [posed({**base, **implied, setting: value})[0] for value in typed])
    assert all(not np.array_equal(one, other) for one, other in itertools.combinations(cells, 2))


def test_noise_on_the_unconditional_side_changes_the_image(posed: Callable[..., Images]) -> None:
    plain = posed({})
    assert equal(posed({"uncond_noise": 0.0}), plain)
    assert differ(posed({"uncond_noise": 0.35}), plain)


def test_a_pose_saved_on_the_page_is_used_by_name(posed: Callable[..., Images], probed: Host, page: Page) -> None:
    page.open_accordion()
    page.upload("references", astronaut())
    page.choose_pose("sliders")
    page.set_slider("yaw", 30)
    page.choose_named_expression("smile")
    page.set_slider("mouth", 0.3)
    assert "only numbers and no pixels" in page.save_pose(SAVED)
    try:
        page.screenshot("saved-pose")
        turned = {"pose": "sliders", "yaw": 30, "mouth": 0.3, "expression_source": "custom", "expression": "smile"}
        named = {"pose": "saved", "saved_pose": SAVED}
        expected = posed(turned)
        assert equal(posed(named), expected)
        assert differ(expected, posed({"pose": "sliders"}))
        cells = plot(probed, pack_only({}, {"pose": "sliders"}), ("[FaceSnap] saved pose", SAVED))
        assert equal(cells, expected)
        page.choose_pose("saved")
        assert isinstance(page.generate(), np.ndarray)
        assert not REGISTERED.search(page.note())
    finally:
        page.choose_pose("saved")
        assert "Deleted" in page.delete_pose()


def test_no_response_mentions_deca_or_flame(probed: Host, files: Job) -> None:
    job = pack_only({}, {"pose": "template", "template": "profile left"})
    assert not REGISTERED.search(json.loads(probed.post("/sdapi/v1/txt2img", {**PLAIN, **job})["info"])["infotexts"][0])
    photos = {"reference": encode(astronaut()), "driving": encode(grace_hopper())}
    assert not REGISTERED.search(" ".join(probed.post("/facesnap/landmarks", photos)["notes"]))


def test_the_console_mentions_neither_deca_nor_flame(console: Path, files: Job) -> None:
    """The last test, so that it reads the output of all others."""
    assert not [line for line in console.read_text(errors="replace").splitlines() if REGISTERED.search(line)]
