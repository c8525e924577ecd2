"""Where the expression of a job comes from, with both Landmark Predictors."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")

from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.predictors import choose_predictor
from facesnap_ext.landmarks.hints import POINTS72
from facesnap_ext.landmarks.poses import displacement, pose_points
from facesnap_ext.settings.pose import custom_expression, pose_from_unit
from facesnap_ext.settings.saved_poses import save_pose
from facesnap_ext.weights.search import find_models
from tests.support.stand_in_pack import stand_in_faces68
from tests.support.units import changed, make_unit

SIZE = (640, 512)


@pytest.fixture(scope="module", params=["DECA and FLAME", "open face model"])
def engine(request, stand_ins, tmp_path_factory):
    folder = shutil.copytree(stand_ins, tmp_path_factory.mktemp("expressions") / "facesnap")
    stand_in_faces68(folder / "stand-in-pack/1k3d68.onnx")
    if request.param == "open face model":
        (folder / "stand-in-deca.safetensors").unlink()
    return Engine(lambda: find_models(folder))


@pytest.fixture
def unit(astronaut, grace_hopper):
    return make_unit(references=(astronaut,), driving=grace_hopper, model="random.safetensors")


def points(engine, unit, init=None):
    return engine.prepare(unit, *SIZE, init_image=init).conditioning.landmarks.points


def test_by_default_the_expression_comes_with_the_pose(engine, unit):
    """A photo's own expression, taken off and put on again, gives the same points."""
    for one in (unit, changed(unit, pose="own", expression_source="pose")):
        source = "driving" if one is unit else "reference"
        np.testing.assert_allclose(
            points(engine, changed(one, expression_source=source)), points(engine, one), atol=0.1
        )


def test_the_references_expression_can_replace_the_driving_photos(engine, unit, grace_hopper, astronaut):
    encoders = engine.encoders()
    reference, driving = encoders.face(astronaut), encoders.face(grace_hopper)
    predictor = choose_predictor(encoders, [reference])
    shown = points(engine, changed(unit, expression_source="reference"))
    neutral = points(engine, changed(unit, expression_source="custom"))
    assert np.abs(shown - points(engine, unit)).max() > 0.1
    assert np.abs(shown - neutral).max() > 0.1
    face, _ = predictor.neutral(driving)
    in_photo = face.with_expression(predictor.expression(reference))
    expected = in_photo.points - face.landmarks.points
    scale = max(SIZE[0] / face.landmarks.width, SIZE[1] / face.landmarks.height)
    np.testing.assert_allclose(shown - neutral, scale * expected, atol=0.05)


@pytest.mark.parametrize("pose", ["template", "sliders", "own", "photo"])
def test_a_named_expression_is_added_to_the_neutral_face_in_any_pose(engine, unit, pose):
    chosen = changed(
        unit, pose=pose, template="three quarters left", expression_source="custom", expression="surprise", frown=0.2
    )
    neutral = changed(chosen, expression="neutral", frown=0.0)
    shown, still = points(engine, chosen), points(engine, neutral)
    assert shown[70, 1] - shown[63, 1] > still[70, 1] - still[63, 1] + 3, "the mouth is open"
    if pose in ("template", "sliders"):
        encoders = engine.encoders()
        rig, _ = choose_predictor(encoders, [encoders.face(unit.references[0])]).rig()
        expected = pose_points(rig, pose_from_unit(chosen, *SIZE), *SIZE)
        np.testing.assert_allclose(shown, expected, atol=1e-3)
        assert custom_expression(chosen).mouth > 0


@pytest.mark.parametrize("source", ["reference", "driving"])
def test_templates_can_have_a_photos_expression(engine, unit, source, astronaut, grace_hopper):
    posed = changed(unit, pose="template", template="profile left", expression_source=source)
    encoders = engine.encoders()
    predictor = choose_predictor(encoders, [encoders.face(astronaut)])
    rig, _ = predictor.rig()
    field = predictor.expression(encoders.face(astronaut if source == "reference" else grace_hopper))
    expected = pose_points(rig, pose_from_unit(posed, *SIZE), *SIZE, field)
    np.testing.assert_allclose(points(engine, posed), expected, atol=1e-3)
    assert np.abs(field).max() > 0.003


def test_the_init_image_gives_the_expression_without_a_driving_photo(engine, unit, grace_hopper):
    posed = changed(unit, pose="template", expression_source="driving")
    from_init = points(engine, replace(posed, driving=None), grace_hopper)
    np.testing.assert_array_equal(from_init, points(engine, posed))


def test_a_missing_source_is_reported(engine, unit):
    posed = changed(unit, pose="template", driving=None, expression_source="driving")
    with pytest.raises(FaceSnapError, match="comes from the driving photo, which is missing; add one"):
        engine.prepare(posed, *SIZE)


def test_decas_expression_is_that_of_flames_codes(stand_ins, astronaut, grace_hopper):
    """Independent of the neutral face: FLAME with the reference's expression and jaw in the driving photo's pose."""
    encoders = Engine(lambda: find_models(stand_ins)).encoders()
    reference, driving = encoders.face(astronaut), encoders.face(grace_hopper)
    predictor = choose_predictor(encoders, [reference])
    networks, own, other = encoders.predictor(), encoders.codes(reference), encoders.codes(driving)
    pose = torch.cat([other.pose[:3], own.pose[3:]])
    both = replace(other, expression=own.expression, pose=pose)
    expected = networks.predict(networks.neutral(predictor.shape), both).points
    face, _ = predictor.neutral(driving)
    error = face.with_expression(predictor.expression(reference)).points - expected
    shift = error.mean(axis=0)  # FLAME turns the head about a joint that moves a little with the expression
    np.testing.assert_allclose(error - shift, 0, atol=1e-2)
    assert np.abs(shift).max() < 0.005 * np.ptp(expected[:, 1])
    whole = face.with_expression(predictor.expression(driving))
    np.testing.assert_allclose(whole.points, predictor.landmarks(driving, POINTS72)[0].points, atol=1e-2)


@pytest.mark.parametrize("pose", ["template", "sliders", "own", "photo"])
@pytest.mark.parametrize("source", ["pose", "reference", "driving", "custom"])
def test_a_pose_saved_as_sliders_shows_the_same_face(engine, unit, tmp_path, pose, source):
    """Up to the part of a photo's expression that no slider moves, and the detector's own error."""
    one = changed(unit, pose=pose, expression_source=source, expression="smile", template="tilted", yaw=20, mouth=0.3)
    saved = engine.pose_as_sliders(one, *SIZE)
    folder = engine.files().folder
    save_pose(folder, f"{pose} {source}", saved)
    again = points(engine, changed(unit, pose="saved", saved_pose=f"{pose} {source}"))
    expected = points(engine, one)
    height = np.ptp(expected[:, 1])
    error = np.linalg.norm(again - expected, axis=1)
    exact = pose in ("template", "sliders") and source in ("pose", "custom")
    assert np.sqrt((error**2).mean()) < (0.001 if exact else 0.06) * height


def test_the_preview_has_the_jobs_neutral_face_and_expression(engine, unit, astronaut, grace_hopper):
    preview = engine.preview([astronaut], grace_hopper, SIZE, expression=(astronaut, 0))
    shown = preview.neutral.with_expression(preview.expression).points
    np.testing.assert_allclose(shown, points(engine, changed(unit, expression_source="reference")), atol=0.05)
    custom = changed(unit, expression_source="custom", expression="wink")
    field = displacement(preview.rig, custom_expression(custom))
    np.testing.assert_allclose(preview.neutral.with_expression(field).points, points(engine, custom), atol=0.05)
