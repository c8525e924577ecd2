"""The txt2img tab of a WebUI's page in a browser, used as people use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.live.live_host import Host, decode, picture_file

SECOND = 1000  # Playwright counts milliseconds
FACESNAP = "#script_txt2img_facesnap_"


class Page:
    """A page of its own in a browser, at 256x256 and three steps."""

    def __init__(self, host: Host, browser: Any, screenshots: Path):
        self.host = host
        self.screenshots = screenshots
        self.errors: list[str] = []  # JavaScript's, with the scripts that they came through
        self._page = browser.new_page(viewport={"width": 1400, "height": 1800})
        self._page.on("pageerror", lambda error: self.errors.append(error.stack or str(error)))
        self._page.goto(host.url, timeout=180 * SECOND, wait_until="domcontentloaded")
        # made by the host's own script, once the page is whole
        self._page.wait_for_selector(f"{FACESNAP}enable-visible-checkbox", timeout=180 * SECOND)
        self._page.locator("#txt2img_prompt textarea").fill("a photo of a red house")
        for name, value in {"steps": 3, "width": 256, "height": 256}.items():
            self._number(f"#txt2img_{name} input[type=number]", value)
        self._number("#txt2img_seed input", 1)

    def close(self) -> None:
        self._page.close()

    def open_accordion(self) -> None:
        """Which also enables FaceSnap."""
        self._page.locator(f"{FACESNAP}enable .label-wrap .icon").first.click()
        self._page.wait_for_timeout(SECOND)  # the accordion moves
        assert self._page.locator(f"{FACESNAP}enable-visible-checkbox").is_checked()

    def disable(self) -> None:
        self._page.locator(f"{FACESNAP}enable-visible-checkbox").uncheck()

    def choose_model(self, name: str) -> None:
        entry = self._page.locator(f"{FACESNAP}model input")
        if not entry.is_visible():
            self._page.locator(f"{FACESNAP}advanced .label-wrap").click()
        entry.click()
        self._page.locator(f"{FACESNAP}model ul li", has_text=name).first.click()
        self._page.wait_for_timeout(SECOND // 2)

    def choose_pose(self, pose: str) -> None:
        self._page.locator(f"{FACESNAP}pose input[value={pose}]").click()
        self._page.locator(f"{FACESNAP}canvas canvas").wait_for(timeout=60 * SECOND)

    def drag_face(self, right: float, down: float) -> None:
        """From the middle of the sliders' face, by parts of the canvas."""
        canvas = self._page.locator(f"{FACESNAP}canvas canvas")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        x, y = box["x"] + 0.5 * box["width"], box["y"] + 0.55 * box["height"]
        self._page.mouse.move(x, y)
        self._page.mouse.down()
        self._page.mouse.move(x + right * box["width"], y + down * box["height"], steps=5)
        self._page.mouse.up()
        self._page.wait_for_timeout(SECOND)

    def numbers(self, *controls: str) -> list[float]:
        """What sliders say."""
        return [float(self._page.locator(f"{FACESNAP}{name} input[type=number]").input_value()) for name in controls]

    def clear(self, control: str) -> None:
        """Take the pictures out again."""
        self._page.locator(f"{FACESNAP}{control} button[aria-label=Clear]").click()

    def upload(self, control: str, *pictures: np.ndarray | bytes) -> None:
        """Give pictures, or contents of a picture file, to one of FaceSnap's controls."""
        contents = [picture if isinstance(picture, bytes) else picture_file(picture) for picture in pictures]
        files = [{"name": f"photo{i}.png", "mimeType": "image/png", "buffer": c} for i, c in enumerate(contents)]
        block = self._page.locator(f"{FACESNAP}{control}")
        block.locator("input[type=file]").set_input_files(files)
        block.locator("img, table, .file-preview").first.wait_for(timeout=60 * SECOND)

    def screenshot(self, name: str, element: str | None = None) -> None:
        self.screenshots.mkdir(parents=True, exist_ok=True)
        path = str(self.screenshots / f"{self.host.name}-{name}.png")
        if element is None:
            self._page.screenshot(path=path, full_page=True)
        else:
            self._page.locator(element).screenshot(path=path)

    def generate(self) -> np.ndarray | str:
        """Press Generate and wait. The gallery's picture, or the error that stands in the page."""
        self._page.locator("#txt2img_generate").click()
        display = "getComputedStyle(document.querySelector('#txt2img_interrupt')).display"
        self._page.wait_for_function(f"{display} != 'none'", timeout=60 * SECOND)
        self._page.wait_for_function(f"{display} == 'none'", timeout=600 * SECOND)
        self._page.wait_for_function("!document.querySelector('#html_log_txt2img .pending')", timeout=60 * SECOND)
        self._page.wait_for_timeout(SECOND)
        error = self._page.locator("#html_log_txt2img .error")
        if error.count():
            return error.inner_text()
        source = self._page.locator("#txt2img_gallery img").first.evaluate("image => image.src")
        return decode(self._page.request.get(source).body())

    def note(self) -> str:
        """What stands below the picture."""
        return self._page.locator("#html_log_txt2img").inner_text()

    def _number(self, selector: str, value: int) -> None:
        entry = self._page.locator(selector)
        entry.fill(str(value))
        entry.press("Tab")
