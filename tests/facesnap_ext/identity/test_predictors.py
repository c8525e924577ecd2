"""Which Landmark Predictor a person gets, and what the open face model does with photos and saved identities."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")

import onnx.numpy_helper

from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.face_mesh import load_face_mesh, mesh_points68
from facesnap_ext.identity.predictors import (
    DECA_AND_FLAME,
    OPEN_FACE_MODEL,
    SAVED_WITHOUT_SHAPE,
    DecaPredictor,
    NoLandmarksError,
    OpenFacePredictor,
    choose_predictor,
)
from facesnap_ext.identity.saved import load_identity, save_identity
from facesnap_ext.landmarks.flame import load_flame
from facesnap_ext.landmarks.hints import POINTS5, POINTS72
from facesnap_ext.landmarks.open_face import fit, load_basis, predict
from facesnap_ext.landmarks.points72 import from_68
from facesnap_ext.landmarks.rigs import flame_rig, open_face_rig
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights.search import find_models
from tests.support.stand_in_pack import stand_in_face_mesh, stand_in_faces68, stand_in_landmarks68

DECA, FLAME, LANDMARKS68 = "stand-in-deca.safetensors", "stand-in-flame.safetensors", "stand-in-pack/1k3d68.onnx"


@pytest.fixture(scope="module")
def complete(stand_ins, tmp_path_factory):
    """A model folder with DECA, FLAME, and a pack whose landmarks form faces."""
    folder = shutil.copytree(stand_ins, tmp_path_factory.mktemp("predictors") / "facesnap")
    stand_in_faces68(folder / LANDMARKS68)
    return folder


@pytest.fixture
def models(complete, tmp_path):
    return shutil.copytree(complete, tmp_path / "facesnap")


def without(models, *names):
    for name in names:
        (models / name).unlink()
    return encoders_of(models)


def encoders_of(models):
    return Engine(lambda: find_models(models)).encoders()


def rest(predictor):
    return predictor.rig()[0].rest


def test_deca_and_flame_are_preferred_where_both_are_there(models, astronaut):
    encoders = encoders_of(models)
    chosen = choose_predictor(encoders, [encoders.face(astronaut)])
    assert isinstance(chosen, DecaPredictor)
    assert chosen.title == DECA_AND_FLAME
    for missing in (DECA, FLAME):
        (models / missing).rename(models / "away")
        encoders = encoders_of(models)
        chosen = choose_predictor(encoders, [encoders.face(astronaut)])
        assert isinstance(chosen, OpenFacePredictor)
        assert (chosen.title, chosen.notes) == (OPEN_FACE_MODEL, ())
        (models / "away").rename(models / missing)
    unfit = models / "flame2023.safetensors"
    (models / FLAME).rename(unfit)
    assert choose_predictor(encoders_of(models)).title == OPEN_FACE_MODEL, "DECA does not fit FLAME 2023"


def test_landmarks_are_the_fit_of_all_photos_in_the_driving_photos_pose(models, astronaut, mirrored, grace_hopper):
    encoders = without(models, DECA)
    references = [encoders.face(photo) for photo in (astronaut, mirrored)]
    driving = encoders.face(grace_hopper)
    landmarks, notes = choose_predictor(encoders, references).landmarks(driving, POINTS72)
    points = [encoders.detected_landmarks(face).points for face in (*references, driving)]
    basis = load_basis()
    expected = predict(basis, fit(basis, points[:2])[0], fit(basis, points[2:])[1][0])
    np.testing.assert_allclose(landmarks.points, expected, atol=1e-3)
    assert (landmarks.width, landmarks.height) == grace_hopper.pixels.shape[1::-1]
    assert notes == ()
    one, _ = choose_predictor(encoders, references[:1]).landmarks(driving, POINTS72)
    assert np.abs(one.points - landmarks.points).max() > 0.01, "the second photo counts"


def test_decas_shape_is_the_mean_of_all_photos_and_of_the_saved_identity(models, astronaut, mirrored, grace_hopper):
    encoders = encoders_of(models)
    save_identity(encoders, (astronaut, mirrored), "both")
    saved = load_identity(encoders, "both")
    faces = [encoders.face(photo) for photo in (astronaut, mirrored, grace_hopper)]
    codes = torch.stack([encoders.codes(face).shape for face in faces])
    cases = [(faces, None, codes.mean(0)), ([], saved, codes[:2].mean(0)), (faces[2:], saved, codes.mean(0))]
    for references, identity, expected in cases:
        torch.testing.assert_close(choose_predictor(encoders, references, identity).shape, expected)
    assert choose_predictor(encoders).shape is None


def test_a_photo_that_drives_itself_keeps_its_landmarks(models, astronaut):
    encoders = without(models, DECA, FLAME)
    face = encoders.face(astronaut)
    detected = encoders.detected_landmarks(face).points
    again = encoders.face(replace(astronaut, name="the same pixels"))
    for predictor in (choose_predictor(encoders, [face]), choose_predictor(encoders)):
        np.testing.assert_array_equal(predictor.landmarks(again, POINTS72)[0].points, detected)
        np.testing.assert_array_equal(predictor.landmarks(again, POINTS5)[0].points, face.keypoints)


def test_rig_is_the_persons_own_face_or_a_mean_face(models, astronaut, grace_hopper):
    encoders = without(models, DECA)
    face = encoders.face(astronaut)
    shape = fit(load_basis(), [encoders.detected_landmarks(face).points])[0]
    np.testing.assert_array_equal(rest(choose_predictor(encoders, [face])), open_face_rig(load_basis(), shape).rest)
    mean = rest(choose_predictor(encoders))
    np.testing.assert_allclose(mean, flame_rig(load_flame(models / FLAME)).rest, atol=1e-6, err_msg="FLAME alone")
    encoders = without(models, FLAME)
    np.testing.assert_array_equal(rest(choose_predictor(encoders)), open_face_rig(load_basis()).rest)
    other = rest(choose_predictor(encoders, [encoders.face(grace_hopper)]))
    assert np.abs(other - rest(choose_predictor(encoders, [face]))).max() > 1e-3


def test_a_pack_without_68_landmarks_poses_a_mean_face_and_says_so(models, astronaut, grace_hopper):
    encoders = without(models, DECA, FLAME, LANDMARKS68)
    face, driving = encoders.face(astronaut), encoders.face(grace_hopper)
    predictor = choose_predictor(encoders, [face])
    rig, notes = predictor.rig()
    np.testing.assert_array_equal(rig.rest, open_face_rig(load_basis()).rest)
    assert "stand-in-pack has no model for 68 landmarks (1k3d68.onnx), so a mean face is posed" in notes[0]
    landmarks, notes = predictor.landmarks(driving, POINTS5)
    np.testing.assert_array_equal(landmarks.points, driving.keypoints)
    assert "the five points of grace_hopper.jpg keep the shape of its face" in notes[0]
    assert predictor.landmarks(face, POINTS5)[1] == (), "it is the person's own face"
    with pytest.raises(NoLandmarksError, match=r"so the pose of grace_hopper\.jpg cannot be read; put that file"):
        predictor.landmarks(driving, POINTS72)


def test_the_note_about_missing_landmarks_names_both_remedies(models, astronaut):
    encoders = without(models, DECA, FLAME, LANDMARKS68)
    (note,) = choose_predictor(encoders, [encoders.face(astronaut)]).rig()[1]
    assert "put that file of antelopev2 or buffalo_l into its folder" in note
    assert "or convert MediaPipe's face_landmarker.task with python -m facesnap_ext convert" in note


@pytest.fixture
def with_mediapipe(models):
    """Encoders of a pack without 68 landmarks, and MediaPipe's landmark detector."""
    stand_in_face_mesh(models / "face_landmarks.onnx")
    return without(models, DECA, FLAME, LANDMARKS68)


