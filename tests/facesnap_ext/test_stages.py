"""The four stages of `Engine.prepare`, each on its own: faces, tokens, landmarks, conditioning."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from facesnap_ext.engine import Engine, Tokens, condition, find_faces, predict_landmarks
from facesnap_ext.identity.tokens import mix, token_signatures
from facesnap_ext.landmarks.hints import POINTS72
from facesnap_ext.landmarks.points72 import crop_and_resize
from facesnap_ext.photos import Photo
from facesnap_ext.regions import RoundedBox
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.search import find_models
from tests.support.units import changed, make_unit


@pytest.fixture(scope="module")
def encoders(stand_ins):
    engine = Engine(lambda: find_models(stand_ins))
    return engine.encoders(engine.files())


@pytest.fixture(scope="module")
def weights(stand_ins):
    return facesnap_file.load(stand_ins / "random.safetensors")


@pytest.fixture
def unit(astronaut):
    return make_unit(True, (astronaut,))


def grey() -> Photo:
    return Photo(np.full((256, 256, 3), 128, np.uint8), "grey.png")


def test_faces_need_no_facesnap_file(stand_ins, unit, mirrored, tmp_path):
    shutil.copytree(stand_ins / "stand-in-pack", tmp_path / "facesnap" / "pack")
    engine = Engine(lambda: find_models(tmp_path / "facesnap"))
    faces = find_faces(engine.encoders(), replace(unit, driving=mirrored))
    assert [face.photo for face in faces.references] == list(unit.references)
    assert faces.driving is not None
    assert faces.driving.photo is mirrored
    np.testing.assert_array_equal(faces.embeddings[0], faces.references[0].embedding)


def test_the_pose_comes_from_the_driving_photo_then_the_init_image_then_the_reference(encoders, unit, mirrored, group):
    assert find_faces(encoders, replace(unit, driving=group), mirrored).driving.photo is group
    from_init = find_faces(encoders, unit, mirrored)
    assert from_init.driving.photo is mirrored
    assert from_init.in_init_image
    for without in (find_faces(encoders, unit), find_faces(encoders, unit, grey())):
        assert without.driving is without.references[0]
        assert not without.in_init_image
    assert find_faces(encoders, changed(unit, pose="template"), mirrored).driving is None


def test_tokens_are_fused_or_averaged(encoders, weights, unit, mirrored):
    faces = find_faces(encoders, replace(unit, references=(*unit.references, mirrored)))
    fused, averaged = (mix(encoders, weights, faces.references, None, average) for average in (False, True))
    alone = mix(encoders, weights, faces.references[:1], None, False)
    assert fused.shape == averaged.shape == alone.shape
    assert not torch.allclose(fused, averaged, atol=1e-4)
    assert not torch.allclose(fused, alone, atol=1e-4)


@pytest.mark.parametrize("part", ["random.safetensors", "stand-in-pack", "stand-in-clip"])
def test_the_signature_of_tokens_changes_with_every_file_they_are_made_from(stand_ins, tmp_path, part):
    copied = shutil.copytree(stand_ins, tmp_path / "facesnap")

    def signature():
        engine = Engine(lambda: find_models(copied))
        return token_signatures(engine.encoders(), copied / "random.safetensors")

    before = signature()
    assert signature() == before
    path = copied / part
    file = next(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else path
    content = file.read_bytes()
    file.write_bytes(content)  # the same bytes at another time
    assert signature() != before


def test_landmarks_of_a_driving_photo_are_placed_in_the_output(encoders, unit, mirrored):
    faces = find_faces(encoders, replace(unit, driving=mirrored))
    landmarks, notes = predict_landmarks(encoders, unit, faces, POINTS72, 640, 512)
    expected = encoders.landmarks(encoders.codes(faces.references[0]).shape, faces.driving)
    np.testing.assert_allclose(
        landmarks.points, crop_and_resize(expected, 640, 512, faces.driving.box).points, atol=1e-4
    )
    assert notes == ()
    moved, _ = predict_landmarks(encoders, changed(unit, x=0.25), faces, POINTS72, 640, 512)
    left, _, right, _ = moved.box
    assert (left + right) / 2 == pytest.approx(0.25 * 640, abs=1e-2)


def test_landmarks_of_the_init_image_stay_in_its_pixels(encoders, unit, mirrored):
    faces = find_faces(encoders, unit, mirrored)
    landmarks, _ = predict_landmarks(encoders, unit, faces, POINTS72, 640, 512)
    assert (landmarks.width, landmarks.height) == mirrored.pixels.shape[1::-1]


def test_conditioning_carries_the_units_strength_and_region(encoders, weights, unit):
    faces = find_faces(encoders, unit)
    landmarks, _ = predict_landmarks(encoders, unit, faces, POINTS72, 512, 512)
    one = changed(unit, weight=0.5, start=0.1, end=0.9, hires="first", block_weights=(0.5,) * 10, region="face")
    conditioning = condition(one, weights, Tokens(torch.zeros(1, 4, 48)), landmarks)
    assert conditioning.strength is one.strength
    assert isinstance(conditioning.region, RoundedBox)
    assert (conditioning.ffrnet, conditioning.name) == (weights.ffrnet, "random.safetensors")
