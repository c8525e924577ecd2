"""The measurements of the second edition, with embeddings whose answers are known."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from facesnap_lab.miniature.measure import angle, likeness
from facesnap_lab.miniature.second import measure as module
from facesnap_lab.miniature.second import world
from facesnap_lab.miniature.second.judges import JUDGES
from facesnap_lab.miniature.second.measure import (
    Drawn,
    Known,
    choices,
    exchanged,
    identified,
    look_alike,
    pose_rows,
    recognition_rows,
)
from facesnap_lab.miniature.second.world import LOOK_TRAITS, PERSON_TRAITS, person, scene, subject
from facesnap_lab.statistics import crossed_bootstrap

PICTURE = np.zeros((8, 8, 3), np.uint8)
PEOPLE = 6


def embedding(*values):
    vector = np.array(values, float)
    return dict.fromkeys(JUDGES, vector / np.linalg.norm(vector))


def known_person(index, **changes):
    """A person whose photos point along an axis of their own, with a little of the look's axis."""
    axis = np.eye(PEOPLE + 2)[index]
    exchanged_photos = {trait: embedding(*(axis + np.eye(PEOPLE + 2)[-1])) for trait in PERSON_TRAITS + LOOK_TRAITS}
    values = {
        "reference": PICTURE,
        "alike": PICTURE,
        "embedded": {
            "reference": embedding(*axis),
            "second": embedding(*axis),
            "driving": embedding(*np.eye(PEOPLE + 2)[(index + 1) % PEOPLE]),
            "alike": embedding(*(axis + np.eye(PEOPLE + 2)[PEOPLE])),
        },
        "other_looks": [embedding(*axis)],
        "exchanged": exchanged_photos,
    }
    return Known(**{**values, **changes})


def test_a_perfect_picture_passes_everything_and_another_persons_nothing():
    everybody = [known_person(i) for i in range(PEOPLE)]
    own = [known.embedded["reference"] for known in everybody]
    swapped = [*own[1:], own[0]]
    for name in JUDGES:
        rows = recognition_rows(everybody, [own, swapped], name)
        assert rows["picture, similarity"].shape == (2, PEOPLE)
        np.testing.assert_allclose(rows["picture, similarity"], [[1] * PEOPLE, [0] * PEOPLE])
        np.testing.assert_allclose(rows["picture, identified"], [[1] * PEOPLE, [0] * PEOPLE])
        np.testing.assert_allclose(rows["position"], [[1] * PEOPLE, [0] * PEOPLE])
        np.testing.assert_allclose(rows["look-alike, similarity"], np.sqrt(0.5))
        np.testing.assert_allclose(rows["picture above look-alike"][0], 1 - np.sqrt(0.5))
        for trait in PERSON_TRAITS:
            assert rows[f"picture, {trait}"].tolist() == [[1] * PEOPLE, [0] * PEOPLE]
        assert (f"picture, {LOOK_TRAITS[0]}" in rows) == (name == "details")  # the others see any look


def test_a_picture_without_a_face_fails_every_test():
    known = known_person(0)
    nothing = dict.fromkeys(JUDGES)
    for name in JUDGES:
        assert set(choices(nothing, known, name).values()) == {0.0}
        assert identified(nothing, [known], 0, name) == 0
    assert likeness(None, np.ones(3)) == 0


def test_exchanges_that_cannot_be_seen_are_left_out():
    known = known_person(0)
    hidden = dataclasses.replace(known, exchanged={**known.exchanged, "moles": None})
    found = choices(known.embedded["reference"], hidden, "judge")
    assert np.isnan(found["moles"])
    assert all(value == 1 for trait, value in found.items() if trait != "moles")
    rows = recognition_rows([hidden, known_person(1)], [[known.embedded["reference"]] * 2], "judge")
    assert crossed_bootstrap(rows["picture, moles"]).mean == 0  # of the second person alone


@pytest.mark.parametrize("index", [0, 3, 11])
def test_a_look_alike_shares_type_but_not_face(index):
    who, alike = subject("test", index, 0), look_alike(index)
    for name in ("hair", "hair_colour", "beard", "moustache", "glasses_round", "brow_thickness", "brow_arch"):
        assert getattr(who, name) == getattr(alike, name)
    for name in ("skin", "brow_rgb", "lips", "hair_rgb"):
        np.testing.assert_array_equal(getattr(who, name), getattr(alike, name))
    assert np.abs(who.shape - alike.shape).max() > 0.5
    assert who.moles.shape != alike.moles.shape or not np.allclose(who.moles, alike.moles)


@pytest.mark.parametrize("trait", PERSON_TRAITS + LOOK_TRAITS)
def test_only_the_exchanged_trait_changes(trait):
    who, other = subject("test", 2, 0), exchanged(2, trait)
    fields = world._FIELDS
    changed = {
        field.name
        for field in dataclasses.fields(who)
        if not np.array_equal(np.asarray(getattr(who, field.name)), np.asarray(getattr(other, field.name)))
    }
    assert changed
    assert changed <= set(fields[trait])


def test_pose_and_expression_are_compared_with_the_driving_scene(monkeypatch):
    scenes = [scene(person("test", index), 1) for index in range(20)]
    drawn = [[Drawn(PICTURE, PICTURE, (0, 0, 0, 0), one) for one in scenes]]
    estimates = iter([(0.5 * np.array(one.codes), np.array(one.pose[:3]) * 1.0) for one in scenes[:-1]])
    monkeypatch.setattr(module, "expression_and_pose", lambda encoders, seen: None if seen is None else next(estimates))
    rows = pose_rows(None, drawn, [[PICTURE] * 19 + [None]])
    assert np.nanmax(rows["pose error"]) < 0.1
    assert np.isnan(rows["pose error"][0, -1])
    for move in module.MOVES:
        assert rows[f"{move}, correlation"] == pytest.approx(1)
        assert rows[f"{move}, slope"] == pytest.approx(0.5)


@pytest.mark.parametrize("found", [0, 1])
def test_expressions_of_fewer_than_two_faces_are_not_compared(monkeypatch, found):
    one = scene(person("test", 0), 1)
    monkeypatch.setattr(
        module, "expression_and_pose", lambda encoders, seen: seen and (np.array(one.codes), np.array(one.pose[:3]))
    )
    drawn = [[Drawn(PICTURE, PICTURE, (0, 0, 0, 0), one)] * 2]
    rows = pose_rows(None, drawn, [[True] * found + [None] * (2 - found)])
    assert all(rows[f"{move}, {figure}"] is None for move in module.MOVES for figure in ("correlation", "slope"))


def test_angles_between_rotations():
    assert angle(np.array([0, 0.3, 0]), np.array([0, 0.5, 0])) == pytest.approx(np.rad2deg(0.2), abs=1e-2)
    assert angle(np.array([0.2, 0, 0]), np.array([0.2, 0, 0])) == pytest.approx(0, abs=0.05)


def test_crossed_bootstrap_counts_people_and_seeds():
    random = np.random.default_rng(0)
    people, seeds = random.normal(0, 1, 40), random.normal(0, 2, 5)
    only_people = crossed_bootstrap(np.tile(people, (5, 1)))
    both = crossed_bootstrap(people + seeds[:, None])
    assert only_people.high - only_people.low == pytest.approx(2 * 1.96 * people.std() / 40**0.5, rel=0.1)
    expected = 2 * 1.96 * np.sqrt(people.var() / 40 + seeds.var() / 5)
    assert both.high - both.low == pytest.approx(expected, rel=0.15)
    assert both.low < both.mean < both.high
    assert crossed_bootstrap(np.array([[1.0]])).low is None
