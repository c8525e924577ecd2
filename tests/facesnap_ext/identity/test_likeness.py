"""How like a finished picture is: by the right face, on the right scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from facesnap_ext.engine import Engine
from facesnap_ext.identity.faces import Face, NoFaceError, find_faces
from facesnap_ext.identity.likeness import face_at, infotext, likeness, sentence
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.photos import Photo
from facesnap_ext.weights.search import find_models


def face(embedding, box=(0, 0, 10, 10), width=100, height=80):
    photo = Photo(np.zeros((height, width, 3), np.uint8), "picture")
    points = np.zeros((5, 2), np.float32)
    return Face(photo, np.array(box, np.float32), points, np.array(embedding, np.float32), 1.0, False, 640)


@given(st.floats(0, np.pi), st.floats(0.1, 50), st.floats(0.1, 50))
def test_one_reference_gives_the_cosine_of_the_angle(angle, length, other):
    reference = other * torch.tensor([[1.0, 0.0, 0.0]])
    measured = likeness(face([length * np.cos(angle), length * np.sin(angle), 0]), reference)
    assert measured == pytest.approx(np.cos(angle), abs=1e-5)


def test_every_reference_counts_alike_however_long_its_embedding():
    """Between two references at a right angle, each has a cosine of 1/√2 with their mean."""
    references = torch.tensor([[100.0, 0.0], [0.0, 0.1]])
    for embedding in ([3.0, 0.0], [0.0, 3.0]):
        assert likeness(face(embedding), references) == pytest.approx(0.5**0.5, abs=1e-6)
    assert likeness(face([1.0, 1.0]), references) == pytest.approx(1, abs=1e-6)


def test_the_same_person_is_liker_than_everybody_else(face_pack, astronaut, group):
    (own,) = find_faces(face_pack, astronaut)
    mirrored = Photo(np.ascontiguousarray(astronaut.pixels[:, ::-1]), "mirrored")
    (again,) = find_faces(face_pack, mirrored)
    reference = torch.from_numpy(own.embedding)[None]
    strangers = [likeness(stranger, reference) for stranger in find_faces(face_pack, group)]
    assert likeness(own, reference) == pytest.approx(1, abs=1e-5)
    assert likeness(again, reference) > 0.6 > 0.4 > max(strangers)


@pytest.mark.parametrize("scale", [0.5, 1, 2])
def test_the_face_where_the_landmarks_are_is_measured_at_any_size_of_the_picture(face_pack, group, scale):
    found = find_faces(face_pack, group)
    for wanted in found:
        left, top, right, bottom = wanted.box
        points = np.random.default_rng(0).uniform((left, top), (right, bottom), (72, 2)).astype(np.float32)
        landmarks = Landmarks(points * np.float32(scale), round(1280 * scale), round(886 * scale))
        assert face_at(found, landmarks) is wanted
    assert face_at(found, None) is found[0]


def test_the_engine_measures_the_face_that_was_asked_for_or_none(stand_ins, group, monkeypatch):
    def no_face(pack, photo):
        raise NoFaceError(photo.name)

    engine = Engine(lambda: find_models(stand_ins))
    found = engine.encoders(find_models(stand_ins)).faces(group)
    references = torch.from_numpy(found[4].embedding)[None]
    for i in (4, 1):
        box = found[i].box.reshape(2, 2)
        landmarks = Landmarks(np.linspace(box[0], box[1], 72).astype(np.float32), 1280, 886)
        measured = engine.likeness(group, references, landmarks)
        assert (measured == pytest.approx(1, abs=1e-5)) == (i == 4)
    monkeypatch.setattr("facesnap_ext.identity.faces.find_faces", no_face)
    grey = Photo(np.full((64, 64, 3), 128, np.uint8), "grey")
    assert engine.likeness(grey, references, None) is None


def test_words_and_infotext():
    assert infotext(0.6249) == {"FaceSnap likeness": "0.62"}
    assert infotext(None) == {}
    assert "0.62" in sentence(0.6249)
    assert sentence(None).startswith("No face")
