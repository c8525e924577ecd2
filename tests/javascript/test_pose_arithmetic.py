"""facesnap_pose.js computes the same points as Python. It runs in a JavaScript engine without a page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facesnap_ext.hosts.windows import init_region
from facesnap_ext.identity.job_landmarks import photo_points
from facesnap_ext.identity.predictors import Preview
from facesnap_ext.landmarks.movements import EXPRESSIONS, SLIDERS
from facesnap_ext.landmarks.neutral import NeutralFace
from facesnap_ext.landmarks.open_face import OpenShape, load_basis
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.landmarks.poses import (
    TEMPLATES,
    Pose,
    Rig,
    displacement,
    for_browser,
    placement,
    pose_points,
    reposition,
)
from facesnap_ext.landmarks.rigs import flame_rig, open_face_rig
from facesnap_ext.settings.pose import custom_expression, pose_from_unit
from facesnap_ext.settings.unit import CHOICES, RANGES, Unit, to_values
from facesnap_lab.miniature.render import head
from tests.support.units import make_unit

SCRIPTS = Path(__file__).parents[2] / "javascript"
RIG = flame_rig(head())
BASIS = load_basis()
WIDTH, HEIGHT = 832, 1216

sides = st.integers(64, 1024)
places = {name: st.none() | st.floats(*RANGES[name]) for name in ("x", "y", "size")}
sliders = {name: st.floats(*RANGES[name]) for name in SLIDERS}
chosen = {
    "pose": st.sampled_from(["template", "sliders"]),
    "template": st.sampled_from(list(TEMPLATES)),
    "expression_source": st.sampled_from(CHOICES["expression_source"]),
    "expression": st.sampled_from(list(EXPRESSIONS)),
    "expression_strength": st.floats(*RANGES["expression_strength"]),
}
units = st.builds(make_unit, **chosen, **sliders, **places)


class Browser:
    """A JavaScript engine with facesnap_pose.js and a rig."""

    def __init__(self) -> None:
        self._context = pytest.importorskip("py_mini_racer").MiniRacer()
        self._context.eval((SCRIPTS / "facesnap_pose.js").read_text(encoding="utf-8"))
        self._context.eval(f"const rig = {json.dumps(for_browser(RIG))};")

    def __call__(self, expression: str, **names: object) -> object:
        constants = "".join(f"const {name} = {json.dumps(value)};" for name, value in names.items())
        return json.loads(self._context.eval(f"(() => {{ {constants} return JSON.stringify({expression}); }})()"))


@pytest.fixture(scope="module")
def browser() -> Browser:
    return Browser()


def values_of(unit: Unit) -> dict[str, object]:
    return {name: to_values(unit)[name] for name in (*chosen, *sliders, *places)}


def rig_of(seed: int | None) -> Rig:
    """The miniature's mean head for None, else a random person of the open face model."""
    if seed is None:
        return RIG
    modes = np.random.default_rng(seed).normal(size=BASIS.shape.shape[2])
    return open_face_rig(BASIS, OpenShape(modes, np.zeros((72, 3))))


@given(unit=units, person=st.none() | st.integers(0, 2**32 - 1), width=sides, height=sides)
def test_the_preview_of_a_rig_has_the_points_of_the_job(
    browser: Browser, unit: Unit, person: int | None, width: int, height: int
) -> None:
    rig = rig_of(person)
    state = {"values": values_of(unit), "width": width, "height": height}
    given_rig = {"person": None if person is None else for_browser(rig)}
    shown = browser("facesnapPreviewOf({...state, rig: person || rig})", state=state, **given_rig)
    pose = pose_from_unit(unit, width, height)
    np.testing.assert_allclose(shown["points"], pose_points(rig, pose, width, height), rtol=0, atol=1e-4)
    assert shown["pose"] == pytest.approx(asdict(pose), abs=1e-9)


@given(
    seed=st.integers(0, 2**32 - 1),
    place=st.fixed_dictionaries(places),
    pose=st.sampled_from(["photo", "own"]),
    width=sides,
    height=sides,
)
def test_a_photos_points_are_repositioned_as_in_the_job(
    browser: Browser, seed: int, place: dict[str, float | None], pose: str, width: int, height: int
) -> None:
    points = np.random.default_rng(seed).uniform(-0.2, 1.2, (72, 2))
    landmarks = Landmarks((points * (width, height)).astype(np.float32), width, height)
    state = {"values": {"pose": pose, **place}, "points": (landmarks.points / (width, height)).tolist()}
    shown = browser("facesnapPreviewOf(state)", state=state | {"width": width, "height": height})
    expected = reposition(landmarks, **place)
    # the job's landmarks are float32, so allow for an ulp of the farthest point
    tolerance = max(1e-3, 1e-6 * abs(expected.points).max())
    np.testing.assert_allclose(shown["points"], expected.points, rtol=0, atol=tolerance)
    assert list(shown["pose"].values()) == pytest.approx(list(placement(expected)), abs=1e-5)


