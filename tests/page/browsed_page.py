"""Drive the page of `page_server.py` in a browser as a user does. Controls are named by the ends of their ids."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

VERSIONS = ("3.41.2", "4.40.0")  # gradio in A1111 and Forge; `make` installs each into a folder of the environment
# for tests of FaceSnap's own forms and canvas, of which gradio only carries the values
with_one_gradio = pytest.mark.parametrize("url", VERSIONS[-1:], indirect=True)
ROOT = Path(__file__).parents[2]
FACESNAP = "#script_txt2img_facesnap_"
SECOND = 1000  # Playwright uses milliseconds
TIMEOUT = 60 * SECOND  # long enough for a busy machine; the first job loads every network
# replaces the host's own script, which runs the callbacks after all scripts have been loaded
HOST_SCRIPT = "const gradioApp = () => document, whenLoaded = [], onUiLoaded = run => whenLoaded.push(run);"
# what the hosts do about localisation: they translate nodes whose whole text is known, now and when they are added
LOCALISATION = """
    const getTranslation = text => localization[text];
    const translate = node => {
        const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT), nodes = [];
        for (let one = walker.currentNode; one; one = walker.nextNode()) if (one.nodeType === 3) nodes.push(one);
        for (const one of nodes) {
            const translated = localization[one.textContent.trim()];
            const skipped = ["SCRIPT", "STYLE", "TEXTAREA"].includes(one.parentElement?.nodeName);
            if (translated !== undefined && !skipped && one.textContent !== translated) one.textContent = translated;
        }
        if (node.title in localization) node.title = localization[node.title];
        if (node.placeholder in localization) node.placeholder = localization[node.placeholder];
    };
    new MutationObserver(all => all.forEach(one => one.addedNodes.forEach(translate)))
        .observe(document.body, {childList: true, subtree: true});
    translate(document.body);
"""
# without a GPU, each frame of an animation is drawn by the CPU
STILL = "*, *::before, *::after {animation: none !important; transition: none !important}"
# errors of gradio: requests when a page is left, and fonts without a network
GRADIOS = ("AbortError: signal is aborted", "Unable to preload CSS for https://fonts.")
ROLES = {"application", "button", "checkbox", "combobox", "listbox", "radio", "slider", "spinbutton", "tab", "textbox"}


def png(pixels: np.ndarray) -> bytes:
    """Encode an image, [H,W,3] uint8, as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


@cache
def shared_context(browser: Any) -> Any:
    """A context in which the scripts of gradio are loaded and compiled once."""
    return browser.new_context()


