"""The open face model: what a fit recovers, and how good it is on people whose true shape is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from facesnap_ext.landmarks import open_face
from facesnap_ext.landmarks.open_face import (
    Basis,
    FitError,
    OpenShape,
    face_points,
    fit,
    load_basis,
    open_face_rig,
    predict,
)
from facesnap_ext.landmarks.points72 import POLYLINES
from facesnap_ext.weights.tensors import read_index

BASIS = load_basis()
SHAPES, EXPRESSIONS = BASIS.shape.shape[2], len(BASIS.names)
SCALE = 200  # pixels per face height of the photos
IOD = SCALE * BASIS.eye_distance  # distance between the eyes in pixels
NO_SHAPE = OpenShape(np.zeros(SHAPES), np.zeros((72, 3)))


def photo(shape: np.ndarray, expression: np.ndarray, turn: Rotation, shift: tuple[float, float] = (310, 240)):
    """Project a face as the equations in the module's docstring say: [72,2] pixels."""
    points = BASIS.mean + BASIS.shape @ shape + BASIS.expression @ expression
    return np.array(shift) + SCALE * turn.apply(points)[:, :2] * (1, -1)


def turned(yaw: float, pitch: float = 0, roll: float = 0) -> Rotation:
    return Rotation.from_euler("xyz", (pitch, yaw, -roll), degrees=True)


def person(random: np.random.Generator) -> np.ndarray:
    return random.normal(size=SHAPES)


def face(random: np.random.Generator) -> np.ndarray:
    return np.abs(random.normal(size=EXPRESSIONS)) * BASIS.spread