@given(
    seed=st.integers(0, 2**32 - 1),
    unit=st.builds(make_unit, **{**chosen, "pose": st.sampled_from(["photo", "own"])}, **sliders, **places),
    width=sides,
    height=sides,
)
def test_a_photos_expression_is_changed_as_in_the_job(
    browser: Browser, seed: int, unit: Unit, width: int, height: int
) -> None:
    random = np.random.default_rng(seed)
    landmarks = [
        Landmarks((random.uniform(0.2, 0.8, (72, 2)) * (width, height)).astype(np.float32), width, height)
        for _ in range(2)
    ]
    face = NeutralFace(landmarks[1], random.uniform(-1, 1, (2, 3)) * height)
    photo = random.normal(0, 0.02, (72, 3))
    expected = landmarks[0]
    if unit.expression_source == "custom":
        expected = face.with_expression(displacement(RIG, custom_expression(unit)))
    elif unit.expression_source != "pose":
        expected = face.with_expression(photo)
    expected = reposition(expected, unit.x, unit.y, unit.size)
    preview = Preview(RIG, landmarks[0], (), face, photo)
    state = {"values": values_of(unit), "width": width, "height": height, **photo_points(preview)}
    shown = browser("facesnapPreviewOf({...state, rig})", state=state)
    tolerance = max(1e-2, 1e-5 * abs(expected.points).max())
    np.testing.assert_allclose(shown["points"], expected.points, rtol=0, atol=tolerance)


@given(mode=st.integers(0, 3), size=st.tuples(sides, sides), output=st.tuples(sides, sides))
def test_the_window_is_the_part_of_the_init_image_that_the_host_uses(
    browser: Browser, mode: int, size: tuple[int, int], output: tuple[int, int]
) -> None:
    window = browser("facesnapInitWindow(mode, size, output)", mode=mode, size=size, output=output)
    assert np.multiply(window, size * 2) == pytest.approx(init_region(mode, size, output), abs=1e-6)


@given(
    seed=st.integers(0, 2**32 - 1),
    place=st.fixed_dictionaries(places),
    mode=st.integers(0, 3),
    size=st.tuples(sides, sides),
    output=st.tuples(sides, sides),
)
def test_points_in_an_init_image_lie_where_the_job_crops_them(
    browser: Browser, seed: int, place: dict[str, float | None], mode: int, size: tuple, output: tuple
) -> None:
    """The job repositions them in the init image and then crops it. The canvas does both in the opposite order."""
    fractions = np.random.default_rng(seed).uniform(0.2, 0.8, (72, 2))
    landmarks = reposition(Landmarks((fractions * size).astype(np.float32), *size), **place)
    x, y, width, height = init_region(mode, size, output)
    expected = landmarks.crop(x, y, width, height).scaled(*output)
    window = browser("facesnapInitWindow(mode, size, output)", mode=mode, size=size, output=output)
    left, top, w, h = window
    values = browser("facesnapPlaceInOutput(place, window)", place={"pose": "photo", **place}, window=window)
    state = {"values": values, "points": ((fractions - (left, top)) / (w, h)).tolist()}
    shown = browser("facesnapPreviewOf(state)", state=state | {"width": output[0], "height": output[1]})
    np.testing.assert_allclose(shown["points"], expected.points, rtol=1e-4, atol=1e-2)
    back = browser("facesnapPlaceInInit(values, window)", values=values, window=window)
    assert back == pytest.approx({"pose": "photo", **place})


def test_colours_polylines_and_ranges_are_those_of_python(browser: Browser) -> None:
    from facesnap_ext.landmarks.points72 import COLOURS, POLYLINES

    parts = browser("rig.parts")
    assert [tuple(part["colour"]) for part in parts] == list(COLOURS.values())
    assert [part["lines"] for part in parts] == [POLYLINES[name] for name in COLOURS]
    for name, limits in browser("facesnapRanges").items():
        assert tuple(limits) == RANGES[name]


def test_global_names_are_prefixed() -> None:
    import re

    declaration = re.compile(r"^(?:const|let|var|function|class|async function) (\w+)", re.MULTILINE)
    for script in SCRIPTS.glob("*.js"):
        declared = declaration.findall(script.read_text(encoding="utf-8"))
        assert declared, script.name
        assert [name for name in declared if not name.startswith("facesnap")] == [], script.name


points_2d = st.tuples(st.floats(0, WIDTH), st.floats(0, HEIGHT))


