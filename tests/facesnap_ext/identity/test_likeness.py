"""Likeness: selection of the face in a generated image, and the measured value."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from facesnap_ext.conditioning import Placement
from facesnap_ext.engine import Engine
from facesnap_ext.identity.faces import Face, NoFaceError, find_faces
from facesnap_ext.identity.likeness import likeness, match_faces
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.photos import Photo
from facesnap_ext.regions import PaintedRegion
from facesnap_ext.weights.search import find_models


def face(embedding, box=(0, 0, 10, 10), width=100, height=80):
    photo = Photo(np.zeros((height, width, 3), np.uint8), "image")
    points = np.zeros((5, 2), np.float32)
    return Face(photo, np.array(box, np.float32), points, np.array(embedding, np.float32), 1.0, False, 640)


@given(st.floats(0, np.pi), st.floats(0.1, 50), st.floats(0.1, 50))
def test_likeness_to_one_reference_is_the_cosine_of_the_angle(angle, norm, reference_norm):
    reference = reference_norm * torch.tensor([[1.0, 0.0, 0.0]])
    measured = likeness(face([norm * np.cos(angle), norm * np.sin(angle), 0]), reference)
    assert measured == pytest.approx(np.cos(angle), abs=1e-5)


def test_references_have_equal_weight_regardless_of_their_norm():
    """Each of two orthogonal references has a cosine of 1/√2 to their mean direction."""
    references = torch.tensor([[100.0, 0.0], [0.0, 0.1]])
    for embedding in ([3.0, 0.0], [0.0, 3.0]):
        assert likeness(face(embedding), references) == pytest.approx(0.5**0.5, abs=1e-6)
    assert likeness(face([1.0, 1.0]), references) == pytest.approx(1, abs=1e-6)


def test_same_person_has_the_highest_likeness(face_pack, astronaut, group):
    (original,) = find_faces(face_pack, astronaut)
    mirrored_photo = Photo(np.ascontiguousarray(astronaut.pixels[:, ::-1]), "mirrored")
    (mirrored,) = find_faces(face_pack, mirrored_photo)
    reference = torch.from_numpy(original.embedding)[None]
    strangers = [likeness(stranger, reference) for stranger in find_faces(face_pack, group)]
    assert likeness(original, reference) == pytest.approx(1, abs=1e-5)
    assert likeness(mirrored, reference) > 0.6 > 0.4 > max(strangers)


@pytest.mark.parametrize("scale", [0.5, 1, 2])
def test_face_nearest_to_the_landmarks_is_selected_at_any_image_size(face_pack, group, scale):
    faces = find_faces(face_pack, group)
    for expected in faces:
        left, top, right, bottom = expected.box
        points = np.random.default_rng(0).uniform((left, top), (right, bottom), (72, 2)).astype(np.float32)
        landmarks = Landmarks(points * np.float32(scale), round(1280 * scale), round(886 * scale))
        assert match_faces(faces, [Placement(landmarks, None)]) == [expected]
    assert match_faces(faces, [Placement(None, None)]) == [faces[0]]


def square(x: float, y: float, side: float = 20, width: int = 200, height: int = 100) -> Face:
    """A face centred at this point of an image of 200 × 100 pixels."""
    photo = Photo(np.zeros((height, width, 3), np.uint8), "image")
    box = np.float32([x - side / 2, y - side / 2, x + side / 2, y + side / 2])
    return replace(face([1.0, 0.0]), photo=photo, box=box)


def at(x: float, y: float, region=None) -> Placement:
    points = np.float32([[x - 5, y - 5], [x + 5, y + 5]]).repeat(36, axis=0)
    return Placement(Landmarks(points, 200, 100), region)


def test_each_person_has_the_face_at_their_place():
    left, right = square(50, 50), square(150, 50)
    assert match_faces([right, left], [at(40, 55), at(160, 40)]) == [left, right]
    assert match_faces([right, left], [at(160, 40), at(40, 55)]) == [right, left]
    assert match_faces([], [at(40, 55), at(1, 1)]) == [None, None]


def test_a_person_without_a_face_does_not_get_that_of_a_neighbour():
    left = square(50, 50)
    assert match_faces([left], [at(50, 50), at(150, 50)]) == [left, None]
    assert match_faces([left], [at(150, 50)]) == [left]  # a single person has moved


def test_several_people_at_one_position_share_a_face():
    middle = square(100, 50)
    assert match_faces([middle], [at(101, 50), at(98, 50)]) == [middle, middle]


def test_a_painted_region_contains_its_persons_face():
    mask = np.zeros((10, 20), np.float32)
    mask[:, 10:] = 1
    left, right = square(50, 50, 30), square(150, 50)
    painted = PaintedRegion(mask)
    assert match_faces([left, right], [Placement(None, painted)]) == [right]
    assert match_faces([left], [Placement(None, painted)]) == [None]
    assert match_faces([left, right], [at(60, 50, painted), at(50, 50)]) == [right, left]
    assert match_faces([left, right], [Placement(None, None), at(150, 50, painted)]) == [left, right]


def test_a_person_without_a_place_has_the_largest_face_that_remains():
    large, middle, small = square(50, 50, 40), square(100, 50, 30), square(150, 50)
    anywhere = Placement(None, None)
    assert match_faces([large, middle, small], [anywhere, at(55, 50)]) == [middle, large]
    assert match_faces([large, middle, small], [anywhere, anywhere]) == [large, large]
    assert match_faces([large], [anywhere, at(55, 50)]) == [None, large]


@given(st.lists(st.tuples(st.floats(0, 200), st.floats(0, 100)), min_size=1, max_size=5), st.data())
def test_matching_does_not_depend_on_the_order_of_people_or_faces(places, data):
    """Each person's face is the nearest to them, and no other person is nearer unless both places are on it."""
    faces = [square(*data.draw(st.tuples(st.floats(0, 200), st.floats(0, 100)))) for _ in places]
    people = [at(x, y) for x, y in places]
    found = match_faces(faces, people)
    assert [*reversed(match_faces(faces, people[::-1]))] == found
    distance = [[np.hypot(*(face.box.reshape(2, 2).mean(0) - place)) for face in faces] for place in places]
    for person, face in enumerate(found):
        if face is not None:
            column = next(i for i, one in enumerate(faces) if one is face)
            on_it = abs(distance[person][column]) <= 10 * 2**0.5 + 1e-3
            assert on_it or distance[person][column] <= min(row[column] for row in distance) + 1e-3


def test_engine_measures_the_selected_face_or_returns_none(stand_ins, group, monkeypatch):
    def no_face(pack, photo):
        raise NoFaceError(photo.name)

    engine = Engine(lambda: find_models(stand_ins))
    faces = engine.encoders(find_models(stand_ins)).faces(group)
    references = torch.from_numpy(faces[4].embedding)[None]
    for i in (4, 1):
        box = faces[i].box.reshape(2, 2)
        landmarks = Landmarks(np.linspace(box[0], box[1], 72).astype(np.float32), 1280, 886)
        person = SimpleNamespace(embeddings=references, face_pack=None)
        [measured] = engine.likenesses(group, [person], [Placement(landmarks, None)])
        assert (measured == pytest.approx(1, abs=1e-5)) == (i == 4)
    monkeypatch.setattr("facesnap_ext.identity.faces.find_faces", no_face)
    grey = Photo(np.full((64, 64, 3), 128, np.uint8), "grey")
    unknown = SimpleNamespace(embeddings=None, face_pack=None)
    assert engine.likenesses(grey, [person], [Placement(None, None)]) == [None]
    assert engine.likenesses(group, [unknown], [Placement(None, None)]) == [None]