def view(random: np.random.Generator, yaw: float = 50) -> Rotation:
    return turned(random.uniform(-yaw, yaw), random.uniform(-20, 20), random.uniform(-25, 25))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean distance of points in % of the distance between the eyes."""
    return 100 * float(np.linalg.norm(a - b, axis=1).mean()) / IOD


def test_the_basis_is_symmetric_and_in_face_heights() -> None:
    def mirrored(points: np.ndarray) -> np.ndarray:
        return points[BASIS.mirror] * np.array([-1, 1, 1]).reshape(3, *[1] * (points.ndim - 2))

    for kind in ("ict", "1k3d68", "mediapipe"):
        mean = load_basis(kind).mean
        np.testing.assert_allclose(mirrored(mean), mean, atol=1e-6)
        assert np.ptp(mean[:, 1]) == pytest.approx(1, abs=0.08)
        assert mean[8, 1] < mean[71, 1] < mean[33, 1] < mean[40, 1] < mean[19, 1], "chin, lip, nose, eye, brow"
        assert mean[30, 2] > mean[[36, 48, 8], 2].max(), "the nose is closest to the viewer"
    np.testing.assert_allclose(mirrored(BASIS.shape), BASIS.shape, atol=1e-6)
    sides = [name[:-1] + {"L": "R", "R": "L"}[name[-1]] if name[-2] == "_" else name for name in BASIS.names]
    twins = [BASIS.names.index({"jawLeft": "jawRight", "jawRight": "jawLeft"}.get(name, name)) for name in sides]
    jaw = [BASIS.names.index(name) for name in ("jawOpen", "jawLeft", "mouthSmile_L", "eyeBlink_R")]
    np.testing.assert_allclose(
        mirrored(BASIS.expression)[..., jaw], BASIS.expression[..., np.array(twins)[jaw]], atol=0.02
    )
    for left, right in zip(POLYLINES["left_eye"][0], POLYLINES["right_eye"][0]):
        assert BASIS.mirror[left] == right


def test_the_files_licence_is_in_the_notice() -> None:
    metadata = read_index(open_face.PATH).metadata
    notice = " ".join((Path(__file__).parents[3] / "NOTICE").read_text(encoding="utf-8").split())
    assert " ".join(metadata["licence_text"].split()) in notice
    assert "ICT-FaceKit" in metadata["source"]
    assert json.loads(metadata["expressions"]) == list(BASIS.names)


@given(yaw=st.floats(-70, 70), pitch=st.floats(-30, 30), roll=st.floats(-40, 40))
def test_the_mean_face_is_found_exactly_in_any_pose(yaw: float, pitch: float, roll: float) -> None:
    turn = turned(yaw, pitch, roll)
    points = photo(np.zeros(SHAPES), np.zeros(EXPRESSIONS), turn)
    shape, [pose] = fit(BASIS, [points])
    np.testing.assert_allclose(shape.modes, 0, atol=1e-6)
    np.testing.assert_allclose(pose.rotation, turn.as_matrix(), atol=1e-6)
    assert pose.scale == pytest.approx(SCALE)
    assert pose.error == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(predict(BASIS, shape, pose), points, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_with_exact_points_any_face_of_the_model_is_recovered(seed: int) -> None:
    """With little noise the priors no longer matter. Two views show everything."""
    random = np.random.default_rng(seed)
    who, faces = person(random), [face(random), face(random)]
    turns = [turned(-35, 8, 4), turned(30, -12)]
    photos = [photo(who, *each) for each in zip(faces, turns)]
    shape, poses = fit(BASIS, photos, noise=1e-4, steps=12)
    for pose, turn, points in zip(poses, turns, photos):
        assert np.degrees((Rotation.from_matrix(pose.rotation) * turn.inv()).magnitude()) < 0.1
        assert distance(predict(BASIS, shape, pose), points) < 0.01
    truth = face_points(BASIS, OpenShape(who, np.zeros((72, 3))))
    assert 100 * np.linalg.norm(face_points(BASIS, shape) - truth, axis=1).mean() / BASIS.eye_distance < 0.7


def test_the_fit_is_the_least_squares_solution() -> None:
    """scipy minimises the same cost with its own derivatives. Errors are small enough to count squared."""
    random = np.random.default_rng(5)
    photos = [photo(person(random) / 3, face(random) / 2, view(random)) + random.normal(0, 0.5, (72, 2))]
    shape, [pose] = fit(BASIS, photos, steps=10)

    def residuals(values: np.ndarray) -> np.ndarray:
        modes, amounts, vector, shift, scale = np.split(values, np.cumsum([SHAPES, EXPRESSIONS, 3, 2]))
        points = Rotation.from_rotvec(vector).apply(BASIS.mean + BASIS.shape @ modes + BASIS.expression @ amounts)
        errors = (photos[0] - shift) * (1, -1) - scale * points[:, :2]
        errors /= open_face.NOISE * BASIS.eye_distance * pose.scale
        return np.concatenate([(errors * np.sqrt(BASIS.trust)[:, None]).ravel(), modes, amounts / BASIS.spread])

    found = np.concatenate(
        [shape.modes, pose.expression, Rotation.from_matrix(pose.rotation).as_rotvec(), pose.shift, [pose.scale]]
    )
    start = np.concatenate([np.zeros(SHAPES + EXPRESSIONS), found[SHAPES + EXPRESSIONS :] + 0.02])
    best = least_squares(residuals, start, x_scale="jac", xtol=1e-12, ftol=1e-12).x
    assert np.abs(residuals(found)).max() > 0.3, "the points are not met exactly"
    np.testing.assert_allclose(found, best, atol=2e-3)


def test_figures_of_an_independent_implementation() -> None:
    """Computed once by the study's implementation, which solves the joint system without elimination."""
    i = np.arange(72)
    turns = [Rotation.from_euler("xyz", angles) for angles in ((-0.1, 0.2, -0.05), (0.15, -0.8, -0.3))]
    photos = [
        np.array([300, 260])
        + 210 * turn.apply(BASIS.mean)[:, :2] * (1, -1)
        + 4 * np.stack([np.sin(i * (3 + k)), np.cos(i * (5 - k))], 1)
        for k, turn in enumerate(turns)
    ]
    shape, poses = fit(BASIS, photos)
    np.testing.assert_allclose(shape.modes[:6], [-0.04874, 0.05489, -0.0921, -0.06939, -0.12039, 0.19868], atol=1e-3)
    shown = [8, 30, 36, 57]
    first = [[305.8105, 360.2050], [318.4263, 216.4649], [234.5690, 184.5028], [349.9289, 294.7918]]
    second = [[245.3193, 358.6055], [243.5276, 219.2915], [247.4874, 175.5611], [289.6275, 301.5824]]
    np.testing.assert_allclose(predict(BASIS, shape, poses[0])[shown], first, atol=0.02)
    np.testing.assert_allclose(predict(BASIS, shape, poses[1])[shown], second, atol=0.02)
    driving = [[245.6752, 358.6118], [243.5212, 219.3306], [247.3773, 175.5993], [289.2142, 301.3701]]
    np.testing.assert_allclose(predict(BASIS, shape, fit(BASIS, photos[1:])[1][0])[shown], driving, atol=0.02)


