"""FaceSnap's settings in infotext, and pasting them back."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facesnap_ext import __version__
from facesnap_ext.landmarks.movements import MOVEMENTS
from facesnap_ext.landmarks.open_face import load_basis
from facesnap_ext.landmarks.poses import TEMPLATES, pose_points
from facesnap_ext.landmarks.rigs import open_face_rig
from facesnap_ext.photos import Photo
from facesnap_ext.settings.infotext import DEFAULTS, OLD_NAMES, PHOTOS, from_infotext, in_use, label, to_infotext
from facesnap_ext.settings.pose import custom_expression, pose_from_unit
from facesnap_ext.settings.unit import CHOICES, OPTIONAL, RANGES, Unit, defaults, from_values
from tests.support.units import make_unit

PHOTO = Photo(np.arange(48, dtype=np.uint8).reshape(4, 4, 3), "photo.png")
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
    if name == "block_weights":
        return st.lists(st.floats(0, 2), max_size=10).map(tuple)
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(0, 9)
    return st.just("") | NAMES


UNITS = st.builds(make_unit, **{name: a_field(name, one) for name, one in DEFAULTS.items() if name not in PHOTOS})


@given(st.dictionaries(st.integers(1, 4), UNITS, max_size=3))
def test_pasting_infotext_restores_the_same_settings(units):
    """The settings are converted to text and back, as when the host reads them from an image."""
    text = {name: str(value) for name, value in to_infotext(units).items()}
    for number in range(1, 6):
        pasted = from_infotext(text, number)
        assert from_values(pasted) == in_use(units[number]) if number in units else not pasted["enabled"]


RIG = open_face_rig(load_basis())


@given(UNITS)
def test_settings_that_infotext_leaves_out_do_not_change_the_image(unit):
    """The landmarks of a rigged pose, the expression added to a photo's landmarks, and everything else are the same."""
    pasted = from_values(from_infotext({name: str(value) for name, value in to_infotext({1: unit}).items()}, 1))
    assert pasted == in_use(pasted) == in_use(unit)
    if unit.expression_source == "custom":
        amounts = [asdict(custom_expression(one)) for one in (pasted, unit)]
        assert all(amounts[0][name] == amounts[1][name] for name in MOVEMENTS)
    assert (pasted.strength, pasted.x, pasted.y, pasted.size) == (unit.strength, unit.x, unit.y, unit.size)
    if unit.pose in ("template", "sliders"):
        points = [pose_points(RIG, pose_from_unit(one, 832, 1216), 832, 1216) for one in (pasted, unit)]
        np.testing.assert_array_equal(*points)
    kept = ("pose", "expression_source", "region", "reference_mode", "identity", "model", "redraw_strength")
    assert all(getattr(pasted, name) == getattr(unit, name) for name in kept)


@pytest.mark.parametrize(
    ("name", "value", "used_with"),
    [
        ("template", "far", {"pose": "template"}),
        ("saved_pose", "Smile", {"pose": "saved"}),
        ("yaw", 20.0, {"pose": "sliders"}),
        ("smile_left", 0.5, {"pose": "sliders"}),
        ("smile_left", 0.5, {"expression_source": "custom"}),
        ("expression", "wink", {"expression_source": "custom"}),
        ("expression_strength", 0.5, {"expression_source": "custom", "expression": "wink"}),
        ("driving", PHOTO, {"pose": "photo"}),
        ("driving", PHOTO, {"expression_source": "driving"}),
        ("driving_face_index", 1, {"pose": "photo"}),
        ("mask", PHOTO, {"region": "mask"}),
        ("region_scale", 2.0, {"region": "face"}),
    ],
)
def test_infotext_contains_only_what_was_used(name, value, used_with):
    unused = {"pose": "own", name: value}
    assert label(name, 1) not in to_infotext({1: make_unit(**unused)})
    assert label(name, 1) in to_infotext({1: make_unit(**unused | used_with)})


def test_a_unit_at_its_defaults_is_pasted_as_enabled():
    """Only the weight marks that the unit was used; without it, pasting would switch FaceSnap off."""
    text = to_infotext({1: Unit(True)})
    assert text["FaceSnap weight"] == 1.0
    assert from_infotext(text, 1) == {name: one for name, one in defaults().items() if name not in PHOTOS} | {
        "enabled": True
    }


@given(st.dictionaries(st.integers(1, 4), UNITS, max_size=3))
def test_names_of_saved_people_can_be_left_out(units):
    text = to_infotext(units, with_names=False)
    assert text == {name: value for name, value in to_infotext(units).items() if not name.endswith(" identity")}
    for number, unit in units.items():
        assert from_values(from_infotext(text, number)) == replace(in_use(unit), identity="")


def test_every_setting_is_written():
    assert set(DEFAULTS) == set(defaults()) - {"enabled"}


@given(UNITS)
def test_infotext_of_development_versions_can_still_be_pasted(unit):
    text = {name: str(value) for name, value in to_infotext({2: unit}).items()}
    old = {"fused": "mixed", "batch": "apart", "image": "everywhere", "mask": "drawn"}
    for name in ("reference_mode", "region"):
        if label(name, 2) in text:
            text[label(name, 2)] = old.get(text[label(name, 2)], text[label(name, 2)])
    for new, name in OLD_NAMES.items():
        if label(new, 2) in text:
            text[label(name, 2)] = text.pop(label(new, 2))
    assert from_values(from_infotext(text, 2)) == in_use(unit)


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 1))
def test_the_three_movements_of_development_versions_can_still_be_pasted(brows, eyes, mouth):
    text = {"FaceSnap": "0.9", "FaceSnap weight": "1.0", "FaceSnap pose": "sliders"}
    text |= {"FaceSnap brows": str(brows), "FaceSnap eyes": str(eyes), "FaceSnap mouth": str(mouth)}
    expected = make_unit(
        pose="sliders", mouth=mouth, brow_inner=brows, brow_outer_left=brows, brow_outer_right=brows, lid_left=eyes,
        lid_right=eyes,
    )  # fmt: skip
    assert from_values(from_infotext(text, 1)) == expected


def test_photos_are_written_as_hashes_and_never_by_name():
    photo = Photo(np.arange(48, dtype=np.uint8).reshape(4, 4, 3), "secret name.png")
    text = to_infotext({1: Unit(True, references=(photo, photo), driving=photo, mask=photo, region="mask")})
    digest = photo.digest[:10]
    assert text["FaceSnap references"] == f"{digest} {digest}"
    assert text["FaceSnap driving"] == text["FaceSnap mask"] == digest
    assert "secret" not in repr(text)


def test_only_images_made_with_facesnap_carry_its_mark():
    assert to_infotext({1: Unit(True)})["FaceSnap"] == __version__
    assert to_infotext({}) == {}
    assert not from_infotext({"Steps": "20"}, 1)["enabled"]


@pytest.mark.parametrize("value", ["much", ""])
def test_invalid_values_are_refused(value):
    with pytest.raises(ValueError, match=value):
        from_infotext({"FaceSnap": "1", "FaceSnap weight": value}, 1)
