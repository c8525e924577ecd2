"""Accessibility of the accordion, measured by axe-core on a page of real gradio, and use by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.page.browsed_page import FACESNAP, SECOND, Page
from tests.page.test_page import ADA, NO_FACE, photo
from tests.page.test_photos import press, wait_for_cards

CONTENTS = f"{FACESNAP}enable_contents"
GRADIOS = {  # violations in elements that gradio draws: the rule, CSS selectors, and what they are
    "aria-allowed-role": {"input[role=listbox]": "a dropdown of gradio 4"},
    "color-contrast": {
        ".tab-nav button": "the title of a tab that is not open, in gradio's grey",
        "[id$=references] .or, [id$=driving] .or, [id*=driving_more] .or": "the word between two ways to upload",
    },
}

COLOURS = ["color-contrast", "link-in-text-block"]  # the only rules whose outcome depends on the theme


@pytest.fixture
def empty(empty_url: str, browser: Any) -> Iterator[Page]:
    """The page without model files."""
    page = Page(empty_url, browser)
    page.enable()
    yield page
    page.close()
    assert page.errors == []


def violations(page: Page, colours: bool = True) -> list[str]:
    """What axe-core reports in the accordion, in both themes, except for `GRADIOS`.

    Args:
        colours: whether to check `COLOURS`, which takes most of the time.
    """
    if not page.page.evaluate("typeof window.axe === 'object'"):
        spec = find_spec("axe_playwright_python")
        assert spec is not None
        page.page.add_script_tag(path=Path(spec.origin or "").with_name("axe.min.js"))
    found = []
    without_colours = {"rules": {rule: {"enabled": False} for rule in COLOURS}}
    themes = {"light": {}, "dark": {"runOnly": COLOURS}} if colours else {"light": without_colours}
    for theme, options in themes.items():
        page.page.evaluate("dark => document.body.classList.toggle('dark', dark)", theme == "dark")
        page.page.wait_for_timeout(500)
        page.page.wait_for_function("!document.querySelector('.pending')")  # gradio shows text in grey until it arrives
        found += page.page.evaluate(
            """async ([theme, options, known]) => {
                options.resultTypes = ["violations"];
                const {violations} = await axe.run({include: [["[id*=_facesnap_]"]]}, options);
                return violations.flatMap(({id, nodes}) => nodes
                    .filter(({target}) => !document.querySelector(target[0])?.matches(known[id] || ":not(*)"))
                    .map(({html, failureSummary}) => `${theme} ${id}: ${html} ${failureSummary}`));
            }""",
            [theme, options, {rule: ", ".join(selectors) for rule, selectors in GRADIOS.items()}],
        )
    return found


def open_all(page: Page) -> None:
    """Open everything that can be opened in the accordion."""
    page.page.evaluate(
        """contents => {
            const all = selector => document.querySelectorAll(`${contents} ${selector}`);
            for (const title of all(".label-wrap:not(.open)")) title.click();
            for (const part of all("details")) part.open = true;
        }""",
        CONTENTS,
    )
    page.page.wait_for_timeout(1000)


def test_axe_finds_nothing_without_model_files(empty: Page) -> None:
    assert violations(empty, colours=False) == []
    open_all(empty)
    assert violations(empty) == []


def test_axe_finds_nothing_with_all_model_files(page: Page) -> None:
    page.enable()
    assert violations(page, colours=False) == []
    page.upload("references", photo(ADA), NO_FACE)
    assert violations(page) == [], "cards"
    press(page, "Remove unusable photos (1)")
    wait_for_cards(page, "photo0.png")
    page.choose("pose", "sliders")
    page.canvas()
    page.at("save_part", "summary").click()
    page.text("name", "Ada for axe")
    page.press("save")
    page.wait_for_text("people_report", "Saved as")
    delete = page.at("chosen", "[data-facesnap-task=delete]")
    delete.wait_for(state="attached")
    open_all(page)
    assert violations(page, colours=False) == [], "a saved person"
    page.choose("expression_source", "driving")
    page.choose("region", "mask")
    page.at("canvas", ".facesnap-tools:not([hidden]) input[type=range]").wait_for()
    page.page.wait_for_timeout(1000)
    assert violations(page) == [], "advanced settings"
    delete.click()
    page.wait_for_text("people_report", "Deleted:")


def choose_files_by_keyboard(page: Page) -> None:
    """Press Enter on the area for photos. It may be drawn again when the accordion opens, so this is repeated."""
    choosers: list[Any] = []
    page.page.on("filechooser", lambda chooser: choosers.append(chooser))
    area = page.at("references", ":is(button, [data-facesnap-key]):has(> input[type=file])")
    for _ in range(12):
        area.focus()
        page.page.keyboard.press("Enter")
        for _ in range(50):
            if choosers:
                return
            page.page.wait_for_timeout(SECOND / 10)
    pytest.fail("Enter does not open the file chooser")


def test_the_keyboard_reaches_every_control(page: Page) -> None:
    page.enable()
    choose_files_by_keyboard(page)
    page.upload("references", photo(ADA))
    page.choose("pose", "sliders")
    page.choose("expression_source", "driving")
    page.canvas()
    open_all(page)
    page.choose("region", "mask")
    page.at("canvas", ".facesnap-tools:not([hidden]) input[type=range]").wait_for()
    page.page.wait_for_timeout(1000)
    unreachable = page.page.evaluate(
        """contents => {
            const root = document.querySelector(contents);
            const controls = "input, textarea, select, button, summary, canvas[role], a[href], .label-wrap";
            const visible = one => one.checkVisibility({visibilityProperty: true}) && one.getClientRects().length;
            return [...root.querySelectorAll(controls)].filter(visible).filter(one => !one.disabled)
                .filter(one => one.type !== "file" && one.tabIndex < 0).map(one => one.outerHTML.slice(0, 200));
        }""",
        CONTENTS,
    )
    assert unreachable == []
    for name, title, contents in (("advanced", "summary", "model"), ("driving_part", ".label-wrap", "driving")):
        page.at(name, title).focus()
        assert page.at(contents).is_visible()
        page.page.keyboard.press("Enter")
        page.at(contents).wait_for(state="hidden")


def test_outcomes_are_announced_and_progress_is_not(page: Page) -> None:
    page.enable()
    status, alert = (page.page.locator(f"body > .facesnap-read[role={role}]") for role in ("status", "alert"))
    page.upload("references", photo(ADA))
    status.filter(has_text="photo0.png").wait_for(state="attached")
    assert "small" in status.inner_text()
    page.at("save_part", "summary").click()
    page.press("save")
    alert.filter(has_text="name").wait_for(state="attached")
    page.page.evaluate(
        """async at => {
            window.announced = [];
            const region = document.querySelector("body > .facesnap-read[role=status]");
            new MutationObserver(() => window.announced.push(region.textContent)).observe(region, {childList: true});
            const progress = document.querySelector(at);
            for (let percent = 0; percent <= 100; percent += 25) {
                progress.innerHTML = `<div><span data-facesnap-say="x">InstantID</span>: ${percent} %</div>`;
                await new Promise(done => setTimeout(done, 400));
            }
            progress.innerHTML = "<div data-facesnap-say='done'><span>Downloaded:</span> InstantID</div>";
            await new Promise(done => setTimeout(done, 600));
        }""",
        f"{FACESNAP}models_progress",
    )
    assert page.page.evaluate("window.announced") == ["InstantID", "Downloaded: InstantID"]