@given(
    seed=st.integers(0, 999), scale=st.floats(0.05, 20), angle=st.floats(-60, 60), x=st.floats(-9e3, 9e3),
    y=st.floats(-9e3, 9e3),
)  # fmt: skip
def test_moving_scaling_and_tilting_a_photo_changes_only_the_camera(
    seed: int, scale: float, angle: float, x: float, y: float
) -> None:
    random = np.random.default_rng(seed)
    points = photo(person(random), face(random), view(random)) + random.normal(0, 0.02 * IOD, (72, 2))
    turn = np.array([[np.cos(a := np.radians(angle)), -np.sin(a)], [np.sin(a), np.cos(a)]])
    moved = scale * points @ turn.T + (x, y)
    (shape, [pose]), (other, [moved_pose]) = fit(BASIS, [points]), fit(BASIS, [moved])
    np.testing.assert_allclose(other.modes, shape.modes, atol=1e-4)
    np.testing.assert_allclose(moved_pose.expression, pose.expression, atol=1e-4)
    assert moved_pose.scale == pytest.approx(scale * pose.scale, rel=1e-5)
    assert moved_pose.error == pytest.approx(pose.error, rel=1e-4)


@given(seed=st.integers(0, 999))
def test_a_mirrored_photo_shows_the_same_shape(seed: int) -> None:
    random = np.random.default_rng(seed)
    points = photo(person(random), np.zeros(EXPRESSIONS), view(random))
    mirrored = (points * (-1, 1))[BASIS.mirror]
    symmetric = replace(BASIS, expression=np.zeros((72, 3, 1)), names=("none",), spread=np.ones(1))
    shapes = [fit(symmetric, [each], steps=10)[0] for each in (points, mirrored)]
    np.testing.assert_allclose(shapes[0].modes, shapes[1].modes, atol=1e-4)
    np.testing.assert_allclose(shapes[0].residual, shapes[1].residual, atol=1e-5)
    np.testing.assert_allclose(
        shapes[0].residual, shapes[0].residual[BASIS.mirror] * (-1, 1, 1), atol=1e-12, err_msg="it is symmetric"
    )


def test_the_order_of_the_photos_does_not_matter() -> None:
    random = np.random.default_rng(0)
    who = person(random)
    photos = [photo(who, face(random), view(random)) + random.normal(0, 2, (72, 2)) for _ in range(3)]
    (shape, poses), (again, reordered) = fit(BASIS, photos), fit(BASIS, photos[::-1])
    np.testing.assert_allclose(shape.modes, again.modes, atol=1e-9)
    np.testing.assert_allclose(poses[0].expression, reordered[2].expression, atol=1e-9)


