"""The four stages of `Engine.prepare`, tested separately: faces, tokens, landmarks, conditioning."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from facesnap_ext.engine import Engine, Tokens, condition, find_faces, predict_landmarks
from facesnap_ext.identity import job_faces
from facesnap_ext.identity.faces import find_faces as find_all
from facesnap_ext.identity.init_part import InitPart
from facesnap_ext.identity.predictors import choose_predictor
from facesnap_ext.identity.references import DIFFERENT_PERSON, cosines, stranger_note
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


def predicted(encoders, unit, faces, hint, width, height):
    predictor = choose_predictor(encoders, faces.references, faces.saved)
    return predict_landmarks(predictor, unit, faces, hint, width, height)


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
    file.write_bytes(content)  # the same bytes with a different modification time
    assert signature() != before


def test_landmarks_of_a_driving_photo_are_placed_in_the_output(encoders, unit, mirrored):
    faces = find_faces(encoders, replace(unit, driving=mirrored))
    landmarks, notes = predicted(encoders, unit, faces, POINTS72, 640, 512)
    expected = encoders.landmarks(encoders.codes(faces.references[0]).shape, faces.driving)
    np.testing.assert_allclose(
        landmarks.points, crop_and_resize(expected, 640, 512, faces.driving.box).points, atol=1e-4
    )
    assert notes == ()
    moved, _ = predicted(encoders, changed(unit, x=0.25), faces, POINTS72, 640, 512)
    left, _, right, _ = moved.box
    assert (left + right) / 2 == pytest.approx(0.25 * 640, abs=1e-2)


def test_landmarks_of_the_init_image_stay_in_its_pixels(encoders, unit, mirrored):
    faces = find_faces(encoders, unit, mirrored)
    landmarks, _ = predicted(encoders, unit, faces, POINTS72, 640, 512)
    assert (landmarks.width, landmarks.height) == mirrored.pixels.shape[1::-1]


def test_conditioning_carries_the_units_strength_and_region(encoders, weights, unit):
    faces = find_faces(encoders, unit)
    landmarks, _ = predicted(encoders, unit, faces, POINTS72, 512, 512)
    one = changed(unit, weight=0.5, start=0.1, end=0.9, hires="first", block_weights=(0.5,) * 10, region="face")
    conditioning = condition(one, weights, Tokens(torch.zeros(1, 4, 48)), landmarks)
    assert conditioning.strength is one.strength
    assert isinstance(conditioning.region, RoundedBox)
    assert (conditioning.ffrnet, conditioning.name) == (weights.ffrnet, "random.safetensors")


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_driving_photo_gives_the_upright_pose_and_is_reported(encoders, unit, mirrored, degrees):
    turned = Photo(np.ascontiguousarray(np.rot90(mirrored.pixels, -degrees // 90)), "turned.png")
    size = (640, 512)
    for where in ("driving", "reference"):
        ones = [
            replace(unit, driving=photo) if where == "driving" else replace(unit, references=(photo,))
            for photo in (mirrored, turned)
        ]
        upright, sideways = (find_faces(encoders, one) for one in ones)
        expected, actual = (
            predicted(encoders, one, faces, POINTS72, *size)[0] for one, faces in zip(ones, (upright, sideways))
        )
        np.testing.assert_allclose(actual.points, expected.points, atol=15)
        assert sideways.notes == (f"turned.png is rotated by {degrees}°; it was turned upright.",)
        assert upright.notes == ()


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_init_image_keeps_its_landmarks(encoders, unit, mirrored, degrees):
    turned = Photo(np.ascontiguousarray(np.rot90(mirrored.pixels, -degrees // 90)), "Init image")
    upright, sideways = (
        predicted(encoders, unit, find_faces(encoders, unit, photo), POINTS72, 640, 512)[0]
        for photo in (mirrored, turned)
    )
    np.testing.assert_allclose(sideways.upright(degrees).points, upright.points, atol=12)
    (note,) = find_faces(encoders, unit, turned).notes
    assert f"rotated by {degrees}°" in note


def test_the_face_under_the_mask_drives(encoders, unit, group):
    faces = encoders.faces(group)
    height, width = group.pixels.shape[:2]
    for face in faces:
        mask = np.zeros((height, width), np.uint8)
        left, top, right, bottom = face.box.astype(int)
        mask[top:bottom, left:right] = 1
        for tile in (False, True):
            found = find_faces(encoders, unit, group, init_part=InitPart(mask, tile))
            np.testing.assert_array_equal(found.driving.box, face.box)
            assert not found.absent


@pytest.mark.parametrize("pose", ["photo", "own", "template", "sliders"])
def test_a_tile_shows_its_own_face_or_nobody(encoders, unit, mirrored, pose):
    one = changed(unit, pose=pose)
    found = find_faces(encoders, one, mirrored, init_part=InitPart(tile=True))
    assert found.driving.photo is mirrored
    assert found.in_init_image
    empty = find_faces(encoders, one, grey(), init_part=InitPart(tile=True))
    assert empty.absent
    assert "was left out there" in empty.notes[0]
    assert not find_faces(encoders, one, grey()).absent


def test_a_saved_identity_of_another_person_is_reported(face_pack, astronaut, mirrored, grace_hopper):
    [own], [same], [other] = (find_all(face_pack, photo) for photo in (astronaut, mirrored, grace_hopper))
    assert stranger_note([own], same.embedding[None], "Ada") is None
    assert stranger_note([own, same], np.stack([own.embedding, same.embedding]), "Ada") is None
    assert "Ada hardly resembles the reference photos" in stranger_note([own], -own.embedding[None], "Ada")
    similarity = cosines([own.embedding, other.embedding])[0, 1]
    assert (stranger_note([own], other.embedding[None], "Ada") is None) == (similarity >= DIFFERENT_PERSON)


def test_the_note_on_a_saved_identity_reaches_the_job(encoders, unit, monkeypatch):
    saved = SimpleNamespace(embeddings=torch.from_numpy(-encoders.face(unit.references[0]).embedding[None]))
    monkeypatch.setattr(job_faces, "load_identity", lambda *args: saved)
    found = find_faces(encoders, replace(unit, identity="Ada"))
    assert "hardly resembles" in found.notes[0]