def drag(browser: Browser, action: str, pose: Pose, start: tuple, end: tuple) -> dict[str, float]:
    middle = [pose.x * WIDTH, pose.y * HEIGHT]
    return browser(
        "facesnapDrag(action, pose, middle, from, to, width, height)",
        action=action, pose=asdict(pose), middle=middle, to=end, width=WIDTH, height=HEIGHT, **{"from": start},
    )  # fmt: skip


@given(start=points_2d, end=points_2d)
def test_a_dragged_face_follows_the_pointer(browser: Browser, start: tuple, end: tuple) -> None:
    pose = Pose(yaw=10)
    changed = drag(browser, "move", pose, start, end)
    expected = [
        np.clip((a + (e - s) / side), -0.5, 1.5) for a, s, e, side in zip((pose.x, pose.y), start, end, (WIDTH, HEIGHT))
    ]
    assert changed == pytest.approx(dict(zip("xy", expected)), abs=1e-9)


@given(factor=st.floats(0.1, 6), turn=st.floats(0, 6))
def test_a_dragged_corner_stays_under_the_pointer(browser: Browser, factor: float, turn: float) -> None:
    pose = Pose()
    middle = np.array([pose.x * WIDTH, pose.y * HEIGHT])
    arm = 100 * np.array([math.cos(turn), math.sin(turn)])
    changed = drag(browser, "resize", pose, (*(middle + arm),), (*(middle + factor * arm),))
    assert changed == pytest.approx({"size": min(max(pose.size * factor, 0.02), 3)})


def test_a_drag_turns_the_face_towards_the_pointer_up_to_the_limits(browser: Browser) -> None:
    pose, face = Pose(), 0.45 * HEIGHT
    assert drag(browser, "turn", pose, (400, 500), (400 + face / 3, 500)) == pytest.approx({"yaw": 30, "pitch": 0})
    assert drag(browser, "turn", pose, (400, 500), (400, 500 + face / 9)) == pytest.approx({"yaw": 0, "pitch": 10})
    assert drag(browser, "turn", pose, (0, 0), (9e3, -9e3)) == {"yaw": 75, "pitch": -45}


@given(degrees=st.floats(-45, 45), start=st.floats(-180, 180))
def test_tilting_follows_the_pointer_around_the_face_even_below_it(
    browser: Browser, degrees: float, start: float
) -> None:
    pose = Pose()
    middle = np.array([pose.x * WIDTH, pose.y * HEIGHT])
    points = [middle + 200 * np.array([math.sin(a), -math.cos(a)]) for a in np.radians([start, start + degrees])]
    assert drag(browser, "tilt", pose, *map(tuple, points)) == pytest.approx({"roll": degrees}, abs=1e-6)


def test_keys_move_turn_and_resize_the_face(browser: Browser) -> None:
    pose = asdict(Pose())

    def key(name: str, shift: bool = False, pose: dict = pose) -> dict | None:
        return browser("facesnapKey(key, shift, pose)", key=name, shift=shift, pose=pose)

    assert key("ArrowLeft") == pytest.approx({"x": 0.49})
    assert key("ArrowDown") == pytest.approx({"y": 0.46})
    assert key("ArrowRight", shift=True) == {"yaw": 3}
    assert key("ArrowUp", shift=True) == {"pitch": -3}
    assert key("+", shift=True)["size"] > 0.45 > key("-")["size"]
    assert key("Tab") is None
    photo = {name: pose[name] for name in places}
    assert key("ArrowRight", shift=True, pose=photo) is None
    assert key("ArrowRight", pose=photo) == pytest.approx({"x": 0.51})


def test_turning_a_template_switches_to_sliders_and_moving_it_does_not(browser: Browser) -> None:
    values = {"pose": "template", "template": "tilted", "yaw": 0, "x": None, "y": None, "size": None}
    pose = asdict(TEMPLATES["tilted"])
    turned = browser("facesnapSettingsOf(values, pose, {yaw: 20})", values=values, pose=pose)
    assert turned == {**pose, "yaw": 20, "pose": "sliders"}
    assert browser("facesnapSettingsOf(values, pose, {x: 0.2})", values=values, pose=pose) == {"x": 0.2}


def test_turning_a_template_with_a_chosen_expression_keeps_the_expression(browser: Browser) -> None:
    values = {"pose": "template", "template": "tilted", "expression_source": "custom", "expression": "wink"}
    pose = browser("facesnapResolvePose(rig, values, 512, 512)", values=values)
    assert pose["lid_right"] == -1
    turned = browser("facesnapSettingsOf(values, pose, {yaw: 20})", values=values, pose=pose)
    template = asdict(TEMPLATES["tilted"])
    kept = {name: template[name] for name in ("pitch", "roll", "x", "y", "size")}
    assert turned == pytest.approx({**kept, "yaw": 20, "pose": "sliders"})
