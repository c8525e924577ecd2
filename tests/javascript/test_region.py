"""Painting a mask on the canvas in a browser, and the image that the job receives."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facesnap_ext.settings.script_args import from_script_args
from facesnap_ext.settings.unit import Unit

NAMES = ("facesnap_canvas.js", "facesnap_pose.js", "facesnap_region.js")
SCRIPTS = [Path(__file__).parents[2] / "javascript" / name for name in NAMES]
WIDTH, HEIGHT = 640, 320  # size of the output image, whose pixels are CSS pixels
WHOLE = [0, 0, 1, 1]


class Canvas:
    """The canvas without a pose, with a person's region and its tools."""

    def __init__(self, browser, window: list[float]):
        self.page = browser.new_page(viewport={"width": 900, "height": 700})
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.set_content('<body style="margin: 0"><div id="root" style="width: 640px"></div>')
        for script in SCRIPTS:
            self.page.add_script_tag(content=script.read_text(encoding="utf-8"))
        self.page.evaluate(
            """frame => {
                window.region = facesnapRegion();
                const redraw = () => window.preview && preview.set({brush: tools.brush()});
                window.tools = facesnapTools(region, url => { window.mask = url; }, redraw);
                tools.setFrame(frame);
                const overlay = context => region.draw(context, "rgb(255,0,0)", 0.5, frame, 7);
                const values = {pose: "own", x: null, y: null, size: null};
                const root = document.getElementById("root");
                window.preview = facesnapAttach(root, {...frame, values, overlay, brush: tools.brush()});
                root.append(tools.element);
            }""",
            {"width": WIDTH, "height": HEIGHT, "window": window},
        )
        self.settle()

    def settle(self) -> None:
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def drag(self, *points: tuple[float, float]) -> None:
        self.page.mouse.move(*points[0])
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*point)
        self.page.mouse.up()
        self.settle()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def brush(self, percent: int) -> None:
        self.page.get_by_label("Brush size").fill(str(percent))

    def mask(self) -> np.ndarray | None:
        """The mask that the job gets, [S, S, 3]; None if nothing is painted."""
        url = self.page.evaluate("window.mask")
        (unit,) = from_script_args([{"mask": url}]).values()
        return None if unit.mask is None else unit.mask.pixels

    def shown(self) -> np.ndarray:
        """The canvas, [H, W, 3]."""
        url = self.page.evaluate("preview.canvas.toDataURL()")
        image = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")
        return np.asarray(image.resize((WIDTH, HEIGHT)))


@pytest.fixture
def canvas(browser):
    opened = []

    def make(window: list[float] = WHOLE) -> Canvas:
        opened.append(Canvas(browser, window))
        return opened[-1]

    yield make
    for one in opened:
        one.page.close()
        assert one.errors == []


def stroke(start: tuple, end: tuple, width: float, window: list[float], side: int = 512) -> np.ndarray:
    """The cells that a round brush covers, [side, side] bool. Lengths are in pixels of the output."""
    left, top, w, h = window
    cells = (np.arange(side) + 0.5) / side
    x, y = np.meshgrid((cells - left) / w * WIDTH, (cells - top) / h * HEIGHT)
    start, along = np.array(start, float), np.subtract(end, start)
    part = np.clip(((x - start[0]) * along[0] + (y - start[1]) * along[1]) / (along @ along), 0, 1)
    return np.hypot(x - start[0] - part * along[0], y - start[1] - part * along[1]) < width / 2


@pytest.mark.parametrize("window", [WHOLE, [0.25, 0, 0.5, 1], [0, -0.5, 1, 2]], ids=["whole", "cropped", "padded"])
def test_a_stroke_is_white_on_black_where_the_pointer_was(canvas, window) -> None:
    one = canvas(window)
    one.brush(25)
    one.drag((200, 120), (400, 200))
    mask = one.mask()
    expected = stroke((200, 120), (400, 200), 0.25 * HEIGHT, window)
    assert (mask.min(2) == mask.max(2)).all()
    assert ((mask[..., 0] > 127) != expected).mean() < 0.002, "except on the edge"
    assert set(np.unique(mask[..., 0][np.roll(expected, 40, 0) & expected & np.roll(expected, -40, 0)])) <= {255}
    shown = one.shown()
    assert shown[125, 215].tolist() == pytest.approx([128, 0, 0], abs=2), "translucent"
    assert shown[20, 20].max() == 0


