"""Reference photos and saved people in a browser, on a page of real gradio."""

from __future__ import annotations

import numpy as np
import pytest

from facesnap_ext.photos import Photo
from tests.page.browsed_page import FACESNAP, Page, png, with_one_gradio
from tests.page.test_page import ADA, NO_FACE, photo

NAMES = ("photo0 Ada.png", "photo0 wall.png", "photo0 Ada later.png")
CARDS = f"{FACESNAP}seen .facesnap-name"


@pytest.fixture
def filled(page: Page) -> Page:
    """The page with two photos of Ada and one without a face between them."""
    page.enable()
    images = dict(zip(NAMES, (photo(ADA), NO_FACE, photo(ADA, 2))))
    files = [{"name": name, "mimeType": "image/png", "buffer": png(image)} for name, image in images.items()]
    page.at("references", "input[type=file]").set_input_files(files)
    wait_for_cards(page, *NAMES)
    return page


def wait_for_cards(page: Page, *names: str) -> None:
    page.page.wait_for_function(
        "([cards, names]) => [...document.querySelectorAll(cards)].map(card => card.textContent).join() === names",
        arg=[CARDS, ",".join(names)],
    )


def press(page: Page, name: str) -> None:
    page.page.get_by_role("button", name=name, exact=True).click()


def test_photos_are_moved_removed_and_left_out(filled: Page) -> None:
    assert filled.generate().startswith("FaceSnapError: No face was found in photo0 wall.png")
    press(filled, "Move left photo0 Ada later.png")
    wait_for_cards(filled, "photo0 Ada.png", "photo0 Ada later.png", "photo0 wall.png")
    press(filled, "Move left photo0 Ada later.png")
    wait_for_cards(filled, "photo0 Ada later.png", "photo0 Ada.png", "photo0 wall.png")
    press(filled, "Remove unusable photos (1)")
    wait_for_cards(filled, "photo0 Ada later.png", "photo0 Ada.png")
    assert isinstance(filled.generate(), np.ndarray)
    digests = [Photo(photo(ADA, shot), "").digest[:10] for shot in (2, 0)]
    assert f"FaceSnap references: {' '.join(digests)}" in filled.infotext()
    press(filled, "Remove photo0 Ada later.png")
    wait_for_cards(filled, "photo0 Ada.png")
    assert not filled.at("reference_mode").is_visible()
    press(filled, "Remove photo0 Ada.png")
    filled.at("references", "input[type=file]").wait_for(state="attached")
    filled.at("references").wait_for()
    wait_for_cards(filled)


@with_one_gradio
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_text_on_the_cards_has_enough_contrast(filled: Page, theme: str) -> None:
    filled.page.evaluate("dark => document.body.classList.toggle('dark', dark)", theme == "dark")
    filled.page.wait_for_timeout(500)
    low = filled.page.evaluate(
        """cards => {
            const parse = colour => colour.match(/[\\d.]+/g).map(Number);
            const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
                .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
            const behind = element => {
                for (let one = element; one; one = one.parentElement) {
                    const colour = parse(getComputedStyle(one).backgroundColor);
                    if (colour.length === 3 || colour[3] === 1) return colour;
                }
                return [255, 255, 255];
            };
            const elements = document.querySelectorAll(`${cards} :is(.facesnap-badge, .facesnap-name, .facesnap-line span)`);
            return [...elements].map(element => {
                const [a, b] = [parse(getComputedStyle(element).color), behind(element)].map(luminance);
                return [element.textContent, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
            }).filter(([text, ratio]) => text && ratio < 4.5);
        }""",  # noqa: E501
        f"{FACESNAP}seen",
    )
    assert low == []


def test_a_saved_person_replaces_the_photos_and_is_known_everywhere(filled: Page) -> None:
    press(filled, "Remove unusable photos (1)")
    wait_for_cards(filled, "photo0 Ada.png", "photo0 Ada later.png")
    filled.at("save_part", "summary").click()
    filled.text("name", "Ada of the page")
    filled.at("picture", "input").check()
    filled.press("save")
    filled.wait_for_text("people_report", "features of the face and a small picture of it")
    wait_for_cards(filled)
    assert filled.value("identity") == "Ada of the page"
    filled.at("chosen", "img").wait_for()
    filled.person(2)
    filled.choose("identity_2", "Ada of the page")
    filled.person(1)
    filled.at("chosen", "summary").first.click()
    filled.at("chosen", "input[type=text]").fill("Ada renamed")
    filled.at("chosen", "input[type=text]").press("Enter")
    filled.wait_for_text("people_report", "Renamed: Ada of the page → Ada renamed")
    assert filled.value("identity") == "Ada renamed"
    filled.page.wait_for_function(
        "at => document.querySelector(at).value === 'Ada renamed'", arg=f"{FACESNAP}identity_2 select"
    )
    filled.at("chosen", "summary >> nth=1").click()
    assert "This deletes the file: Ada renamed.safetensors" in filled.at("chosen").inner_text()
    press(filled, "Delete Ada renamed")
    filled.wait_for_text("people_report", "Deleted: Ada renamed.safetensors")
    assert filled.value("identity") == ""
