"""FaceSnap in the browser, by the page's own controls."""

from __future__ import annotations

import base64
from collections.abc import Callable

import numpy as np
import pytest
from live_host import (
    OTHER_WIDTHS,
    RANDOM,
    Host,
    Refused,
    astronaut,
    cut_jpeg,
    grace_hopper,
    grey,
    picture_file,
    with_facesnap,
)
from live_page import FACESNAP, Page


def test_on_and_off(page: Page) -> None:
    plain = page.generate()
    page.open_accordion()
    page.screenshot("accordion", f"{FACESNAP}enable")
    page.upload("photo", astronaut())
    page.choose_model(RANDOM)
    page.screenshot("accordion-filled", f"{FACESNAP}enable")
    guided = page.generate()
    page.screenshot("page-after")
    page.disable()
    off = page.generate()

    assert plain.shape == guided.shape == (256, 256, 3)
    assert not np.array_equal(guided, plain)
    assert np.array_equal(off, plain)
    assert not [error for error in page.errors if "facesnap" in error]


def test_every_photo_counts(page: Page) -> None:
    page.open_accordion()
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


# a damaged picture does not get past gradio's own picture field, but it does in the field for more photos
@pytest.mark.parametrize(
    ("model", "field", "photo"),
    [
        (RANDOM, "photo", lambda: picture_file(grey())),
        (RANDOM, "more_photos", cut_jpeg),
        (RANDOM, "photo", None),
        (OTHER_WIDTHS, "photo", lambda: picture_file(astronaut())),
    ],
    ids=["no face", "cut photo", "no photo", "other widths"],
)
def test_the_reason_stands_in_the_page(
    host: Host, page: Page, request: pytest.FixtureRequest, model: str, field: str, photo: Callable[[], bytes] | None
) -> None:
    """The same sentence as in the API's answer."""
    references = [] if photo is None else [photo()]
    with pytest.raises(Refused) as refused:
        host.pictures(with_facesnap({}, model=model, references=[base64.b64encode(r).decode() for r in references]))
    page.open_accordion()
    page.choose_model(model)
    if references:
        page.upload(field, *references)
    shown = page.generate()
    page.screenshot(f"error-{request.node.callspec.id.replace(' ', '-')}")
    assert isinstance(shown, str), "the page shows a picture"
    assert refused.value.message in shown


def test_another_checkpoint(host: Host, page: Page) -> None:
    sd15, sdxl = host.checkpoint("sd15"), host.get("/sdapi/v1/options")["sd_model_checkpoint"]
    if sd15 is None:
        pytest.skip("the host has no checkpoint with sd15 in its name")
    page.open_accordion()
    page.choose_model(RANDOM)
    page.upload("photo", astronaut())
    host.post("/sdapi/v1/options", {"sd_model_checkpoint": sd15})
    try:
        shown = page.generate()
    finally:
        host.post("/sdapi/v1/options", {"sd_model_checkpoint": sdxl})
    page.screenshot("error-checkpoint")
    assert isinstance(shown, str), "the page shows a picture"
    assert "FaceSnap needs an SDXL checkpoint" in shown
