"""The pose preview in a browser: what its canvas draws, and how drags, the wheel and keys change the pose."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facesnap_ext.landmarks.movements import Sliders
from facesnap_ext.landmarks.points72 import draw
from facesnap_ext.landmarks.poses import TEMPLATES, for_browser, pose_landmarks
from facesnap_ext.landmarks.rigs import flame_rig
from facesnap_ext.settings.pose import pose_from_unit
from facesnap_ext.settings.unit import Unit
from facesnap_lab.miniature.render import head
from tests.support.units import make_unit

SCRIPTS = [Path(__file__).parents[2] / "javascript" / name for name in ("facesnap_canvas.js", "facesnap_pose.js")]
WIDTH, HEIGHT = 640, 512
RIG = flame_rig(head())
SLIDERS = {"pose": "sliders", "template": "front", **asdict(Sliders())}
SLIDERS |= {"x": None, "y": None, "size": None}


class Page:
    """An empty page with a preview 640 CSS pixels wide, one for each pixel of the output image."""

    def __init__(self, browser, values: dict, width: int = WIDTH, height: int = HEIGHT, points=None, touch=False):
        self.page = browser.new_page(viewport={"width": 900, "height": 700}, has_touch=touch)
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.set_content(
            '<html style="font-size: 18px"><body style="margin: 0; height: 3000px">'
            '<div id="root" style="width: 640px"></div><input type="range" id="yaw" min="-75" max="75" value="0">'
        )
        for script in SCRIPTS:
            self.page.add_script_tag(content=script.read_text(encoding="utf-8"))
        state = {"rig": for_browser(RIG), "values": values, "width": width, "height": height, "points": points}
        self.page.evaluate(
            "state => { window.changes = [];"
            " const change = (changed, done) => changes.push({changed, done});"
            " window.preview = facesnapAttach(document.getElementById('root'), {...state, change}); }",
            state,
        )
        self.settle()

    def settle(self) -> None:
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def values(self) -> dict:
        return self.page.evaluate("preview.values()")

    def changes(self) -> list:
        """The calls of `change` since the previous check."""
        return self.page.evaluate("changes.splice(0)")

    def points(self) -> np.ndarray:
        state = {"rig": for_browser(RIG), "values": self.values(), "width": WIDTH, "height": HEIGHT}
        return np.array(self.page.evaluate("state => facesnapPreviewOf(state).points", state))

    def drag(self, start, end, shift: bool = False, steps: int = 4) -> None:
        mouse = self.page.mouse
        if shift:
            self.page.keyboard.down("Shift")
        mouse.move(*map(float, start))
        mouse.down()
        mouse.move(*map(float, end), steps=steps)
        mouse.up()
        if shift:
            self.page.keyboard.up("Shift")

    def swipe(self, x: float, y: float, down: float, steps: int = 6) -> None:
        """Move a finger vertically."""
        session = self.page.context.new_cdp_session(self.page)
        kinds = ["touchStart", *["touchMove"] * steps, "touchEnd"]
        for i, kind in enumerate(kinds):
            points = [{"x": float(x), "y": float(y + down * min(i, steps) / steps)}] if kind != "touchEnd" else []
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
            self.settle()
        session.detach()

    def focus(self) -> None:
        self.page.locator("canvas").focus()


@pytest.fixture
def page(browser):
    opened = []

    def make(values: dict | None = None, **others) -> Page:
        opened.append(Page(browser, {**SLIDERS, **(values or {})}, **others))
        return opened[-1]

    yield make
    for one in opened:
        one.page.close()
        assert one.errors == []


def expected(values: dict) -> np.ndarray:
    pose = pose_from_unit(make_unit(**{"pose": "sliders", **values}), WIDTH, HEIGHT)
    return pose_landmarks(RIG, pose, WIDTH, HEIGHT).points


def test_the_canvas_shows_the_landmark_image_of_the_job(page):
    one = page()
    for name in TEMPLATES:
        values = {**SLIDERS, "pose": "template", "template": name}
        url = one.page.evaluate(
            "([rig, values, width, height]) => { const canvas = Object.assign(document.createElement('canvas'),"
            " {width, height}); facesnapDrawPose(canvas, rig, values, width, height); return canvas.toDataURL(); }",
            [for_browser(RIG), values, WIDTH, HEIGHT],
        )
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"), float)
        unit = Unit(pose="template", template=name)
        landmarks = pose_landmarks(RIG, pose_from_unit(unit, WIDTH, HEIGHT), WIDTH, HEIGHT)
        drawn = draw(landmarks, WIDTH, HEIGHT).astype(float)
        lit = drawn.max(2) > 0
        assert np.abs(shown - drawn)[lit].mean() < 12, "browsers antialias differently"
        assert np.abs(shown - drawn)[~lit].mean() < 0.1


def test_the_canvas_follows_a_slider_in_the_next_frame_without_a_request(page):
    one = page()
    requests = []
    one.page.on("request", lambda request: requests.append(request.url))
    followed, work = one.page.evaluate(
        """async () => {
            const slider = document.getElementById("yaw"), work = [];
            slider.addEventListener("input", () => {
                preview.set({values: {...preview.values(), yaw: Number(slider.value)}});
            });
            let followed = 0;
            for (let yaw = -70; yaw <= 70; yaw += 10) {
                const before = preview.canvas.toDataURL();
                slider.value = yaw;
                // a frame's callbacks run in order: one before the preview's and one after it
                const first = new Promise(done => requestAnimationFrame(() => done(performance.now())));
                slider.dispatchEvent(new Event("input"));
                const last = new Promise(done => requestAnimationFrame(() => done(performance.now())));
                work.push(await last - await first);
                followed += preview.canvas.toDataURL() !== before;
            }
            return [followed, work];
        }"""
    )
    assert followed == 15
    assert sorted(work)[7] < 50 - 1000 / 60, "in milliseconds, which leaves one frame of waiting"
    assert [url for url in requests if not url.startswith("data:")] == []


def test_dragging_moves_the_face_with_the_pointer(page):
    one = page()
    before = one.points()
    one.drag((200, 400), (264, 349))
    np.testing.assert_allclose(one.points() - (64, -51), before, atol=1e-6)
    changes = one.changes()
    assert [event["done"] for event in changes] == [False] * 4 + [True]
    assert changes[-1]["changed"] == pytest.approx({"x": 0.6, "y": 0.45 - 51 / 512})
    np.testing.assert_allclose(one.points(), expected(changes[-1]["changed"]), atol=1e-3)


def test_a_dragged_corner_resizes_the_face_and_stays_under_the_pointer(page):
    one = page()
    points = one.points()
    corner, middle = points.max(0), (points.min(0) + points.max(0)) / 2
    target = middle + 1.5 * (corner - middle)
    one.drag(corner, target)
    assert list(one.changes()[-1]["changed"]) == ["size"]
    np.testing.assert_allclose(one.points().max(0), target, atol=0.1)


def test_shift_and_the_nose_turn_the_face_and_the_circle_above_tilts_it(page):
    one = page()
    one.drag((150, 400), (210, 430), shift=True)
    values = one.values()
    face = 0.45 * 512
    assert (values["yaw"], values["pitch"]) == pytest.approx((90 * 60 / face, 90 * 30 / face))
    nose = one.points()[30]
    one.drag(nose, nose - (60, 30))
    values = one.values()
    assert (values["yaw"], values["pitch"]) == pytest.approx((0, 0), abs=0.5)
    points = one.points()
    middle = (points.min(0) + points.max(0)) / 2
    circle = np.array([middle[0], points[:, 1].min() - 25])
    arm = middle[1] - circle[1]
    one.drag(circle, middle + arm * np.array([np.sin(0.3), -np.cos(0.3)]))
    assert one.values()["roll"] == pytest.approx(np.degrees(0.3), abs=0.5)


def test_turning_a_template_switches_to_sliders_without_a_jump(page):
    one = page({"pose": "template", "template": "tilted"})
    before = one.points()
    one.drag((100, 450), (101, 450), shift=True, steps=1)
    changed = one.changes()[-1]["changed"]
    assert changed["pose"] == "sliders"
    assert changed["roll"] == 18
    assert np.abs(one.points() - before).max() < 3


def test_keys_and_wheel_change_the_pose_while_the_canvas_has_the_focus(page):
    one = page()
    one.page.mouse.move(300, 300)
    one.page.mouse.wheel(0, 100)
    one.settle()
    assert one.values()["size"] is None, "without the focus, the wheel scrolls the page"
    one.page.evaluate("window.scrollTo(0, 0)")
    one.focus()
    one.page.keyboard.press("ArrowRight")
    one.page.keyboard.press("Shift+ArrowDown")
    one.page.keyboard.press("+")
    values = one.values()
    assert (values["x"], values["pitch"], values["size"]) == pytest.approx((0.51, 3, 0.45 * 1.05))
    one.page.mouse.move(300, 300)
    one.page.mouse.wheel(0, -100)
    one.page.wait_for_function(f"preview.values().size > {values['size']}")
    assert one.page.evaluate("window.scrollY") == 0
    announcement = one.page.locator("[aria-live]").inner_text()
    assert announcement.startswith("Face height 0.5")
    one.page.keyboard.press("Tab")
    assert one.page.evaluate("document.activeElement.id") == "yaw", "the canvas does not trap the focus"
    assert "Arrow keys" in one.page.locator("canvas").get_attribute("aria-label")


def test_escape_cancels_a_drag(page):
    one = page({"x": 0.4})
    before = one.points()
    one.page.mouse.move(100, 450)
    one.page.mouse.down()
    one.page.mouse.move(200, 400)
    assert np.abs(one.points() - before).max() > 50
    one.page.keyboard.press("Escape")
    one.page.mouse.move(300, 300)
    one.page.mouse.up()
    np.testing.assert_array_equal(one.points(), before)
    assert one.changes()[-1]["changed"]["x"] == 0.4


def test_a_photos_points_can_be_moved_but_not_turned(page):
    points = (expected({"yaw": 30}) / (WIDTH, HEIGHT)).tolist()
    one = page({"pose": "photo"}, points=points)
    one.drag((100, 450), (164, 450), shift=True)
    values = one.values()
    box = np.array(points)
    assert values["x"] == pytest.approx((box[:, 0].min() + box[:, 0].max()) / 2 + 0.1, abs=1e-6)
    assert (values["yaw"], values["pose"], values["size"]) == (0, "photo", None)


def test_the_canvas_has_the_shape_of_the_image_and_stays_empty_without_a_rig(page):
    one = page(width=512, height=1024)
    box = one.page.locator("canvas").bounding_box()
    assert box["height"] / box["width"] == pytest.approx(2, abs=0.02)
    assert box["height"] <= 30 * 18 + 1, "no taller than 30 rem"
    one.page.evaluate("preview.set({rig: null}); document.body.offsetWidth")
    one.settle()
    assert not one.page.evaluate(
        "preview.canvas.getContext('2d').getImageData(0, 0, preview.canvas.width, preview.canvas.height)"
        ".data.some((value, i) => i % 4 < 3 && value)"
    )
    one.drag((50, 50), (80, 80))
    assert one.changes() == []
    one.page.evaluate("preview.destroy()")
    assert one.page.locator("#root *").count() == 0


def test_a_finger_scrolls_the_page_except_on_the_face(browser):
    """On a phone the canvas fills the width. A finger beside the face scrolls, and one on the face moves it."""
    one = Page(browser, {**SLIDERS}, touch=True)
    face = one.points().mean(0)
    for (x, y), scrolls in (((20.0, 440.0), True), (face, False)):
        before = one.values()
        one.swipe(x, y, -120)
        assert (one.page.evaluate("scrollY") > 50) == scrolls
        assert (one.values() == before) == scrolls
        one.page.evaluate(  # a swipe may go on after its end
            """async () => {
                for (let calm = 0; calm < 10; calm = scrollY ? 0 : calm + 1) {
                    scrollTo(0, 0);
                    await new Promise(requestAnimationFrame);
                }
            }"""
        )
        one.settle()
    one.page.close()
    assert one.errors == []