class Page:
    """A new browser page with FaceSnap's scripts and style, loaded as a host loads them.

    Args:
        width: of the viewport, in pixels.
        translations: a host's localisation, as `{English: translated}`.
        options: for a browser context of the page's own, such as `locale`.
    """

    def __init__(
        self,
        url: str,
        browser: Any,
        width: int = 1300,
        translations: Mapping[str, str] | None = None,
        **options: Any,
    ):
        self.errors: list[str] = []  # from scripts and the console
        self.url = url
        self.page = (browser if options else shared_context(browser)).new_page(**options)
        self.page.set_viewport_size({"width": width, "height": 1600})
        self.page.set_default_timeout(TIMEOUT)
        self.page.on("pageerror", self._error)
        self.page.on("console", self._console)
        self.page.goto(url, wait_until="domcontentloaded")
        self.at("enable", "input").wait_for()
        self.page.add_script_tag(content=HOST_SCRIPT)
        if translations is not None:
            self.page.add_script_tag(content=f"const localization = {json.dumps(translations)}; {LOCALISATION}")
        for script in sorted((ROOT / "javascript").glob("*.js")):
            self.page.add_script_tag(content=script.read_text(encoding="utf-8"))
        self.page.evaluate("whenLoaded.forEach(run => run())")
        self.page.add_style_tag(content=(ROOT / "style.css").read_text(encoding="utf-8") + STILL)

    def _console(self, message: Any) -> None:
        address = message.location.get("url", "")
        elsewhere = address.startswith("http") and not address.startswith(self.url)  # such as gradio's fonts
        if message.type == "error" and not elsewhere:
            self._note(f"{message.text} {address}")

    def _error(self, error: Any) -> None:
        self._note(error.stack or str(error))

    def _note(self, text: str) -> None:
        if not any(known in text for known in GRADIOS):
            self.errors.append(text)

    def close(self) -> None:
        """Close the page. Requests that this aborts are not errors."""
        self.page.remove_listener("pageerror", self._error)
        self.page.remove_listener("console", self._console)
        self.page.close()

    def at(self, control: str, part: str = "") -> Any:
        """A part of one of FaceSnap's controls, given by a CSS selector."""
        return self.page.locator(f"{FACESNAP}{control} {part}").first

    # ---- actions

    def enable(self, on: bool = True) -> None:
        """Enable FaceSnap, which also opens the accordion, or disable it."""
        self.at("enable", "input").set_checked(on)
        if on:
            self.at("references").wait_for()

    def open(self, *accordions: str) -> None:
        for name in accordions:
            self.at(name, ":is(.label-wrap, summary)").click()

    def person(self, number: int) -> None:
        """Open a person's tab."""
        self.page.locator(f"{FACESNAP}enable_contents .tab-nav button").nth(number - 1).click()
        self.at(f"enable_{number}" if number > 1 else "references").wait_for()

    def reveal(self, control: str) -> None:
        """Open the closed accordions and groups around a control."""
        self.at(control).evaluate(
            """element => {
                for (let part = element; part; part = part.parentElement) {
                    const title = part.previousElementSibling;
                    if (part.tagName === "DETAILS") part.open = true;
                    if (part.style.display === "none" && title?.matches(".label-wrap")) title.click();
                }
            }"""
        )

    def number(self, control: str, value: float) -> None:
        self.reveal(control)
        self._fill(self.at(control, "input[type=number]"), value)

    def side(self, name: str, value: int) -> None:
        """Set the width or height of the image."""
        self._fill(self.page.locator(f"#txt2img_{name} input[type=number]"), value)

    def _fill(self, entry: Any, value: float) -> None:
        entry.fill(str(value))
        entry.press("Tab")

    def text(self, control: str, value: str) -> None:
        self.reveal(control)
        self.at(control, ":is(input, textarea)").fill(value)

    def tick(self, control: str) -> None:
        self.reveal(control)
        self.at(control, "input[type=checkbox]").check()

    def choose(self, control: str, value: str) -> None:
        """Choose a value of a list or of radio buttons."""
        self.reveal(control)
        button = self.at(control, f"input[type=radio][value='{value}']")
        if button.count():
            button.check()
        else:  # the server sends the names
            self.at(control, f"option[value='{value}']").wait_for(state="attached")
            self.at(control, "select").select_option(value)

    def upload(self, control: str, *images: np.ndarray) -> None:
        """Upload reference photos and wait until they have been checked."""
        self.set_files(control, *images)
        self.wait_for_text(control.replace("references", "seen"), "photo0.png")

    def set_files(self, control: str, *images: np.ndarray) -> None:
        files = [
            {"name": f"photo{i}.png", "mimeType": "image/png", "buffer": png(image)} for i, image in enumerate(images)
        ]
        self.at(control, "input[type=file]").set_input_files(files)

    def clear(self, control: str) -> None:
        self.at(control, "button[aria-label=Clear]").dispatch_event("click")  # it is hidden while cards are shown

    def press(self, button: str) -> None:
        self.reveal(button)
        self.at(button).click()

    def generate(self) -> np.ndarray | str:
        """Run a job and return its image, or the error that the page shows."""
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

    # ---- observations

    def wait_for_text(self, control: str, text: str) -> str:
        """Wait until a control contains this text, and return all of its text."""
        self.at(control).filter(has_text=text).wait_for()
        return self.at(control).inner_text()

    def value(self, control: str) -> str:
        """The value of a textbox, a list or radio buttons."""
        chosen = self.at(control, "input:checked")
        return (chosen if chosen.count() else self.at(control, ":is(input, textarea, select)")).input_value()

    def numbers(self, *controls: str) -> list[float]:
        """The values of sliders."""
        return [float(self.at(name, "input[type=number]").input_value()) for name in controls]

    def wait_for_numbers(self, controls: Sequence[str], values: Sequence[float], tolerance: float = 0.011) -> None:
        """Wait until sliders have these values."""
        selectors = [f"{FACESNAP}{name} input[type=number]" for name in controls]
        self._until(
            "([selectors, values, tolerance]) => selectors.every((selector, i) =>"
            " Math.abs(document.querySelector(selector).value - values[i]) <= tolerance)",
            [selectors, list(values), tolerance],
        )

    def thumbnails(self) -> list[np.ndarray]:
        """The previews of the first person's photos, [H,W,3] uint8 each."""
        self.at("seen", ".facesnap-picture").wait_for()
        sources = self.page.locator(f"{FACESNAP}seen .facesnap-picture").evaluate_all(
            "all => [...new Set(all.map(one => one.src))]"
        )
        images = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]
        return [np.asarray(image.convert("RGB")) for image in images]

    def canvas(self) -> Any:
        """The canvas, once something is drawn on it."""
        canvas = self.at("canvas", "canvas")
        canvas.wait_for()
        canvas.scroll_into_view_if_needed()
        self._until(f"() => {is_drawn()}")
        return canvas

    def visible_controls(self) -> set[str]:
        """The ids of the controls in the accordion that can be used without opening or choosing anything.

        A group of radio buttons is one control, as are the tabs of the people.
        """
        ids = self.page.evaluate(
            """contents => {
                const controls = "input, textarea, select, button, summary, canvas, a[href], .label-wrap";
                const block = one => one.closest("[id^=script_]");
                return [...document.querySelector(contents).querySelectorAll(controls)]
                    .map(one => one.type === "file" ? block(one) : one)
                    .filter(one => one.checkVisibility({visibilityProperty: true}) && one.getClientRects().length)
                    .map(one => one.closest(".tab-nav") ? "tabs" : (one.closest("fieldset") ?? block(one)).id);
            }""",
            f"{FACESNAP}enable_contents",
        )
        return {name.removeprefix(FACESNAP[1:]) for name in ids} - {"enable_contents"}

    def drag(self, right: float, down: float, start: tuple[float, float] = (0.5, 0.55)) -> None:
        """Drag on the canvas. Distances are fractions of its sides."""
        box = self.canvas().bounding_box()
        x, y = box["x"] + start[0] * box["width"], box["y"] + start[1] * box["height"]
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + right * box["width"], y + down * box["height"], steps=5)
        self.page.mouse.up()

    def focus_by_tab(self, start: str, goal: str, most: int = 12) -> None:
        """Move the focus from one control to another with the Tab key.

        Args:
            goal: CSS selector of the element that must receive the focus.
            most: number of key presses after which the test fails.
        """
        self.at(start, ":is(input, select)").focus()
        for _ in range(most):
            self.page.keyboard.press("Tab")
            if self.page.evaluate("goal => document.activeElement.matches(goal)", goal):
                return
        raise AssertionError(f"{goal} does not receive the focus within {most} presses of Tab after {start}")

    def delays(self, control: str, times: int) -> tuple[list[int], list[float]]:
        """The delays in frames and milliseconds from an arrow key on a slider to the new state of the canvas."""
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
        for count in range(1, times + 1):
            self.page.keyboard.press("ArrowRight")
            self._until("count => window.delays.frames.length === count", count)
        delays = self.page.evaluate("window.delays")
        return delays["frames"], delays["milliseconds"]

    def unlabelled(self) -> list[str]:
        """The controls in the accordion without an accessible name: role, element and attributes."""
        session = self.page.context.new_cdp_session(self.page)
        for part in ("DOM", "Accessibility"):
            session.send(f"{part}.enable")
        document = session.send("DOM.getDocument", {"depth": 0})["root"]["nodeId"]
        place = {"nodeId": document, "selector": f"{FACESNAP}enable_contents"}
        root = session.send("DOM.querySelector", place)["nodeId"]
        unlabelled = []
        for node in session.send("Accessibility.queryAXTree", {"nodeId": root})["nodes"]:
            role = node.get("role", {}).get("value")
            if not node["ignored"] and role in ROLES and not node.get("name", {}).get("value", "").strip():
                element = session.send("DOM.describeNode", {"backendNodeId": node["backendDOMNodeId"]})["node"]
                unlabelled.append(f"{role}: {element['nodeName']} {element.get('attributes')}")
        session.detach()
        return unlabelled

    def _until(self, condition: str, argument: Any = None) -> None:
        self.page.wait_for_function(condition, arg=argument, timeout=TIMEOUT)


def is_drawn() -> str:
    """JavaScript that evaluates to whether something is drawn on the canvas."""
    return (
        f"(canvas => canvas.width > 1 && canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)"
        f".data.some((value, i) => i % 4 < 3 && value > 100))(document.querySelector('{FACESNAP}canvas canvas'))"
    )