def test_strokes_can_be_erased_undone_and_cleared(canvas) -> None:
    one = canvas()
    one.drag((100, 160), (500, 160))
    whole = one.mask()
    one.press("Erase")
    one.drag((300, 60), (300, 260))
    cut = one.mask()
    assert whole[256, 240, 0] == 255
    assert cut[256, 240, 0] == 0
    assert cut[256, 120, 0] == cut[256, 360, 0] == 255
    one.press("Undo")
    np.testing.assert_array_equal(one.mask(), whole)
    one.press("Clear")
    assert one.mask() is None
    one.press("Undo")
    np.testing.assert_array_equal(one.mask(), whole)
    one.press("Undo")
    assert one.mask() is None
    assert one.page.get_by_role("button", name="Undo").is_disabled()


def test_a_click_paints_a_dot_and_escape_cancels_a_stroke(canvas) -> None:
    one = canvas()
    one.drag((320, 160))
    assert one.mask()[256, 256, 0] == 255
    dot = one.mask()
    one.page.mouse.move(100, 100)
    one.page.mouse.down()
    one.page.mouse.move(200, 100)
    one.page.keyboard.press("Escape")
    one.page.mouse.move(300, 100)
    one.page.mouse.up()
    np.testing.assert_array_equal(one.mask(), dot)


def test_a_loaded_image_is_flattened_onto_black_and_can_be_painted_on(canvas) -> None:
    image = np.zeros((64, 128, 4), np.uint8)
    image[:, :32] = (255, 255, 255, 255)
    image[:, 32:64] = (255, 255, 255, 0)  # transparent
    image[:, 64:96] = (128, 128, 128, 255)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    one = canvas()
    chosen = {"name": "region.png", "mimeType": "image/png", "buffer": buffer.getvalue()}
    one.page.locator("input[type=file]").set_input_files(chosen)
    one.page.wait_for_function("window.mask")
    assert one.mask()[256, [64, 192, 320, 448], 0].tolist() == pytest.approx([255, 0, 128, 0], abs=1)
    one.drag((560, 160), (561, 160))
    assert one.mask()[256, [192, 448], 0].tolist() == [0, 255]
    broken = {"name": "notes.png", "mimeType": "image/png", "buffer": b"not an image"}
    one.page.locator("input[type=file]").set_input_files(broken)
    one.page.get_by_role("alert").filter(has_text="cannot be read as an image; use a PNG").wait_for()
    assert one.mask()[256, 448, 0] == 255, "the mask is kept"


def test_the_size_of_the_mask_is_bounded(canvas) -> None:
    one = canvas()
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)).save(noise, "PNG")
    chosen = {"name": "noise.png", "mimeType": "image/png", "buffer": noise.getvalue()}
    one.page.locator("input[type=file]").set_input_files(chosen)
    one.page.wait_for_function("window.mask")
    assert len(one.page.evaluate("window.mask")) < 1.5e6
    assert one.mask().shape == (512, 512, 3)


def test_the_tools_are_labelled_and_the_active_one_is_pressed(canvas) -> None:
    one = canvas()
    pressed = {
        name: one.page.get_by_role("button", name=name, exact=True).get_attribute("aria-pressed")
        for name in ("Paint", "Erase", "Move the face")
    }
    assert pressed == {"Paint": "true", "Erase": "false", "Move the face": "false"}
    one.press("Move the face")
    one.drag((100, 160), (500, 160))
    assert one.page.evaluate("window.mask") is None, "this tool does not paint"
    assert one.page.get_by_role("toolbar", name="Region").count() == 1


def test_a_regions_number_is_in_its_middle(canvas) -> None:
    one = canvas()
    one.drag((100, 160), (540, 160))
    data = "[...Array(16).keys()].flatMap(i => [0, 0, 0, i === 6 ? 255 : 0])"
    assert one.page.evaluate(f"facesnapMiddle({data}, 4)") == [2.5 / 4, 1.5 / 4]
    assert one.page.evaluate("facesnapMiddle([0, 0, 0, 0], 1)") is None
    middle = one.shown()[150:171, 310:331]
    assert middle[..., 0].max() > 200, "the number"


def test_an_empty_mask_is_ignored() -> None:
    assert from_script_args([{"mask": ""}])[1] == Unit(True)