def test_mediapipe_replaces_the_packs_landmarks(with_mediapipe, astronaut, grace_hopper):
    """Shape, pose and result are those of the open face model with MediaPipe's mean face."""
    encoders, basis = with_mediapipe, load_basis("mediapipe")
    face, driving = encoders.face(astronaut), encoders.face(grace_hopper)
    mesh = load_face_mesh(encoders.files.require("mediapipe"))
    points = [from_68(mesh_points68(mesh, one)) for one in (face, driving)]
    predictor = choose_predictor(encoders, [face])
    shape, pose = fit(basis, points[:1])[0], fit(basis, points[1:])[1][0]
    assert pose.error < 0.03, "the stand-in's points are a face"
    for hint in (POINTS5, POINTS72):
        landmarks, notes = predictor.landmarks(driving, hint)
        assert notes == ()
        np.testing.assert_allclose(landmarks.points, predict(basis, shape, pose), atol=1e-3)
    np.testing.assert_array_equal(rest(predictor), open_face_rig(basis, shape).rest)
    np.testing.assert_array_equal(rest(choose_predictor(encoders)), open_face_rig(basis).rest)
    np.testing.assert_array_equal(predictor.landmarks(face, POINTS72)[0].points, points[0])


def test_the_packs_own_landmarks_are_preferred_to_mediapipes(models, astronaut):
    encoders = without(models, DECA, FLAME)
    face = encoders.face(astronaut)
    expected = encoders.detected_landmarks(face).points
    stand_in_face_mesh(models / "face_landmarks.onnx")
    encoders = encoders_of(models)
    np.testing.assert_array_equal(encoders.detected_landmarks(face).points, expected)
    np.testing.assert_array_equal(encoders.basis.mean, load_basis("1k3d68").mean)


def test_templates_need_no_file_at_all(tmp_path):
    encoders = encoders_of(tmp_path)
    np.testing.assert_array_equal(rest(choose_predictor(encoders)), open_face_rig(load_basis()).rest)


