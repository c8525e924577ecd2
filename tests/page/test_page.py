"""The accordion in a browser, on a page of real gradio. The miniature generates the images."""

from __future__ import annotations

from functools import cache
from statistics import median

import numpy as np
import pytest

from tests.page.browsed_page import FACESNAP, SECOND, Page, with_one_gradio

pytest.importorskip("diffusers", reason="the miniature generates images with diffusers")
pytest.importorskip("insightface", reason="the miniature detects faces with insightface")

from facesnap_ext import __version__
from facesnap_ext.identity import faces
from facesnap_ext.identity.framing import ACCENT
from facesnap_ext.landmarks.poses import TEMPLATES
from facesnap_ext.photos import Photo
from facesnap_lab.miniature.dataset import SIDE
from facesnap_lab.miniature.measure import Judge
from facesnap_lab.miniature.render import render
from facesnap_lab.miniature.world import person, scene

ADA, BOB = 3, 8  # people from the test split, which is not used for training
MARGIN = 0.3  # cosine similarity; on average, photos of the same person are 0.76 above photos of different people
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


def embedding(image: np.ndarray) -> np.ndarray:
    result = judge().embedding(image)
    assert result is not None, "the image has no face"
    return result


@pytest.fixture
def opened(page: Page) -> Page:
    """The page with FaceSnap enabled."""
    page.enable()
    return page


def test_hostile_files_in_the_model_folder_are_shown_as_text(opened):
    """Their scripts do not run, and the accordion is shown."""
    opened.open("models")
    opened.page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    assert "onerror=window.hostile" in opened.wait_for_text("models_table", "onerror")
    opened.page.get_by_role("button", name="Refresh").click()
    opened.at("identity", "option[value*=onerror]").wait_for(state="attached")
    opened.page.wait_for_timeout(SECOND)
    assert opened.page.evaluate("window.hostile") is None
    assert opened.page.locator("img[onerror]").count() == 0


def test_previews_leave_no_file_in_gradios_folder(opened, gradio_folder):
    before = set(gradio_folder.rglob("*"))  # what other tests have uploaded
    opened.upload("references", photo(ADA))
    assert len(opened.thumbnails()) == 1
    names = [path.name for path in set(gradio_folder.rglob("*")) - before if path.is_file()]
    assert [name for name in names if not name.startswith("photo0")] == []


@pytest.fixture
def posed(opened: Page) -> Page:
    """The page with a reference photo, the pose set to sliders, and the canvas in view."""
    opened.upload("references", photo(ADA))
    opened.choose("pose", "sliders")
    opened.canvas()
    return opened


def test_few_controls_are_visible_before_the_first_photo(opened):
    """At most nine, with a complete installation."""
    opened.page.wait_for_timeout(SECOND)
    controls = opened.visible_controls()
    assert controls >= {"tabs", "references", "pose", "weight", "preset", "advanced", "models"}
    assert len(controls) <= 9, controls
    assert not opened.at("canvas", "canvas").is_visible(), "there is nothing to show yet"


def test_the_open_accordion_lists_the_model_files(page):
    assert not page.at("status").is_visible()
    page.enable()
    status = page.wait_for_text("status", "Model files found")
    for name in ("facesnap.safetensors", "identity", "clip", "deca.safetensors", "flame.safetensors"):
        assert name in status


