"""The page of `page_server.py` in a browser, used as people use it; controls are named by the ends of their ids."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

VERSIONS = ("3.41.2", "4.40.0")  # A1111's and Forge's gradio; `make` puts each into a folder of the environment
ROOT = Path(__file__).parents[2]
FACESNAP = "#script_txt2img_facesnap_"
SECOND = 1000  # Playwright counts milliseconds
PATIENCE = 60 * SECOND  # on a busy machine; the first job loads every network
# what a host's own script offers; it calls back once all scripts are there
HOST_SCRIPT = "const gradioApp = () => document, whenLoaded = [], onUiLoaded = run => whenLoaded.push(run);"
ROLES = {"application", "button", "checkbox", "combobox", "listbox", "radio", "slider", "spinbutton", "tab", "textbox"}


def picture_file(pixels: np.ndarray) -> bytes:
    """[H,W,3] uint8 as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Page:
    """A page of its own, with FaceSnap's scripts and style as a host loads them."""

    def __init__(self, url: str, browser: Any):
        self.errors: list[str] = []  # of the console and of scripts
        self.page = browser.new_page(viewport={"width": 1300, "height": 1600})
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.errors.append(error.stack or str(error)))
        self.page.on("console", self._console)
        # fonts and analytics: the tests want no network
        self.page.route(lambda address: not address.startswith(url), lambda route: route.fulfill(status=200, body=""))
        self.page.goto(url, wait_until="domcontentloaded")
        self.at("enable", "input").wait_for()
        self.page.add_script_tag(content=HOST_SCRIPT)
        for script in sorted((ROOT / "javascript").glob("*.js")):
            self.page.add_script_tag(content=script.read_text(encoding="utf-8"))
        self.page.evaluate("whenLoaded.forEach(run => run())")
        self.page.add_style_tag(content=(ROOT / "style.css").read_text(encoding="utf-8"))

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} {message.location.get('url', '')}")

    def close(self) -> None:
        self.page.close()

    def at(self, control: str, part: str = "") -> Any:
        """A part of one of FaceSnap's controls, by a selector of CSS."""
        return self.page.locator(f"{FACESNAP}{control} {part}").first

    # ---- people's hands

    def enable(self, on: bool = True) -> None:
        """Which also opens the accordion."""
        self.at("enable", "input").set_checked(on)
        if on:
            self.at("status").wait_for()

    def open(self, *accordions: str) -> None:
        for name in accordions:
            self.at(name, ".label-wrap").click()

    def person(self, number: int) -> None:
        """Go to a person's tab."""
        name = f"Person {number}"  # one version of gradio gives its tabs no role
        self.page.get_by_role("tab", name=name).or_(self.page.get_by_role("button", name=name)).first.click()
        self.at(f"enable_{number}" if number > 1 else "references").wait_for()

    def number(self, control: str, value: float) -> None:
        self._fill(self.at(control, "input[type=number]"), value)

    def side(self, name: str, value: int) -> None:
        """Width or height of the picture."""
        self._fill(self.page.locator(f"#txt2img_{name} input[type=number]"), value)

    def _fill(self, entry: Any, value: float) -> None:
        entry.fill(str(value))
        entry.press("Tab")

    def text(self, control: str, value: str) -> None:
        self.at(control, "input, textarea").fill(value)

    def tick(self, control: str) -> None:
        self.at(control, "input[type=checkbox]").check()

    def choose(self, control: str, value: str) -> None:
        """Of a list that opens, or of buttons."""
        button = self.at(control, f"input[type=radio][value='{value}']")
        if button.count():
            button.check()
        else:
            self.at(control, "input").click()
            self.at(control, "ul li").filter(has_text=value).click()

    def upload(self, control: str, *pictures: np.ndarray) -> None:
        """Waits until the page has said what it sees in reference photos."""
        self.give(control, *pictures)
        self.says(control.replace("references", "report"), "Reference photo 1")

    def give(self, control: str, *pictures: np.ndarray) -> None:
        files = [
            {"name": f"photo{i}.png", "mimeType": "image/png", "buffer": picture_file(picture)}
            for i, picture in enumerate(pictures)
        ]
        self.at(control, "input[type=file]").set_input_files(files)

    def clear(self, control: str) -> None:
        self.at(control, "button[aria-label=Clear]").click()

    def press(self, button: str) -> None:
        self.at(button).click()

    def generate(self) -> np.ndarray | str:
        """The picture that stands in the page, or the error that does."""
        job = self._job()
        self.page.locator("#txt2img_generate").click()
        self._until("job => (document.querySelector('.job')?.textContent ?? '') !== job", job)
        error = self.page.locator("#html_log_txt2img .error")
        if error.count():
            return error.inner_text()
        source = self.page.locator("#txt2img_gallery img").get_attribute("src")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))

    def _job(self) -> str:
        job = self.page.locator(".job")
        return job.inner_text() if job.count() else ""

    def infotext(self) -> str:
        return self.page.locator("#txt2img_infotext textarea").input_value()

    def paste(self, infotext: str) -> None:
        self.page.locator("#txt2img_prompt textarea").fill(infotext)
        self.page.locator("#paste").click()

    # ---- people's eyes

    def says(self, control: str, words: str) -> str:
        """The text of a control, as soon as the words are in it."""
        self.at(control).filter(has_text=words).wait_for()
        return self.at(control).inner_text()

    def value(self, control: str) -> str:
        """Of a text, a list or the buttons."""
        chosen = self.at(control, "input:checked")
        return (chosen if chosen.count() else self.at(control, "input, textarea")).input_value()

    def numbers(self, *controls: str) -> list[float]:
        """What sliders say."""
        return [float(self.at(name, "input[type=number]").input_value()) for name in controls]

    def becomes(self, controls: Sequence[str], values: Sequence[float], tolerance: float = 0.011) -> None:
        """Wait until sliders say that."""
        selectors = [f"{FACESNAP}{name} input[type=number]" for name in controls]
        self._until(
            "([selectors, values, tolerance]) => selectors.every((selector, i) =>"
            " Math.abs(document.querySelector(selector).value - values[i]) <= tolerance)",
            [selectors, list(values), tolerance],
        )

    def thumbnails(self) -> list[np.ndarray]:
        """The gallery's pictures [H,W,3] uint8, of the first person's photos."""
        self.at("seen", "img").wait_for()
        sources = self.page.locator(f"{FACESNAP}seen img").evaluate_all("all => [...new Set(all.map(one => one.src))]")
        pictures = [Image.open(io.BytesIO(self.page.request.get(source).body())) for source in sources]
        return [np.asarray(picture.convert("RGB")) for picture in pictures]

    def canvas(self) -> Any:
        """The pose's, once it is drawn."""
        canvas = self.at("canvas", "canvas")
        canvas.wait_for()
        canvas.scroll_into_view_if_needed()
        self._until(f"() => {drawn()}")
        return canvas

    def drag(self, right: float, down: float, start: tuple[float, float] = (0.5, 0.55)) -> None:
        """On the canvas, by parts of its sides."""
        box = self.canvas().bounding_box()
        x, y = box["x"] + start[0] * box["width"], box["y"] + start[1] * box["height"]
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + right * box["width"], y + down * box["height"], steps=5)
        self.page.mouse.up()

    def focus_by_tab(self, start: str, goal: str, most: int = 12) -> None:
        """From one control to another's part with the keyboard alone."""
        self.at(start, "input").focus()
        for _ in range(most):
            self.page.keyboard.press("Tab")
            if self.page.evaluate("goal => document.activeElement.matches(goal)", goal):
                return
        raise AssertionError(f"{goal} is not among the next {most} stops after {start}")

    def delays(self, control: str, times: int) -> tuple[list[int], list[float]]:
        """Frames of the browser, and milliseconds, from each input of a slider, by an arrow key, to a canvas that has
        changed."""
        self.page.evaluate(
            """([range, canvas]) => {
                window.delays = {frames: [], milliseconds: []};
                document.querySelector(range).addEventListener("input", () => {
                    const drawing = document.querySelector(canvas);
                    const begun = performance.now(), before = drawing.toDataURL();
                    let frames = 0;
                    const look = () => {
                        frames += 1;
                        if (drawing.toDataURL() === before) return requestAnimationFrame(look);
                        window.delays.milliseconds.push(performance.now() - begun);
                        window.delays.frames.push(frames);
                    };
                    requestAnimationFrame(look);
                }, true);
            }""",
            [f"{FACESNAP}{control} input[type=range]", f"{FACESNAP}canvas canvas"],
        )
        self.at(control, "input[type=range]").focus()
        for done in range(1, times + 1):
            self.page.keyboard.press("ArrowRight")
            self._until("done => window.delays.frames.length === done", done)
        found = self.page.evaluate("window.delays")
        return found["frames"], found["milliseconds"]

    def unnamed(self) -> list[str]:
        """The controls in the accordion that have no name for a screen reader: roles, and elements with attributes."""
        session = self.page.context.new_cdp_session(self.page)
        for part in ("DOM", "Accessibility"):
            session.send(f"{part}.enable")
        document = session.send("DOM.getDocument", {"depth": 0})["root"]["nodeId"]
        place = {"nodeId": document, "selector": f"{FACESNAP}enable_contents"}
        root = session.send("DOM.querySelector", place)["nodeId"]
        found = []
        for node in session.send("Accessibility.queryAXTree", {"nodeId": root})["nodes"]:
            role = node.get("role", {}).get("value")
            if not node["ignored"] and role in ROLES and not node.get("name", {}).get("value", "").strip():
                element = session.send("DOM.describeNode", {"backendNodeId": node["backendDOMNodeId"]})["node"]
                found.append(f"{role}: {element['nodeName']} {element.get('attributes')}")
        session.detach()
        return found

    def _until(self, condition: str, argument: Any = None) -> None:
        self.page.wait_for_function(condition, arg=argument, timeout=PATIENCE)


def drawn() -> str:
    """JavaScript: whether something stands on the canvas."""
    return (
        f"(canvas => canvas.width > 1 && canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)"
        f".data.some((value, i) => i % 4 < 3 && value > 100))(document.querySelector('{FACESNAP}canvas canvas'))"
    )
