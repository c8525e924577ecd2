"""The accordion in a browser, on a page of real gradio: clicked, dragged, typed at and read, and pictures drawn with it
by the miniature."""

from __future__ import annotations

from functools import cache
from statistics import median

import numpy as np
import pytest

from tests.page.browsed_page import FACESNAP, SECOND, Page

pytest.importorskip("diffusers", reason="the miniature is drawn with diffusers")
pytest.importorskip("insightface", reason="the miniature's faces are found with insightface")

from facesnap_ext import __version__
from facesnap_ext.identity import faces
from facesnap_ext.identity.framing import ACCENT
from facesnap_ext.landmarks.poses import TEMPLATES
from facesnap_ext.photos import Photo
from facesnap_lab.miniature.dataset import SIDE
from facesnap_lab.miniature.measure import Judge
from facesnap_lab.miniature.render import render
from facesnap_lab.miniature.world import person, scene

SOMEBODY, SOMEBODY_ELSE = 3, 8  # of the test split, whom nobody trained on
MARGIN = 0.3  # of the judge's cosines, in which two photos of one person are 0.76 above those of two people
NO_FACE = np.full((SIDE, SIDE, 3), 128, np.uint8)


@cache
def rendered(index: int, shot: int = 0):
    who = person("test", index)
    return render([who], [scene(who, shot)], SIDE)[0]


def photo(index: int, shot: int = 0) -> np.ndarray:
    return rendered(index, shot).picture


@cache
def judge() -> Judge:
    return Judge()


def embedding(picture: np.ndarray) -> np.ndarray:
    found = judge().embedding(picture)
    assert found is not None, "a picture without a face"
    return found


@pytest.fixture
def opened(page: Page) -> Page:
    page.enable()
    return page


@pytest.fixture
def posed(opened: Page) -> Page:
    """With a person of the miniature, posed by sliders that are seen."""
    opened.upload("references", photo(SOMEBODY))
    opened.choose("pose", "sliders")
    opened.canvas()
    return opened


def test_the_accordion_opens_and_says_which_files_are_there(page):
    assert not page.at("status").is_visible()
    page.enable()
    said = page.says("status", "Model files")
    for name in ("facesnap.safetensors", "identity", "clip", "deca.safetensors", "flame.safetensors"):
        assert name in said