def test_faces_are_framed_and_a_photo_without_one_gives_a_warning(opened):
    opened.upload("references", photo(ADA), NO_FACE)
    opened.wait_for_text("seen", "no face")
    framed, unframed = opened.thumbnails()
    ys, xs = np.nonzero(is_accent(framed) & ~is_accent(photo(ADA)))
    frame = [int(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]
    assert frame == pytest.approx(list(map(float, rendered(ADA).box)), abs=0.1 * SIDE)
    assert not is_accent(unframed).any()


def test_an_upload_survives_another_event_of_the_page(opened):
    """Gradio 3 drops an upload if any event of the page is answered meanwhile."""
    held = []
    opened.page.route("**/upload*", lambda route: held.append(route), times=1)
    opened.set_files("references", photo(ADA))
    opened.page.wait_for_timeout(SECOND)
    opened.choose("pose", "sliders")  # sends a request to the server
    opened.page.wait_for_timeout(SECOND)
    held[0].continue_()
    opened.wait_for_text("seen", "photo0.png")
    assert len(opened.thumbnails()) == 1


def is_accent(image: np.ndarray) -> np.ndarray:
    """The pixels of the frame. One version of gradio compresses the image, so colours are approximate."""
    return np.abs(image.astype(int) - ACCENT).max(2) < 70


@with_one_gradio
def test_turning_a_template_switches_to_sliders(opened):
    opened.upload("references", photo(ADA))
    opened.choose("template", "profile left")
    template = TEMPLATES["profile left"]
    opened.canvas().focus()
    opened.page.keyboard.press("Shift+ArrowRight")
    opened.wait_for_numbers(["yaw", "x", "y", "size"], [template.yaw + 3, template.x, template.y, template.size])
    assert opened.at("pose", "input:checked").get_attribute("value") == "sliders"


@with_one_gradio
def test_dragging_sets_the_sliders(posed):
    front = TEMPLATES["front"]
    posed.drag(0.1, 0.2)
    posed.wait_for_numbers(["x", "y", "size", "yaw"], [front.x + 0.1, front.y + 0.2, front.size, 0], tolerance=0.03)
    assert posed.at("placed", "input").is_checked()


@with_one_gradio
def test_the_canvas_follows_a_slider_within_50_ms(posed):
    """50 ms is three frames of an idle browser. Frames are counted, because they take longer on a busy machine."""
    for slider in ("yaw", "smile_left", "lid_right", "mouth"):
        if slider == "mouth":  # changes the expression of a photo
            posed.choose("pose", "photo")
            posed.choose("expression_source", "custom")
            posed.page.wait_for_timeout(SECOND)
        posed.reveal(slider)
        frames, milliseconds = posed.delays(slider, 15)
        assert median(frames) <= 3, f"{slider}: {median(milliseconds):.0f} ms"


def test_what_is_wrong_with_a_driving_photo_is_shown_and_leaves_nothing_behind(opened):
    """Also that its second face was chosen, and that there are more driving photos."""
    opened.upload("references", photo(ADA))
    opened.open("driving_part")
    two = np.concatenate([photo(ADA), photo(BOB)], 1)
    opened.set_files("driving", two)
    opened.wait_for_text("driving_faces", "face")
    opened.page.locator(f"{FACESNAP}driving_faces [data-facesnap-face='1']").click()
    opened.page.wait_for_function(
        "settings => JSON.parse(document.querySelector(settings).value).driving_face_index === 1",
        arg=f"{FACESNAP}settings textarea",
    )
    opened.at("driving_more", "input[type=file]").wait_for(state="attached")
    opened.set_files("driving_more", photo(ADA, 1))
    opened.page.locator(f"{FACESNAP}driving_more a[href]").wait_for(state="attached")
    opened.at("driving", "button:is([aria-label=Clear], [aria-label='Remove Image'])").click()
    opened.page.wait_for_function(
        "settings => !JSON.parse(document.querySelector(settings).value).driving_face_index",
        arg=f"{FACESNAP}settings textarea",
    )
    assert opened.at("driving_more").is_visible(), "the job would still use them"
    opened.set_files("driving", NO_FACE)
    opened.page.locator(".facesnap-problem", has_text="No face was found in Driving photo").wait_for()


def test_a_pose_is_saved_chosen_and_deleted(posed):
    posed.number("yaw", 30)
    posed.number("smile_left", 0.5)
    posed.page.wait_for_timeout(SECOND)
    before = posed.canvas().evaluate("canvas => canvas.toDataURL()")
    posed.text("pose_name", "Half a smile")
    posed.press("save_pose")
    posed.wait_for_text("pose_report", "Saved as Half a smile.json. The file contains only numbers and no pixels.")
    posed.number("yaw", 0)
    posed.choose("pose", "saved")
    assert posed.value("saved_pose") == "Half a smile"
    for _ in range(40):  # the saved pose comes from the server
        if (drawn := posed.canvas().evaluate("canvas => canvas.toDataURL()")) == before:
            break
        posed.page.wait_for_timeout(SECOND / 4)
    assert drawn == before
    image = posed.generate()
    assert isinstance(image, np.ndarray), image
    assert "FaceSnap saved pose: Half a smile" in posed.infotext()
    posed.press("delete_pose")
    posed.wait_for_text("pose_report", "Deleted: Half a smile")


@with_one_gradio
def test_the_canvas_can_be_used_with_the_keyboard_alone(posed):
    posed.focus_by_tab("identity", f"{FACESNAP}canvas canvas")
    for key in (*["ArrowRight"] * 5, *["Shift+ArrowDown"] * 2, "+"):
        posed.page.keyboard.press(key)
    front = TEMPLATES["front"]
    posed.wait_for_numbers(["x", "y", "pitch", "size"], [front.x + 0.05, front.y, 6, front.size * 1.05])


@with_one_gradio
def test_every_control_has_an_accessible_name(posed):
    posed.page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    posed.page.wait_for_timeout(SECOND)  # labels are added within half a second
    assert posed.unlabelled() == []
    posed.person(2)
    posed.page.wait_for_timeout(SECOND)
    assert posed.unlabelled() == []


@with_one_gradio
def test_the_image_shows_the_person(opened):
    opened.upload("references", photo(ADA), photo(ADA, 2))
    image = opened.generate()
    seen = embedding(image)
    assert image.shape == (SIDE, SIDE, 3)
    assert seen @ embedding(photo(ADA)) > seen @ embedding(photo(BOB)) + MARGIN
    digests = " ".join(Photo(photo(ADA, shot), "").digest[:10] for shot in (0, 2))
    assert f"FaceSnap: {__version__}, FaceSnap references: {digests}, FaceSnap weight: 1" in opened.infotext()


def test_another_photo_with_the_same_file_name_is_used(opened):
    opened.upload("references", photo(ADA))
    opened.generate()
    opened.clear("references")
    opened.at("seen").wait_for(state="hidden")
    opened.upload("references", photo(BOB))
    seen = embedding(opened.generate())
    assert seen @ embedding(photo(BOB)) > seen @ embedding(photo(ADA)) + MARGIN
    assert f"references: {Photo(photo(BOB), '').digest[:10]}, " in opened.infotext()


@with_one_gradio
def test_two_people_appear_on_their_own_sides(opened):
    opened.side("width", 2 * SIDE)
    for number, index, x in ((1, BOB, 0.25), (2, ADA, 0.75)):
        suffix = "" if number == 1 else f"_{number}"
        opened.person(number)
        if number > 1:
            opened.tick(f"enable{suffix}")
        opened.upload(f"references{suffix}", photo(index))
        opened.choose(f"pose{suffix}", "sliders")
        opened.tick(f"placed{suffix}")
        opened.number(f"x{suffix}", x)
        opened.choose(f"region{suffix}", "face")
    image = opened.generate()
    assert image.shape == (SIDE, 2 * SIDE, 3)
    left, right = (embedding(photo(index)) for index in (BOB, ADA))
    seen = by_side(image)
    assert seen[0] @ left > seen[0] @ right
    assert seen[1] @ right > seen[1] @ left
    assert "FaceSnap 2 x: 0.75" in opened.infotext()


@with_one_gradio
def test_photos_of_two_people_and_one_click_place_them_side_by_side(opened):
    opened.side("width", 2 * SIDE)
    opened.upload("references", photo(BOB))
    button = opened.at("pose_part_2", "[data-facesnap-side-by-side]")
    opened.person(2)
    assert not opened.at("enable_2", "input").is_checked()
    assert not button.is_visible()
    opened.upload("references_2", photo(ADA))
    button.wait_for()
    assert opened.at("enable_2", "input").is_checked(), "the photo adds the person"
    button.click()
    opened.wait_for_numbers(["x", "x_2"], [0.25, 0.75])
    button.wait_for(state="hidden")
    assert len(by_side(opened.generate())) == 2
    infotext = opened.infotext()
    for number, x in (("", 0.25), (" 2", 0.75)):
        assert f"FaceSnap{number} x: {x}" in infotext
        assert f"FaceSnap{number} region: face" in infotext


@with_one_gradio
def test_parts_that_depend_on_the_settings_are_hidden_until_a_script_has_read_them(opened):
    shown = opened.page.evaluate(
        """contents => ["placed", "posed", "shown", "mixed"].filter(kind => {
            const parts = [...document.querySelectorAll(`${contents} .facesnap-when-${kind}`)];
            for (const {attributes} of document.querySelectorAll(`[data-facesnap-${kind}]`)) {
                attributes.removeNamedItem(`data-facesnap-${kind}`);
            }
            return !parts.length || parts.some(part => getComputedStyle(part).display !== "none");
        })""",
        f"{FACESNAP}enable_contents",
    )
    assert shown == []


def test_a_removed_person_stays_removed(opened):
    opened.person(2)
    opened.upload("references_2", photo(ADA))
    opened.at("enable_2", "input:checked").wait_for()
    opened.at("enable_2", "input").uncheck()
    opened.open("advanced_2")
    opened.page.wait_for_timeout(SECOND)
    assert not opened.at("enable_2", "input").is_checked()


def test_a_new_page_lists_people_and_a_person_without_a_photo_gets_the_front_view(opened, url, browser):
    opened.upload("references", photo(ADA))
    opened.at("save_part", "summary").click()
    opened.text("name", "Ada on a new page")
    opened.press("save")
    opened.at("pose", "input[value=front]:checked").wait_for()
    assert isinstance(opened.generate(), np.ndarray)
    other = Page(url, browser)
    other.enable()
    other.choose("identity", "Ada on a new page")
    other.at("pose", "input[value=front]:checked").wait_for()
    assert isinstance(other.generate(), np.ndarray)
    assert other.errors == []
    other.close()


def by_side(image: np.ndarray) -> list[np.ndarray]:
    """Embeddings of the largest faces in the left and in the right half."""
    sides = {}
    for face in faces.find_faces(judge().pack, Photo(image, "Image")):
        side = int(face.box[[0, 2]].mean() > image.shape[1] / 2)
        sides.setdefault(side, face.embedding / np.linalg.norm(face.embedding))
    return [sides[0], sides[1]]  # a KeyError means that one half has no face


def test_infotext_with_a_saved_person_reproduces_the_image_on_another_page(posed, url, browser):
    """No photo is needed, and the image is bit-identical."""
    posed.at("save_part", "summary").click()
    posed.text("name", "Ada of the test")
    posed.press("save")
    posed.wait_for_text("people_report", "Saved as Ada of the test.safetensors")
    posed.at("seen", ".facesnap-card").wait_for(state="detached")
    assert posed.value("identity") == "Ada of the test"
    posed.number("yaw", 20)
    posed.number("mouth", 0.4)
    posed.tick("placed")
    posed.number("x", 0.45)
    posed.choose("preset", "balanced")
    posed.wait_for_numbers(["weight", "end"], [0.8, 0.8])
    posed.tick("cond_only")
    posed.choose("hires", "first")
    posed.text("block_weights", "1 1 1 1 1 1 0.5")
    posed.choose("region", "face")
    posed.number("region_scale", 2.5)
    image = posed.generate()
    assert isinstance(image, np.ndarray), image
    infotext = posed.infotext()
    for part in ("identity: Ada of the test", "yaw: 20", "x: 0.45", "weight: 0.8", "end: 0.8", "cond only: True"):
        assert f"FaceSnap {part}" in infotext
    assert "references" not in infotext

    other = Page(url, browser)
    other.enable()
    other.paste(infotext)
    other.wait_for_numbers(["yaw", "x", "weight", "region_scale"], [20, 0.45, 0.8, 2.5])
    again = other.generate()
    assert isinstance(again, np.ndarray), again
    assert other.infotext() == infotext
    assert np.array_equal(again, image)
    assert other.errors == []
    other.close()


def test_errors_are_shown_and_do_not_affect_the_next_job(page):
    plain = page.generate()
    page.enable()
    assert page.generate() == (
        "FaceSnapError: FaceSnap is enabled without a reference photo; add one or disable FaceSnap."
    )
    page.upload("references", NO_FACE)
    error = page.generate()
    assert error.startswith("FaceSnapError: No face was found in photo0.png")
    assert len(error.splitlines()) == 1
    page.enable(False)
    assert np.array_equal(page.generate(), plain)
    assert "FaceSnap" not in page.infotext()
