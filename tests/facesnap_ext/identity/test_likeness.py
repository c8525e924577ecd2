"""Likeness: selection of the face in a generated image, and the measured value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from facesnap_ext.engine import Engine
from facesnap_ext.identity.faces import Face, NoFaceError, find_faces
from facesnap_ext.identity.likeness import face_at, infotext, likeness
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.photos import Photo
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
        assert face_at(faces, landmarks) is expected
    assert face_at(faces, None) is faces[0]


def test_engine_measures_the_selected_face_or_returns_none(stand_ins, group, monkeypatch):
    def no_face(pack, photo):
        raise NoFaceError(photo.name)

    engine = Engine(lambda: find_models(stand_ins))
    faces = engine.encoders(find_models(stand_ins)).faces(group)
    references = torch.from_numpy(faces[4].embedding)[None]
    for i in (4, 1):
        box = faces[i].box.reshape(2, 2)
        landmarks = Landmarks(np.linspace(box[0], box[1], 72).astype(np.float32), 1280, 886)
        measured = engine.likeness(group, references, landmarks)
        assert (measured == pytest.approx(1, abs=1e-5)) == (i == 4)
    monkeypatch.setattr("facesnap_ext.identity.faces.find_faces", no_face)
    grey = Photo(np.full((64, 64, 3), 128, np.uint8), "grey")
    assert engine.likeness(grey, references, None) is None


def test_infotext():
    assert infotext(0.6249) == {"FaceSnap likeness": "0.62"}
    assert infotext(None) == {}
