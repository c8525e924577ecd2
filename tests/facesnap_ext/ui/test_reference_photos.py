"""The cards of reference photos: what each says, and which photos its buttons keep."""

from __future__ import annotations

import html
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from facesnap_ext.engine import Engine
from facesnap_ext.identity.references import FINDINGS, UNUSABLE, examine
from facesnap_ext.photos import NamedFile, Photo, file_title
from facesnap_ext.ui.photo_cards import BADGES, Card, cards_html
from facesnap_ext.weights.model_files import ModelFiles

cv2 = pytest.importorskip("cv2")
pytest.importorskip("insightface")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def badges(cards: str) -> list[list[str]]:
    """The texts of the badges on each card."""
    return [re.findall(r"facesnap-badge [^>]*>([^<]*)<", card) for card in cards.split("facesnap-card'")[1:]]


def keeps(cards: str, do: str) -> list[list[int]]:
    """The photos that the buttons of one kind keep, in order; disabled buttons keep none."""
    found = re.findall(rf"data-facesnap-do='{do}' data-facesnap-keep='([^']*)'", cards)
    return [[int(i) for i in text.split(",") if i] for text in found]


def removals(cards: str) -> list[str]:
    """The names of the photos that the buttons remove, for screen readers."""
    return re.findall(r"<span>Remove</span> <span translate='no'>([^<]*)</span>", cards)


@pytest.fixture
def photos_by_badge(astronaut, grace_hopper, group) -> dict[str, bytes]:
    face = astronaut.pixels[:260, 120:380]
    return {
        "good": png(grace_hopper.pixels),
        "small": png(cv2.resize(grace_hopper.pixels, None, fx=0.35, fy=0.35, interpolation=cv2.INTER_AREA)),
        "blurred": png(cv2.GaussianBlur(grace_hopper.pixels, (0, 0), 12)),
        "turned": png(np.rot90(grace_hopper.pixels)),
        "close-up": png(face[70:165, 58:153]),
        "several faces": png(group.pixels),
        "no face": png(np.full((64, 64, 3), 128, np.uint8)),
        "unreadable": b"not an image",
    }


@pytest.mark.parametrize(
    "badge", ["good", "small", "blurred", "turned", "close-up", "several faces", "no face", "unreadable"]
)
def test_each_kind_of_photo_has_its_badge(page, engine, photos_by_badge, badge):
    shown = page.reference_photos.check_references(engine, [photos_by_badge[badge]], 0)
    (found,) = badges(shown)
    assert badge in found
    assert ("good" in found) == (badge == "good")


def test_someone_else_has_a_badge(engine, astronaut):
    """The stand-in for ArcFace cannot tell people apart, so the embeddings are given."""
    (face,) = engine.encoders().faces(astronaut)
    faces = [replace(face, embedding=np.eye(4, dtype=np.float32)[i]) for i in (0, 0, 0, 1)]
    report = examine([(astronaut, [face]) for face in faces])
    shown = cards_html([Card("photo", astronaut, reference) for reference in report.references])
    assert ["someone else" in found for found in badges(shown)] == [False, False, False, True]
    assert "likeness:</span> <span translate='no'>0.00</span>" in shown


def test_a_missing_face_has_a_badge_and_the_others_can_be_chosen(page, engine, astronaut):
    missing = page.reference_photos.check_references(engine, [png(astronaut.pixels)], 3)
    assert badges(missing) == [["no such face"]]
    assert "data-facesnap-face='0'" in missing


def test_every_finding_has_a_badge():
    assert set(BADGES) == {"good", "unchecked", "unreadable", *FINDINGS}
    assert all(BADGES[kind][0] == "error" for kind in UNUSABLE)


def test_unusable_photos_do_not_hide_the_others_and_can_be_left_out(page, engine, photos_by_badge):
    order = ("no face", "good", "unreadable", "small")
    shown = page.reference_photos.check_references(engine, [photos_by_badge[badge] for badge in order], 0)
    assert [badge in found for badge, found in zip(order, badges(shown))] == [True] * 4
    assert keeps(shown, "leave_out") == [[1, 3]]
    assert "Remove unusable photos</span> <span translate='no'>(2)</span>" in shown
    usable = page.reference_photos.check_references(engine, [photos_by_badge["good"]], 0)
    assert keeps(usable, "leave_out") == []


def test_without_a_face_model_pack_photos_can_still_be_removed(page, photos_by_badge, tmp_path):
    engine = Engine(lambda: ModelFiles(tmp_path))
    shown = page.reference_photos.check_references(engine, [photos_by_badge["good"]], 0)
    assert badges(shown) == [["not checked"]]
    assert keeps(shown, "remove") == [[]]
    assert "facesnap-problem" in shown


@given(st.integers(1, 6))
def test_buttons_remove_one_photo_or_move_it_by_one(count):
    shown = cards_html([Card(f"{i}.png", error="damaged") for i in range(count)])
    everything = list(range(count))
    assert keeps(shown, "remove") == [[j for j in everything if j != i] for i in everything]
    for do, step in (("left", -1), ("right", 1)):
        moved = keeps(shown, do)
        assert len(moved) == (count if count > 1 else 0)
        for i, keep in enumerate(moved):
            if not 0 <= i + step < count:
                assert keep == []
                continue
            assert sorted(keep) == everything
            assert keep.index(i) == i + step
            assert [j for j in keep if j not in (i, i + step)] == [j for j in everything if j not in (i, i + step)]


@given(st.text(max_size=80) | st.text("<>'\"&\n\u202e/", max_size=80))
def test_any_file_name_stays_text_in_the_html(name):
    title = file_title(name)
    shown = cards_html([Card(title, error="damaged"), Card(title, Photo(np.zeros((4, 4, 3), np.uint8), title))])
    assert "\n" not in shown
    plain = cards_html([Card("x", error="damaged"), Card("x", Photo(np.zeros((4, 4, 3), np.uint8), "x"))])
    tags = [re.sub(r"='[^']*'", "", tag) for tag in re.findall(r"<[^>]*>", shown)]
    assert tags == [re.sub(r"='[^']*'", "", tag) for tag in re.findall(r"<[^>]*>", plain)]
    assert html.unescape(removals(shown)[0]) == title


def test_files_are_called_by_their_names_on_the_cards(page, engine, photos_by_badge, tmp_path):
    path = tmp_path / "stored.png"
    path.write_bytes(photos_by_badge["no face"])
    files = [NamedFile(path, "portrait.jpg"), NamedFile(path, "portrait.jpg"), photos_by_badge["no face"]]
    shown = page.reference_photos.check_references(engine, files, 0)
    assert removals(shown) == ["portrait.jpg", "portrait.jpg (2)", "Reference photo 3"]
