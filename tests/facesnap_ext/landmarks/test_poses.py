from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.flame import Flame, full_pose, posed_vertices
from facesnap_ext.landmarks.open_face import OpenShape, load_basis, open_face_rig
from facesnap_ext.landmarks.points72 import LEFT_EYE, NOSE_TIP, RIGHT_EYE, Landmarks, points_on
from facesnap_ext.landmarks.poses import (
    BROWS,
    JAW_OPEN,
    TEMPLATES,
    Pose,
    Rig,
    flame_rig,
    placement,
    pose_landmarks,
    pose_points,
    reposition,
)
from facesnap_ext.settings.pose import pose_from_unit
from facesnap_ext.settings.unit import RANGES, Unit
from facesnap_lab.miniature.render import head

WIDTH, HEIGHT = 832, 1216
CHIN = 8
UPPER_LIDS, LOWER_LIDS = [37, 38, 39, 47, 46, 45], [43, 42, 41, 49, 50, 51]
poses = st.builds(Pose, **{name: st.floats(*RANGES[name]) for name in asdict(Pose())})


@pytest.fixture(scope="module", params=["stand-in", "miniature", "open"])
def rig(request: pytest.FixtureRequest, flame: Flame) -> Rig:
    shape = torch.linspace(-1.5, 1.5, 12)
    if request.param == "open":
        basis = load_basis()
        modes = np.concatenate([shape.numpy(), np.zeros(basis.shape.shape[2] - len(shape))])
        return open_face_rig(basis, OpenShape(modes, np.zeros((72, 3))))
    return flame_rig(flame if request.param == "stand-in" else head(), shape)


def reference_points(rig: Rig, pose: Pose, width: float, height: float) -> np.ndarray:
    """Evaluate the formula with scipy's rotations."""
    mouth, brows, closed, wide = (rig.directions[name].astype(float) for name in ("mouth", "brows", "closed", "wide"))
    points = rig.rest + pose.mouth * mouth + pose.brows * brows + (-pose.eyes * closed if pose.eyes < 0 else 0)
    points = points + (pose.eyes * wide if pose.eyes > 0 else 0)
    for axis, degrees in (("x", pose.pitch), ("y", pose.yaw), ("z", -pose.roll)):  # about the image's axes
        points = Rotation.from_euler(axis, degrees, degrees=True).apply(points)
    flat = points[:, :2] * pose.size * height
    return np.stack([pose.x * width + flat[:, 0], pose.y * height - flat[:, 1]], 1)


@given(pose=poses, width=st.integers(64, 2048), height=st.integers(64, 2048))
def test_points_follow_the_formula(miniature: Rig, pose: Pose, width: int, height: int) -> None:
    np.testing.assert_allclose(
        pose_points(miniature, pose, width, height), reference_points(miniature, pose, width, height)
    )


@pytest.fixture(scope="module")
def miniature() -> Rig:
    return flame_rig(head())


def test_rest_is_the_flame_face_of_the_persons_shape(rig: Rig, flame: Flame) -> None:
    """Compare with FLAME up to scale and translation."""
    shape = torch.linspace(-1.5, 1.5, 12)[None]
    person_rig = flame_rig(flame, shape[0])
    vertices = posed_vertices(flame, shape, torch.zeros(1, 0), full_pose(flame, torch.zeros(1, 6)))
    points = points_on(vertices, flame.faces)[0].numpy().astype(float)
    height = np.ptp(points[:, 1])
    np.testing.assert_allclose(person_rig.rest - person_rig.rest[CHIN], (points - points[CHIN]) / height, atol=1e-6)
    assert np.abs(person_rig.rest - flame_rig(flame).rest).max() > 0.01, "the person's shape is visible"
    pixels = pose_points(person_rig, Pose(x=0.25, y=0.5, size=0.5), WIDTH, HEIGHT)
    assert np.ptp(pixels[:, 1]) == pytest.approx(0.5 * HEIGHT, abs=1e-3)
    np.testing.assert_allclose((pixels.min(0) + pixels.max(0)) / 2, (0.25 * WIDTH, 0.5 * HEIGHT), atol=1e-3)


def test_signs_match_the_settings(rig: Rig) -> None:
    def point(index: int, **values: float) -> np.ndarray:
        return pose_points(rig, Pose(**values), WIDTH, HEIGHT)[index]

    assert point(NOSE_TIP, yaw=30)[0] > point(NOSE_TIP)[0] + 20, "the nose moves to the image's right"
    assert point(NOSE_TIP, pitch=20)[1] > point(NOSE_TIP)[1] + 20, "the nose moves down"
    assert point(19, roll=20)[0] > point(19)[0] + 20, "the head tilts to the image's right"
    assert point(CHIN, mouth=1)[1] > point(CHIN)[1] + 20
    assert point(19, brows=1)[1] < point(19)[1] - 5 < point(19, brows=-1)[1] - 10
    assert point(CHIN, x=0.6)[0] - point(CHIN)[0] == pytest.approx(0.1 * WIDTH)
    assert point(CHIN, y=0.55)[1] - point(CHIN)[1] == pytest.approx(0.1 * HEIGHT)


def test_yaw_keeps_heights_and_roll_keeps_distances(rig: Rig) -> None:
    front, turned = (pose_points(rig, Pose(yaw=yaw), WIDTH, HEIGHT) for yaw in (0, 50))
    np.testing.assert_allclose(turned[:, 1], front[:, 1])
    upright, tilted = (pose_points(rig, Pose(yaw=30, pitch=10, roll=roll), WIDTH, HEIGHT) for roll in (0, 40))
    distances = [np.linalg.norm(points[:, None] - points, axis=-1) for points in (upright, tilted)]
    np.testing.assert_allclose(*distances, atol=1e-9)


