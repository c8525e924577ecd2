"""The tests of the individual, with an embedding that knows the answer: the pixels themselves."""

from dataclasses import fields

import numpy as np
import pytest

from facesnap_lab.miniature.dataset import SIDE
from facesnap_lab.miniature.individual import DONORS, TRAITS, TRIES, TYPE, exchanged, look_alike, measure_individual
from facesnap_lab.miniature.render import render
from facesnap_lab.miniature.world import Person, person, scene

PEOPLE = 6


def pixels(picture):
    vector = picture.astype(np.float64).ravel() - 127.5
    return vector / np.linalg.norm(vector)


def photo(who, of):
    return render([who], [scene(of, 0)], SIDE)[0].picture


@pytest.fixture(scope="module")
def references():
    return [photo(person("test", i), person("test", i)) for i in range(PEOPLE)]


def test_traits_are_everything_that_two_people_differ_in():
    names = [name for trait in TRAITS.values() for name in trait]
    assert sorted([*names, "split", "index"]) == sorted(field.name for field in fields(Person))


def test_the_reference_itself_passes_every_test(references):
    found = measure_individual(pixels, references)
    assert all(found["forced_choice"]["pictures"][trait] == [1, 1, 1] for trait in TRAITS)
    assert found["identified_pictures"] == found["closer_than_look_alike"] == [1, 1, 1]
    assert found["likeness_pictures"] == [1, 1, 1]
    assert found["above_look_alike"][1] > 0


@pytest.mark.parametrize("trait", TRAITS)
def test_a_picture_with_a_trait_exchanged_fails_in_that_trait_alone(references, trait):
    pictures = []
    for i in range(PEOPLE):
        who = person("test", i)
        pictures.append(photo(exchanged(who, trait, DONORS + TRIES * i), who))
    found = measure_individual(pixels, pictures)["forced_choice"]["pictures"]
    assert found[trait][0] == 0
    others = [found[other][0] for other in TRAITS if other != trait]
    assert np.mean(others) > 0.6  # a large change, such as hair, hides a mole in the pixels


def test_a_picture_without_a_face_fails_every_test(references):
    faceless = np.zeros_like(references[0])

    def embed(picture):
        return None if picture is faceless else pixels(picture)

    found = measure_individual(embed, [*references[:-1], faceless])
    share = pytest.approx((PEOPLE - 1) / PEOPLE, abs=1e-3)
    assert all(found["forced_choice"]["pictures"][trait][0] == share for trait in TRAITS)
    assert found["identified_pictures"][0] == found["closer_than_look_alike"][0] == share


def test_the_pictures_of_the_wrong_people_are_not_identified(references):
    found = measure_individual(pixels, references[1:] + references[:1])
    assert found["identified_pictures"] == [0, 0, 0]


def test_a_look_alike_shares_the_type_and_has_a_different_face():
    who, other = person("test", 3), look_alike(person("test", 3), DONORS)
    for trait, names in TRAITS.items():
        same = all(np.array_equal(getattr(who, name), getattr(other, name)) for name in names)
        assert same == (trait in TYPE), trait
