"""FaceSnap in the browser, by the page's own controls."""

from __future__ import annotations

import numpy as np
import pytest
from live_host import OTHER_WIDTHS, RANDOM, Host, Refused, astronaut, grace_hopper, grey, picture_file, with_facesnap
from live_page import FACESNAP, Page
from test_live_errors import cut_jpeg


def test_on_and_off(page: Page) -> None:
    plain = page.generate()
    page.switch()
    page.screenshot("accordion", f"{FACESNAP}enable")
    page.upload("photo", astronaut())
    page.choose_model(RANDOM)
    page.screenshot("accordion-filled", f"{FACESNAP}enable")
    guided = page.generate()
    page.screenshot("page-after")
    page.switch()
    off = page.generate()

    assert plain.shape == guided.shape == (256, 256, 3)
    assert not np.array_equal(guided, plain)
    assert np.array_equal(off, plain)
    assert page.errors == []


def test_every_photo_counts(page: Page) -> None:
    page.switch()
    page.upload("photo", astronaut())
    page.choose_model(RANDOM)
    alone = page.generate()
    page.upload("driving", grace_hopper())
    driven = page.generate()
    page.upload("more_photos", grace_hopper())
    page.screenshot("accordion-full", f"{FACESNAP}enable")
    mixed = page.generate()
    assert not np.array_equal(alone, driven)
    assert not np.array_equal(driven, mixed)


@pytest.mark.parametrize("what", ["no face", "other widths", "cut photo", "no photo"])
def test_the_reason_stands_in_the_page(host: Host, page: Page, what: str) -> None:
    """The same sentence as the API's."""
    page.switch()
    page.choose_model(OTHER_WIDTHS if what == "other widths" else RANDOM)
    settings = {"model": OTHER_WIDTHS} if what == "other widths" else {}
    if what == "no photo":
        settings["references"] = []
    elif what == "cut photo":
        settings["references"] = [cut_jpeg()]
