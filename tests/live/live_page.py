"""Drive the txt2img tab of a WebUI's page in a browser as a user does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.live.live_host import Host, decode, image_file

SECOND = 1000  # Playwright uses milliseconds
FACESNAP = "#script_txt2img_facesnap_"


class Page:
    """A new browser page, set to 256x256 and three steps."""

    def __init__(self, host: Host, browser: Any, screenshots: Path):
        self.host = host
        self.screenshots = screenshots
        self.errors: list[str] = []  # JavaScript errors with their stack traces
        self._page = browser.new_page(viewport={"width": 1400, "height": 1800})
        self._page.on("pageerror", lambda error: self.errors.append(error.stack or str(error)))
        self._page.goto(host.url, timeout=180 * SECOND, wait_until="domcontentloaded")
        # created by the host's own script after the page has been loaded
        self._page.wait_for_selector(f"{FACESNAP}enable-visible-checkbox", timeout=180 * SECOND)
        self._page.locator("#txt2img_prompt textarea").fill("a photo of a red house")
        self._set_up({"steps": 3, "width": 256, "height": 256})
        self._number("#txt2img_seed input", 1)

    def _set_up(self, values: dict[str, int]) -> None:
        """Set numbers, again if the page replaces them: Forge Neo loads the values of a preset after the page."""
        selectors = {name: f"#txt2img_{name} input[type=number]" for name in values}
        for _attempt in range(5):
            for name, value in values.items():
                self._number(selectors[name], value)
            self._page.wait_for_timeout(2 * SECOND)
            if all(self._page.locator(selectors[name]).input_value() == str(value) for name, value in values.items()):
                return
        raise TimeoutError(f"the page does not keep {values}")

    def close(self) -> None:
        self._page.close()

    def open_accordion(self) -> None:
        """Open the accordion, which also enables FaceSnap."""
        self._page.locator(f"{FACESNAP}enable .label-wrap .icon").first.click()
        self._page.wait_for_timeout(SECOND)  # for the animation
        assert self._page.locator(f"{FACESNAP}enable-visible-checkbox").is_checked()

    def disable(self) -> None:
        self._page.locator(f"{FACESNAP}enable-visible-checkbox").uncheck()

    def starter(self) -> str | None:
        """The label of the button that downloads what is missing, or None."""
        button = self._page.locator(f"{FACESNAP}enable .facesnap-primary")
        return button.first.inner_text() if button.count() else None

    def download_starter(self) -> None:
        self._page.locator(f"{FACESNAP}enable .facesnap-primary").first.click()
        self.wait_until_complete()

    def wait_until_complete(self) -> None:
        """Wait until the accordion lists InstantID among the model files."""
        self._page.locator(f"{FACESNAP}status").filter(has_text="InstantID").first.wait_for(timeout=300 * SECOND)
        assert self.starter() is None

    def send_to_img2img(self) -> None:
        """Send the image to img2img with the host's button, and wait for FaceSnap's offer."""
        buttons = self._page.locator("#txt2img_send_to_img2img, #txt2img_results button[id$=img2img_tab]")
        buttons.locator("visible=true").first.click()
        self._page.locator(".facesnap-carry-over button").wait_for(timeout=60 * SECOND)

    def carry_over(self) -> tuple[float, str, list[str]]:
        """Accept the offer, and return weight, pose and the photos' names in img2img."""
        self._page.locator(".facesnap-carry-over button").click()
        there = FACESNAP.replace("txt2img", "img2img")
        names = self._page.locator(f"{there}seen .facesnap-name")
        names.first.wait_for(timeout=60 * SECOND)
        weight = self._page.locator(f"{there}weight input[type=number]").input_value()
        pose = self._page.locator(f"{there}pose input:checked").get_attribute("value")
        return float(weight), pose, names.all_inner_texts()

    def img2img_enabled(self) -> bool:
        there = FACESNAP.replace("txt2img", "img2img")
        return self._page.locator(f"{there}enable-visible-checkbox").is_checked()

    def choose_model(self, name: str) -> None:
        self._open_advanced()
        self._page.locator(f"{FACESNAP}model select").select_option(name)
        self._page.wait_for_timeout(SECOND // 2)

    def _open_advanced(self) -> None:
        self._page.locator(f"{FACESNAP}advanced").evaluate("part => { part.open = true; }")

    def choose_pose(self, pose: str) -> None:
        self._page.locator(f"{FACESNAP}pose input[value={pose}]").check()
        self._page.locator(f"{FACESNAP}canvas canvas").wait_for(timeout=60 * SECOND)

    def choose_named_expression(self, name: str) -> None:
        self._page.locator(f"{FACESNAP}expression_source input[value=custom]").click()
        self._page.locator(f"{FACESNAP}expression input[value={name}]").click()

    def set_slider(self, name: str, value: float) -> None:
        self._number(f"{FACESNAP}{name} input[type=number]", value)

    def save_pose(self, name: str) -> str:
        """Save the pose and return the report."""
        self._open_advanced()
        self._page.locator(f"{FACESNAP}pose_name :is(input, textarea)").fill(name)
        self._page.locator(f"{FACESNAP}save_pose").click()
        return self._report("Saved as")

    def delete_pose(self) -> str:
        """Delete the chosen saved pose and return the report."""
        self._page.locator(f"{FACESNAP}delete_pose").click()
        return self._report("Deleted")

    def _report(self, text: str) -> str:
        report = self._page.locator(f"{FACESNAP}pose_report").filter(has_text=text).first
        report.wait_for(timeout=60 * SECOND)
        return report.inner_text()

    def drag_face(self, right: float, down: float) -> None:
        """Drag the face from its initial position. Distances are fractions of the canvas."""
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
        """The values of sliders."""
        return [float(self._page.locator(f"{FACESNAP}{name} input[type=number]").input_value()) for name in controls]

    def clear(self, control: str) -> None:
        """Remove the images from a control."""
        button = self._page.locator(f"{FACESNAP}{control} button[aria-label=Clear]")
        button.dispatch_event("click")  # it is hidden while the cards of photos are shown

    def upload(self, control: str, *images: np.ndarray | bytes) -> None:
        """Upload images, or contents of image files, to one of FaceSnap's controls."""
        contents = [image if isinstance(image, bytes) else image_file(image) for image in images]
        files = [{"name": f"photo{i}.png", "mimeType": "image/png", "buffer": c} for i, c in enumerate(contents)]
        block = self._page.locator(f"{FACESNAP}{control}")
        if control == "driving" and not block.is_visible():
            self._page.locator(f"{FACESNAP}driving_part .label-wrap").click()
        block.locator("input[type=file]").set_input_files(files)
        if control.startswith("references"):
            cards = self._page.locator(f"{FACESNAP}{control.replace('references', 'seen')} .facesnap-card")
            cards.nth(len(files) - 1).wait_for(timeout=60 * SECOND)
        else:
            block.locator("img").first.wait_for(timeout=60 * SECOND)

    def screenshot(self, name: str, element: str | None = None) -> None:
        self.screenshots.mkdir(parents=True, exist_ok=True)
        path = str(self.screenshots / f"{self.host.name}-{name}.png")
        if element is None:
            self._page.screenshot(path=path, full_page=True)
        else:
            self._page.locator(element).screenshot(path=path)

    def generate(self) -> np.ndarray | str:
        """Run a job and return the image in the gallery, or the sentence that the page shows in its place."""
        self._page.locator("#txt2img_generate").click()
        display = "getComputedStyle(document.querySelector('#txt2img_interrupt')).display"
        self._page.wait_for_function(f"{display} != 'none'", timeout=60 * SECOND)
        self._page.wait_for_function(f"{display} == 'none'", timeout=600 * SECOND)
        self._page.wait_for_function("!document.querySelector('#html_log_txt2img .pending')", timeout=60 * SECOND)
        self._page.wait_for_timeout(SECOND)
        error = self._page.locator("#html_log_txt2img .error")
        if error.count():
            return error.inner_text()
        image = self._page.locator("#txt2img_gallery img").first
        if not image.count():  # where the page hides exceptions, a refused job ends without images
            return self.note()
        source = image.evaluate("image => image.src")
        return decode(self._page.request.get(source).body())

    def note(self) -> str:
        """The text below the image."""
        # gradio 3 gives the id to an element and to the one around it
        return self._page.locator("#html_log_txt2img").last.inner_text()

    def _number(self, selector: str, value: float) -> None:
        entry = self._page.locator(selector)
        entry.fill(str(value))
        entry.press("Tab")