def test_a_shape_from_mediapipe_is_saved_and_used_with_the_packs_landmarks(with_mediapipe, models, astronaut):
    save_identity(with_mediapipe, (astronaut,), "someone")
    stand_in_faces68(models / LANDMARKS68)
    encoders = encoders_of(models)
    predictor = choose_predictor(encoders, (), load_identity(encoders, "someone"))
    assert predictor.rig()[1] == ()
    shape = choose_predictor(with_mediapipe, [with_mediapipe.face(astronaut)]).shape
    np.testing.assert_allclose(predictor.shape.modes, shape.modes, atol=1e-5)


def test_mediapipe_points_that_form_no_face_are_reported_with_its_file(with_mediapipe, models, astronaut):
    path = models / "face_landmarks.onnx"
    network = onnx.load(str(path))
    for values in network.graph.initializer:
        values.CopyFrom(onnx.numpy_helper.from_array(np.zeros((1, 1, 1, 1434), np.float32), values.name))
    onnx.save(network, str(path))
    encoders = encoders_of(models)
    with pytest.raises(FaceSnapError, match=r"that face_landmarks\.onnx detects in astronaut\.png do not form a face"):
        choose_predictor(encoders, [encoders.face(astronaut)])


@pytest.mark.parametrize("kinds", ["deca", "open", "both", "neither"])
@pytest.mark.parametrize("installed", ["deca", "open"])
def test_a_saved_identity_names_what_it_lacks_only_if_it_is_needed(models, astronaut, kinds, installed):
    """`kinds` are the shapes that it was saved with."""
    hidden = {"deca": [LANDMARKS68], "open": [DECA], "both": [], "neither": [DECA, LANDMARKS68]}[kinds]
    for name in hidden:
        (models / name).rename(models / f"{name.replace('/', '-')}.away")
    save_identity(encoders_of(models), (astronaut,), "someone")
    for name in hidden:
        (models / f"{name.replace('/', '-')}.away").rename(models / name)
    encoders = without(models, *([DECA] if installed == "open" else []))
    saved = load_identity(encoders, "someone")
    assert (saved.shapes is not None, saved.open_shape is not None) == {
        "deca": (True, False),
        "open": (False, True),
        "both": (True, True),
        "neither": (False, False),
    }[kinds]
    predictor = choose_predictor(encoders, (), saved)
    _, notes = predictor.rig()
    fits_deca = installed == "deca" and kinds in ("deca", "both")
    assert predictor.title == (DECA_AND_FLAME if fits_deca else OPEN_FACE_MODEL)
    lacking = kinds == "neither" or (kinds == "deca" and installed == "open")
    assert bool(notes) == lacking
    if lacking:
        assert notes == (SAVED_WITHOUT_SHAPE.format("someone"),)
    elif not fits_deca:
        shape = fit(load_basis(), [encoders.detected_landmarks(encoders.face(astronaut)).points])[0]
        np.testing.assert_allclose(rest(predictor), open_face_rig(load_basis(), shape).rest, atol=1e-5)


def test_photos_and_a_saved_identity_have_one_shape(models, astronaut, grace_hopper):
    encoders = without(models, DECA, FLAME)
    save_identity(encoders, (astronaut, astronaut), "twice")
    saved = load_identity(encoders, "twice")
    face = encoders.face(grace_hopper)
    alone, photo, both = (
        choose_predictor(encoders, *each).shape.modes for each in (((), saved), ([face], None), ([face], saved))
    )
    np.testing.assert_allclose(both, (2 * alone + photo) / 3, atol=1e-6)


def test_landmarks_that_form_no_face_are_reported(models, astronaut, grace_hopper):
    (models / DECA).unlink()
    stand_in_landmarks68(models / LANDMARKS68, np.random.default_rng(0).uniform(-0.6, 0.6, (68, 2)))
    encoders = encoders_of(models)
    faces = [encoders.face(photo) for photo in (astronaut, grace_hopper)]
    predictor = choose_predictor(encoders, faces[:1])
    assert "detected in astronaut.png hardly form a face" in predictor.rig()[1][0]
    assert "detected in grace_hopper.jpg hardly form a face" in predictor.landmarks(faces[1], POINTS72)[1][1]
    stand_in_landmarks68(models / LANDMARKS68, np.zeros((68, 2)))
    encoders = encoders_of(models)
    with pytest.raises(FaceSnapError, match=r"stand-in-pack detects in astronaut\.png do not form a face"):
        choose_predictor(encoders, [encoders.face(astronaut)])


def test_the_engine_reports_its_predictor(models, astronaut, mirrored):
    unit = Unit(enabled=True, references=(astronaut,), driving=mirrored, model="random.safetensors")
    engine = Engine(lambda: find_models(models))
    assert engine.prepare(unit, 512, 512).predictor == DECA_AND_FLAME
    (models / DECA).unlink()
    prepared = engine.prepare(unit, 512, 512)
    assert (prepared.predictor, prepared.notes) == (OPEN_FACE_MODEL, ())
