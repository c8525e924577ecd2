"""What a picture's infotext says of FaceSnap, and that it leads back to the same settings."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facesnap_ext import __version__
from facesnap_ext.landmarks.poses import TEMPLATES
from facesnap_ext.photos import Photo
from facesnap_ext.settings.infotext import FIELDS, PHOTOS, from_infotext, to_infotext
from facesnap_ext.settings.unit import BLOCKS, CHOICES, RANGES, Unit

OPTIONAL = ("x", "y", "size")
NAMES = st.text(
    st.characters(whitelist_categories=("L", "N"), whitelist_characters=" ._-"), min_size=1, max_size=20
).filter(lambda name: name == name.strip())


def a_field(name: str, default) -> st.SearchStrategy:
    if name in RANGES:
        numbers = (st.integers if type(default) is int else st.floats)(*RANGES[name])
        return st.none() | numbers if name in OPTIONAL else numbers
    if name in CHOICES:
        return st.sampled_from(CHOICES[name])
    if name == "template":
        return st.sampled_from(sorted(TEMPLATES))
    if name == "blocks":
        return st.just(()) | st.lists(st.floats(0, 2), min_size=BLOCKS, max_size=BLOCKS).map(tuple)
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(0, 9)
    return st.just("") | NAMES


UNITS = st.builds(
    Unit, enabled=st.just(True), **{n: a_field(n, f.default) for n, f in FIELDS.items() if n not in PHOTOS}
)


@given(st.dictionaries(st.integers(1, 4), UNITS, max_size=3))
def test_it_leads_back_to_the_same_settings(units):
    """Through text, as the host reads it from the picture."""
    text = {name: str(value) for name, value in to_infotext(units).items()}
    for number in range(1, 6):
        found = from_infotext(text, number)
        assert Unit(**found) == units[number] if number in units else not found["enabled"]


def test_every_field_is_written():
    """A field that is added is added here too, by its default's type."""
    assert set(FIELDS) == {field.name for field in fields(Unit)} - {"enabled"}


def test_photos_are_named_by_their_content_and_nothing_else_is_known_of_them():
    photo = Photo(np.arange(48, dtype=np.uint8).reshape(4, 4, 3), "secret name.png")
    text = to_infotext({1: Unit(True, references=(photo, photo), driving=photo, mask=photo)})
    digest = photo.digest[:10]
    assert text["FaceSnap references"] == f"{digest} {digest}"
    assert text["FaceSnap driving"] == text["FaceSnap mask"] == digest
    assert "secret" not in repr(text)


def test_a_picture_says_that_facesnap_made_it_and_others_say_nothing():
    assert to_infotext({1: Unit(True)})["FaceSnap"] == __version__
    assert to_infotext({}) == {}
    assert not from_infotext({"Steps": "20"}, 1)["enabled"]


@pytest.mark.parametrize("value", ["much", ""])
def test_what_is_no_value_is_refused(value):
    with pytest.raises(ValueError, match=value):
        from_infotext({"FaceSnap": "1", "FaceSnap weight": value}, 1)
