"""The translated page, in a browser of the same language, on a page of real gradio."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.page.browsed_page import FACESNAP, VERSIONS, Page, png, with_one_gradio
from tests.page.test_page import ADA, NO_FACE, photo

FOLDER = Path(__file__).parents[2] / "localizations"
LANGUAGES = {"zh_CN": "zh-CN", "ja_JP": "ja-JP", "ko_KR": "ko-KR", "de_DE": "de-DE"}
WIDTHS = (1280, 420)  # in pixels


def translations(language: str) -> dict[str, str]:
    return json.loads((FOLDER / f"{language}.json").read_text(encoding="utf-8"))


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def translated(url: str, browser: Any, language: str) -> Iterator[Page]:
    page = Page(url, browser, translations=translations(language), locale=LANGUAGES[language])
    page.enable()
    yield page
    page.close()
    assert page.errors == []


def upload(page: Page, *images: np.ndarray) -> None:
    files = [{"name": f"photo{i}.png", "mimeType": "image/png", "buffer": png(one)} for i, one in enumerate(images)]
    page.at("references", "input[type=file]").set_input_files(files)
    wait_for_cards(page, *(f"photo{i}.png" for i in range(len(images))))


def wait_for_cards(page: Page, *names: str) -> None:
    page.page.wait_for_function(
        "([cards, names]) => [...document.querySelectorAll(cards)].map(card => card.textContent).join() === names",
        arg=[f"{FACESNAP}seen .facesnap-name", ",".join(names)],
    )


def english(page: Page, known: dict[str, str]) -> list[str]:
    """The texts and labels in the accordion that are still English although they have a translation."""
    found = page.page.evaluate(
        """contents => {
            const root = document.querySelector(contents), texts = [];
            const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
            while (walker.nextNode()) texts.push(walker.currentNode.textContent.trim());
            for (const name of ["aria-label", "title", "placeholder"]) {
                for (const one of root.querySelectorAll(`[${name}]`)) texts.push(one.getAttribute(name));
            }
            return texts;
        }""",
        f"{FACESNAP}enable_contents",
    )
    return [text for text in found if known.get(text, text) != text]


@with_one_gradio
@pytest.mark.parametrize("language", ["zh_CN"], indirect=True)
def test_every_control_of_the_translated_page_works(translated: Page, language: str) -> None:
    known = translations(language)
    upload(translated, photo(ADA), NO_FACE, photo(ADA, 2))
    buttons = translated.page.locator(f"{FACESNAP}seen [data-facesnap-do=left]")
    buttons.nth(2).click()
    wait_for_cards(translated, "photo0.png", "photo2.png", "photo1.png")
    translated.page.locator(f"{FACESNAP}seen [data-facesnap-do=leave_out]").click()
    wait_for_cards(translated, "photo0.png", "photo2.png")
    assert known["small"] in translated.at("seen").inner_text()
    translated.choose("reference_mode", "averaged")
    translated.choose("template", "looking up")
    translated.choose("pose", "sliders")
    translated.number("yaw", 20)
    translated.choose("preset", "balanced")
    translated.wait_for_numbers(["weight", "end"], [0.8, 0.8])
    translated.choose("expression_source", "custom")
    translated.choose("expression", "smile")
    translated.choose("hires", "first")
    translated.choose("region", "face")
    assert isinstance(translated.generate(), np.ndarray)
    settings = ("reference mode: averaged", "pose: sliders", "yaw: 20", "expression: smile", "hires: first")
    for setting in (*settings, "region: face", "weight: 0.8"):
        assert f"FaceSnap {setting}" in translated.infotext()
    translated.choose("region", "mask")
    translated.at("canvas", ".facesnap-tools:not([hidden]) input[type=range]").wait_for()
    translated.drag(0.2, 0.1)
    assert translated.at("mask", "textarea").input_value().startswith("data:image/png")
    translated.choose("region", "image")
    translated.at("save_part", "summary").click()
    translated.text("name", "Ada in translation")
    translated.press("save")
    translated.wait_for_text("people_report", known["The saved person has replaced the photos."])
    assert translated.value("identity") == "Ada in translation"
    translated.at("chosen", "summary >> nth=1").click()
    translated.at("chosen", "[data-facesnap-task=delete]").click()
    translated.wait_for_text("people_report", known["Deleted:"])
    translated.open("models")
    translated.at("models_table", "[data-facesnap-action=refresh]").click()
    translated.page.wait_for_timeout(1500)
    assert english(translated, known) == []


@pytest.mark.parametrize(
    ("url", "language"),
    # German has the longest words
    [
        (version, language)
        for version in VERSIONS
        for language in LANGUAGES
        if language == "de_DE" or version == VERSIONS[-1]
    ],
    indirect=True,
)
def test_every_text_is_translated_and_fits_the_page(translated: Page, language: str) -> None:
    upload(translated, photo(ADA), NO_FACE)
    translated.choose("pose", "sliders")
    translated.page.evaluate(
        """contents => {
            const all = selector => document.querySelectorAll(`${contents} ${selector}`);
            for (const title of all(".label-wrap:not(.open)")) title.click();
            for (const part of all("details")) part.open = true;
        }""",
        f"{FACESNAP}enable_contents",
    )
    for width in WIDTHS:
        translated.page.set_viewport_size({"width": width, "height": 1600})
        translated.page.wait_for_timeout(1000)
        assert too_wide(translated, width) == []
    assert english(translated, translations(language)) == []


def too_wide(page: Page, width: int) -> list[str]:
    """The texts in the accordion that extend beyond the right edge of the page."""
    return page.page.evaluate(
        """([contents, width]) => [...document.querySelectorAll(`${contents} *`)]
            .filter(one => one.checkVisibility() && !one.closest(".facesnap-read") && !one.children.length)
            .filter(one => one.textContent.trim() && one.getBoundingClientRect().right > width)
            .map(one => one.textContent)""",
        [f"{FACESNAP}enable_contents", width],
    )