def test_mouth_is_opened_by_flames_jaw(flame: Flame) -> None:
    rig = flame_rig(flame)
    vertices = posed_vertices(
        flame, torch.zeros(1, 0), torch.zeros(1, 0), full_pose(flame, torch.tensor([[0, 0, 0, JAW_OPEN, 0, 0]]))
    )
    points = points_on(vertices, flame.faces)[0].numpy().astype(float)
    opened = rig.rest + rig.directions["mouth"]
    np.testing.assert_allclose(opened - opened[0], (points - points[0]) / _height(flame), atol=1e-6)
    mouth_opening = opened[63, 1] - opened[70, 1]
    assert mouth_opening > 0.1 > 5 * (rig.rest[63, 1] - rig.rest[70, 1])


def _height(flame: Flame) -> float:
    return np.ptp(points_on(flame.v_template[None], flame.faces)[0, :, 1].numpy())


def test_eyes_close_and_widen_on_any_head(rig: Rig) -> None:
    def openings(eyes: float) -> np.ndarray:
        points = pose_points(rig, Pose(eyes=eyes), WIDTH, HEIGHT)
        return points[LOWER_LIDS, 1] - points[UPPER_LIDS, 1]

    np.testing.assert_allclose(openings(-1), 0, atol=1e-3)
    assert (openings(0) > 3).all()
    np.testing.assert_allclose(openings(-0.5), openings(0) / 2, atol=1e-3)
    np.testing.assert_allclose(openings(1), 1.6 * openings(0), rtol=1e-4)
    eyes = {*LEFT_EYE, *RIGHT_EYE}
    for name in ("closed", "wide"):
        unmoved = np.flatnonzero(~rig.directions[name].any(1))
        assert {*range(72)} - eyes | {36, 40, 44, 48} == {*unmoved}, "corners and all other points do not move"


def test_brows_slider_moves_only_the_brows_and_keeps_them_above_the_eyes(rig: Rig) -> None:
    direction = rig.directions["brows"]
    assert np.flatnonzero(direction.any(1)).tolist() == BROWS
    assert (direction[:, [0, 2]] == 0).all()
    lowered = (rig.rest - direction)[BROWS, 1]
    assert lowered.min() > rig.rest[UPPER_LIDS, 1].mean()


def test_templates_are_distinct_and_fit_any_aspect_ratio(rig: Rig) -> None:
    assert len(TEMPLATES) == 10
    assert len({(t.yaw, t.pitch, t.roll, t.size) for t in TEMPLATES.values()}) == 10
    for width, height in ((1024, 1024), (640, 1536), (1536, 640)):
        for name in TEMPLATES:
            pose = pose_from_unit(Unit(pose="template", template=name), width, height)
            left, top, right, bottom = pose_landmarks(rig, pose, width, height).box
            assert min(left, top, width - right, height - bottom) > 0, name
    sizes = {name: template.size for name, template in TEMPLATES.items()}
    assert max(sizes, key=sizes.get) == "close-up"
    assert min(sizes, key=sizes.get) == "far"
    for left in ("three quarters left", "profile left"):
        assert TEMPLATES[left].yaw == -TEMPLATES[left.replace("left", "right")].yaw < -30


def test_unit_overrides_only_position_and_size_of_a_template() -> None:
    unit = Unit(pose="template", template="tilted", yaw=60, mouth=1, x=0.2, size=0.3)
    assert pose_from_unit(unit, 1024, 1024) == replace(TEMPLATES["tilted"], x=0.2, size=0.3)
    with pytest.raises(FaceSnapError, match="no pose template named 'sideways'; choose one of front, three"):
        pose_from_unit(replace(unit, template="sideways"), 1024, 1024)


def test_sliders_override_the_template() -> None:
    unit = Unit(pose="sliders", template="tilted", yaw=10, pitch=-5, roll=3, mouth=0.2, brows=-0.1, eyes=0.3, y=0.7)
    assert pose_from_unit(unit, 1024, 1024) == Pose(10, -5, 3, 0.2, -0.1, 0.3, y=0.7)
    assert pose_from_unit(unit, 512, 1024).size == Pose().size / 2, "the default is a fraction of the shorter side"
    assert pose_from_unit(replace(unit, size=0.4), 512, 1024).size == 0.4, (
        "an explicit size is a fraction of the height"
    )


points_2d = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).uniform(-50, 900, (72, 2)))


@given(points=points_2d, x=st.floats(-0.5, 1.5), y=st.floats(-0.5, 1.5), size=st.floats(0.02, 3))
def test_reposition_keeps_the_shape(points: np.ndarray, x: float, y: float, size: float) -> None:
    landmarks = Landmarks(points.astype(np.float32), 900, 700)
    result = reposition(landmarks, x, y, size)
    np.testing.assert_allclose(placement(result), (x, y, size), atol=1e-5)
    np.testing.assert_allclose(
        (result.points - result.points[0]) / np.ptp(result.points[:, 1]),
        (landmarks.points - landmarks.points[0]) / np.ptp(landmarks.points[:, 1]),
        atol=1e-3,
    )
    only_x = reposition(landmarks, x=x)
    np.testing.assert_allclose(placement(only_x), (x, *placement(landmarks)[1:]), atol=1e-5)
    assert reposition(landmarks) is landmarks


def test_repositioning_equals_posing_at_the_new_position(rig: Rig) -> None:
    """Thus x, y and size mean the same for a photo's landmarks as for the rig."""
    original, expected = (
        pose_landmarks(rig, Pose(x=x, y=y, size=s), 640, 512) for x, y, s in ((0.5, 0.5, 0.5), (0.2, 0.7, 0.3))
    )
    np.testing.assert_allclose(reposition(original, 0.2, 0.7, 0.3).points, expected.points, atol=1e-3)
