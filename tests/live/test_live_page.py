"""FaceSnap on the page of a running WebUI."""

from __future__ import annotations

import base64
from collections.abc import Callable

import numpy as np
import pytest

from tests.live.live_host import (
    OTHER_WIDTHS,
    RANDOM,
    Host,
    Refused,
    astronaut,
    grace_hopper,
    grey,
    image_file,
    truncated_jpeg,
    with_facesnap,
)
from tests.live.live_page import FACESNAP, Page
from tests.live.test_live_errors import SENTENCES, assert_one_sentence


def test_facesnap_changes_the_image_only_while_enabled(page: Page) -> None:
    plain = page.generate()
    page.open_accordion()
    page.screenshot("accordion", f"{FACESNAP}enable")
    page.upload("references", astronaut())
    page.choose_model(RANDOM)
    page.screenshot("accordion-filled", f"{FACESNAP}enable")
    conditioned = page.generate()
    page.screenshot("page-after")
    page.disable()
    off = page.generate()

    assert plain.shape == conditioned.shape == (256, 256, 3)
    assert not np.array_equal(conditioned, plain)
    assert np.array_equal(off, plain)
    assert not [error for error in page.errors if "facesnap" in error]


def test_driving_photo_and_second_reference_change_the_image(page: Page) -> None:
    page.open_accordion()
    page.upload("references", astronaut())
    page.choose_model(RANDOM)
    alone = page.generate()
    page.upload("driving", grace_hopper())
    driven = page.generate()
    page.clear("references")
    page.upload("references", astronaut(), grace_hopper())
    page.screenshot("accordion-full", f"{FACESNAP}enable")
    fused = page.generate()
    assert not np.array_equal(alone, driven)
    assert not np.array_equal(driven, fused)


@pytest.mark.parametrize(
    ("model", "photo"),
    [
        (RANDOM, lambda: image_file(grey())),
        (RANDOM, truncated_jpeg),
        (RANDOM, None),
        (OTHER_WIDTHS, lambda: image_file(astronaut())),
    ],
    ids=["no face", "truncated photo", "no photo", "other widths"],
)
def test_the_page_shows_the_error(
    host: Host, page: Page, request: pytest.FixtureRequest, model: str, photo: Callable[[], bytes] | None
) -> None:
    """The sentence is the same as in the API's response, except that the page knows the name of a photo's file."""
    references = [] if photo is None else [photo()]
    with pytest.raises(Refused) as refused:
        host.images(with_facesnap({}, model=model, references=[base64.b64encode(r).decode() for r in references]))
    assert_one_sentence(refused.value, *SENTENCES[request.node.callspec.id])
    page.open_accordion()
    page.choose_model(model)
    if references:
        page.upload("references", *references)
    shown = page.generate()
    page.screenshot(f"error-{request.node.callspec.id.replace(' ', '-')}")
    assert isinstance(shown, str), "the page shows an image"
    message = refused.value.message.replace("Reference photo 1", "photo0.png")  # the page knows the files' names
    assert message in shown


def test_an_sd15_checkpoint_is_refused(host: Host, page: Page) -> None:
    sd15, sdxl = host.checkpoint("sd15"), host.get("/sdapi/v1/options")["sd_model_checkpoint"]
    if sd15 is None:
        pytest.skip("the host has no checkpoint with sd15 in its name")
    page.open_accordion()
    page.choose_model(RANDOM)
    page.upload("references", astronaut())
    host.post("/sdapi/v1/options", {"sd_model_checkpoint": sd15})
    try:
        shown = page.generate()
    finally:
        host.post("/sdapi/v1/options", {"sd_model_checkpoint": sdxl})
    page.screenshot("error-checkpoint")
    assert isinstance(shown, str), "the page shows an image"
    assert "FaceSnap needs an SDXL checkpoint" in shown


def test_dragging_the_face_moves_the_sliders_and_changes_the_image(page: Page) -> None:
    page.open_accordion()
    page.upload("references", astronaut())
    page.choose_model(RANDOM)
    page.choose_pose("sliders")
    before = page.generate()
    page.drag_face(0.1, 0.2)
    page.screenshot("canvas", f"{FACESNAP}enable")
    assert page.numbers("x", "y") == pytest.approx([0.6, 0.65], abs=0.02)
    assert not np.array_equal(page.generate(), before)
    assert not [error for error in page.errors if "facesnap" in error]


def test_the_note_about_a_turned_photo_is_below_the_image(page: Page) -> None:
    page.open_accordion()
    page.upload("references", np.rot90(astronaut()))
    page.choose_model(RANDOM)
    assert isinstance(page.generate(), np.ndarray)
    assert "photo0.png is rotated by 270°" in page.note()