def test_photos_are_shown_with_the_face_framed_and_one_without_is_warned_of(opened):
    opened.upload("references", photo(SOMEBODY), NO_FACE)
    assert "No face was found in Reference photo 2" in opened.says("report", "No face")
    framed, unframed = opened.thumbnails()
    ys, xs = np.nonzero(is_accent(framed) & ~is_accent(photo(SOMEBODY)))
    frame = [int(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]
    assert frame == pytest.approx(list(map(float, rendered(SOMEBODY).box)), abs=0.1 * SIDE)
    assert not is_accent(unframed).any()


def test_a_photo_on_its_way_is_not_lost_to_an_answer(opened):
    """Gradio 3 forgets an upload during which anything on the page is answered."""
    held = []
    opened.page.route("**/upload*", lambda route: held.append(route), times=1)
    opened.give("references", photo(SOMEBODY))
    opened.page.wait_for_timeout(SECOND)
    opened.choose("pose", "sliders")  # which the server is asked about
    opened.page.wait_for_timeout(SECOND)
    held[0].continue_()
    opened.says("report", "Reference photo 1")
    assert len(opened.thumbnails()) == 1


def is_accent(picture: np.ndarray) -> np.ndarray:
    """Where the frame is; one version of gradio compresses it."""
    return np.abs(picture.astype(int) - ACCENT).max(2) < 70


def test_turning_a_template_makes_sliders_of_it(opened):
    opened.upload("references", photo(SOMEBODY))
    opened.choose("pose", "template")
    opened.choose("template", "profile left")
    template = TEMPLATES["profile left"]
    opened.canvas().focus()
    opened.page.keyboard.press("Shift+ArrowRight")
    opened.becomes(["yaw", "x", "y", "size"], [template.yaw + 3, template.x, template.y, template.size])
    assert opened.value("pose") == "sliders"


def test_what_is_dragged_stands_in_the_sliders(posed):
    front = TEMPLATES["front"]
    posed.drag(0.1, 0.2)
    posed.becomes(["x", "y", "size", "yaw"], [front.x + 0.1, front.y + 0.2, front.size, 0], tolerance=0.03)
    assert posed.at("placed", "input").is_checked()


def test_the_canvas_follows_a_slider_within_50_ms(posed):
    """The median from the input event to the canvas that has changed, counted in frames, of which an idle browser makes
    sixty a second: on a busy machine a frame takes as long as it takes."""
    frames, milliseconds = posed.delays("yaw", 15)
    assert median(frames) <= 3, f"{median(milliseconds):.0f} ms"


def test_the_canvas_is_reached_and_used_with_keys_alone(posed):
    posed.focus_by_tab("template", f"{FACESNAP}canvas canvas")
    for key in (*["ArrowRight"] * 5, *["Shift+ArrowDown"] * 2, "+"):
        posed.page.keyboard.press(key)
    front = TEMPLATES["front"]
    posed.becomes(["x", "y", "pitch", "size"], [front.x + 0.05, front.y, 6, front.size * 1.05])


def test_every_control_has_a_name(posed):
    posed.open("place", "advanced")
    posed.page.wait_for_timeout(SECOND)  # what has appeared is named in half a second
    assert posed.unnamed() == []
    posed.person(2)
    posed.open("place_2", "advanced_2")
    posed.page.wait_for_timeout(SECOND)
    assert posed.unnamed() == []


def test_the_picture_is_of_the_person(opened):
    opened.upload("references", photo(SOMEBODY), photo(SOMEBODY, 2))
    picture = opened.generate()
    seen = embedding(picture)
    assert picture.shape == (SIDE, SIDE, 3)
    assert seen @ embedding(photo(SOMEBODY)) > seen @ embedding(photo(SOMEBODY_ELSE)) + MARGIN
    digests = " ".join(Photo(photo(SOMEBODY, shot), "").digest[:10] for shot in (0, 2))
    assert f"FaceSnap: {__version__}, FaceSnap references: {digests}, FaceSnap weight: 1" in opened.infotext()


def test_another_photo_of_the_same_name_is_another_person(opened):
    opened.upload("references", photo(SOMEBODY))
    opened.generate()
    opened.clear("references")
    opened.at("seen").wait_for(state="hidden")
    opened.upload("references", photo(SOMEBODY_ELSE))
    seen = embedding(opened.generate())
    assert seen @ embedding(photo(SOMEBODY_ELSE)) > seen @ embedding(photo(SOMEBODY)) + MARGIN
    assert f"references: {Photo(photo(SOMEBODY_ELSE), '').digest[:10]}, " in opened.infotext()


def test_two_people_are_each_on_their_own_side(opened):
    opened.side("width", 2 * SIDE)
    for number, index, x in ((1, SOMEBODY_ELSE, 0.25), (2, SOMEBODY, 0.75)):
        end = "" if number == 1 else f"_{number}"
        opened.person(number)
        if number > 1:
            opened.tick(f"enable{end}")
        opened.upload(f"references{end}", photo(index))
        opened.choose(f"pose{end}", "sliders")
        opened.open(f"place{end}")
        opened.tick(f"placed{end}")
        opened.number(f"x{end}", x)
        opened.choose(f"region{end}", "face")
    picture = opened.generate()
    assert picture.shape == (SIDE, 2 * SIDE, 3)
    left, right = (embedding(photo(index)) for index in (SOMEBODY_ELSE, SOMEBODY))
    seen = by_side(picture)
    assert seen[0] @ left > seen[0] @ right
    assert seen[1] @ right > seen[1] @ left
    assert "FaceSnap 2 x: 0.75" in opened.infotext()


def by_side(picture: np.ndarray) -> list[np.ndarray]:
    """The judge's embeddings of the largest face on the left and of that on the right."""
    sides = {}
    for face in faces.find_faces(judge().pack, Photo(picture, "Picture")):
        side = int(face.box[[0, 2]].mean() > picture.shape[1] / 2)
        sides.setdefault(side, face.embedding / np.linalg.norm(face.embedding))
    return [sides[0], sides[1]]  # KeyError: a side without a face


def test_a_saved_person_and_all_settings_are_pasted_into_another_page(posed, url, browser):
    """No photo is needed then, and what is drawn is the same to the last pixel."""
    posed.text("name", "Ada of the test")
    posed.press("save")
    posed.says("report", "Saved as Ada of the test.safetensors")
    assert posed.value("identity") == "Ada of the test"
    posed.clear("references")
    posed.number("yaw", 20)
    posed.number("mouth", 0.4)
    posed.open("place")
    posed.tick("placed")
    posed.number("x", 0.45)
    posed.choose("preset", "balanced")
    posed.becomes(["weight", "end"], [0.8, 0.8])
    posed.open("advanced")
    posed.tick("cond_only")
    posed.choose("hires", "first")
    posed.text("block_weights", "1 1 1 1 1 1 1 1 1 0.5")
    posed.choose("region", "face")
    posed.number("region_scale", 2.5)
    picture = posed.generate()
    assert isinstance(picture, np.ndarray), picture
    infotext = posed.infotext()
    for part in ("identity: Ada of the test", "yaw: 20", "x: 0.45", "weight: 0.8", "end: 0.8", "cond only: True"):
        assert f"FaceSnap {part}" in infotext
    assert "references" not in infotext

    other = Page(url, browser)
    other.enable()
    other.paste(infotext)
    other.becomes(["yaw", "x", "weight", "region_scale"], [20, 0.45, 0.8, 2.5])
    again = other.generate()
    assert isinstance(again, np.ndarray), again
    assert other.infotext() == infotext
    assert np.array_equal(again, picture)
    assert other.errors == []
    other.close()


def test_what_goes_wrong_stands_in_the_page_and_the_next_job_is_clean(page):
    plain = page.generate()
    page.enable()
    assert page.generate() == (
        "FaceSnapError: FaceSnap is enabled without a reference photo; add one or disable FaceSnap."
    )
    page.upload("references", NO_FACE)
    error = page.generate()
    assert error.startswith("FaceSnapError: No face was found in Reference photo 1")
    assert len(error.splitlines()) == 1
    page.enable(False)
    assert np.array_equal(page.generate(), plain)
    assert "FaceSnap" not in page.infotext()