def transfer_errors(basis: Basis, noise: float, count: int = 60) -> dict[str, float]:
    """Return the mean errors of transfers between random people, in % of the distance between the eyes.

    The model can represent these people exactly.

    Args:
        noise: standard deviation of the points' errors, relative to the distance between the eyes.
    """
    random = np.random.default_rng(7)
    errors: dict[str, list[float]] = {}
    for _ in range(count):
        source, driver = person(random), person(random)
        own, expression, turn = face(random), face(random), view(random)
        photos = [
            photo(source, own, view(random)),
            photo(source, face(random), view(random)),
            photo(driver, expression, turn),
        ]
        photos = [points + random.normal(0, noise * IOD, (72, 2)) for points in photos]
        truth = photo(source, expression, turn)
        pose = fit(basis, photos[2:])[1][0]
        predicted = {
            "driving": photos[2],
            "mean": predict(basis, None, pose),
            "one photo": predict(basis, fit(basis, photos[:1])[0], pose),
            "two photos": predict(basis, fit(basis, photos[:2])[0], pose),
        }
        for name, points in predicted.items():
            errors.setdefault(name, []).append(distance(points, truth))
    return {name: float(np.mean(values)) for name, values in errors.items()}


@pytest.mark.parametrize("noise", [0, 0.01, 0.02, 0.03])
def test_a_persons_own_shape_is_closer_than_the_mean_face_and_more_photos_are_closer_still(noise: float) -> None:
    errors = transfer_errors(BASIS, noise)
    assert errors["two photos"] < errors["one photo"] < errors["mean"]
    assert errors["one photo"] < 0.6 * errors["driving"]


def test_the_mean_face_of_other_points_costs_accuracy() -> None:
    calibrated, other = transfer_errors(BASIS, 0.02), transfer_errors(load_basis("mediapipe"), 0.02)
    assert other["one photo"] > 1.2 * calibrated["one photo"]


def test_a_wrong_point_hardly_moves_the_others() -> None:
    random = np.random.default_rng(3)
    points = photo(person(random), face(random), view(random))
    shape, [pose] = fit(BASIS, [points])
    wrong = points.copy()
    wrong[30] += 0.5 * IOD
    moved = predict(BASIS, *(lambda fitted: (fitted[0], fitted[1][0]))(fit(BASIS, [wrong])))
    others = np.arange(72) != 30
    assert distance(moved[others], predict(BASIS, shape, pose)[others]) < 3


def test_rig_shows_the_persons_neutral_face() -> None:
    who = OpenShape(person(np.random.default_rng(1)), np.zeros((72, 3)))
    rig, mean = open_face_rig(BASIS, who), open_face_rig(BASIS)
    assert np.ptp(rig.rest[:, 1]) == pytest.approx(1, abs=1e-6)
    points = face_points(BASIS, who)
    np.testing.assert_allclose(rig.rest - rig.rest[8], (points - points[8]) / np.ptp(points[:, 1]), atol=1e-6)
    assert np.abs(rig.rest - mean.rest).max() > 0.02
    opened = rig.rest + rig.directions["mouth"]
    assert opened[63, 1] - opened[70, 1] > 0.2 > 5 * (rig.rest[63, 1] - rig.rest[70, 1])


@pytest.mark.parametrize(
    "points",
    [np.zeros((72, 2)), np.outer(np.arange(72), [1, 2]), np.full((72, 2), np.nan), np.full((72, 2), np.inf)],
    ids=["one place", "a line", "nan", "inf"],
)
def test_points_that_are_no_face_are_refused(points: np.ndarray) -> None:
    with pytest.raises(FitError):
        fit(BASIS, [points])


@given(arrays(np.float64, (72, 2), elements=st.floats(-1e4, 1e4)))
def test_any_points_have_a_finite_fit_or_are_refused(points: np.ndarray) -> None:
    try:
        shape, [pose] = fit(BASIS, [points])
    except FitError:
        return
    assert np.isfinite(predict(BASIS, shape, pose)).all()
    np.testing.assert_allclose(pose.rotation @ pose.rotation.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(pose.rotation) > 0
