"""A photo's face without its expression, and its pose and expression as sliders."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facesnap_ext.landmarks.movements import EXPRESSIONS, MOVEMENTS, Sliders, with_expression
from facesnap_ext.landmarks.neutral import NeutralFace, angles, movements_of, pose_of
from facesnap_ext.landmarks.open_face import load_basis
from facesnap_ext.landmarks.points72 import Landmarks, crop_and_resize
from facesnap_ext.landmarks.poses import Pose, displacement, pose_points, rotation
from facesnap_ext.landmarks.rigs import open_face_rig
from facesnap_ext.settings.unit import RANGES

RIG = open_face_rig(load_basis())
WIDTH, HEIGHT = 832, 1216
poses = st.builds(Pose, **{name: st.floats(*RANGES[name]) for name in ("yaw", "pitch", "roll")})
amounts = st.fixed_dictionaries({name: st.floats(*RANGES[name]) for name in MOVEMENTS})


def neutral(pose: Pose) -> NeutralFace:
    still = Pose(pose.yaw, pose.pitch, pose.roll, x=pose.x, y=pose.y, size=pose.size)
    points = pose_points(RIG, still, WIDTH, HEIGHT).astype(np.float32)
    matrix = pose.size * HEIGHT * rotation(pose.yaw, pose.pitch, pose.roll)[:2] * [[1], [-1]]
    return NeutralFace(Landmarks(points, WIDTH, HEIGHT), matrix)


@given(pose=poses, movements=amounts)
def test_an_expression_on_a_neutral_face_has_the_points_of_the_pose(pose: Pose, movements: dict[str, float]) -> None:
    full = Pose(**{**asdict(pose), **movements})
    shown = neutral(pose).with_expression(displacement(RIG, full))
    np.testing.assert_allclose(shown.points, pose_points(RIG, full, WIDTH, HEIGHT), atol=1e-2)


@given(pose=poses)
def test_angles_are_those_of_the_pose(pose: Pose) -> None:
    assert angles(neutral(pose).matrix) == pytest.approx((pose.yaw, pose.pitch, pose.roll), abs=1e-6)


@given(pose=poses, movements=amounts, width=st.integers(256, 2048), height=st.integers(256, 2048))
def test_a_crop_moves_every_expression_alike(pose: Pose, movements: dict, width: int, height: int) -> None:
    face = neutral(pose)
    box = face.landmarks.box
    crop = lambda landmarks: crop_and_resize(landmarks, width, height, box)  # noqa: E731
    field = displacement(RIG, Sliders(**movements))
    expected = crop(face.with_expression(field)).points
    np.testing.assert_allclose(face.moved(crop).with_expression(field).points, expected, atol=0.05)


@given(movements=st.sampled_from(list(EXPRESSIONS)), strength=st.floats(0, 1))
def test_movements_are_recovered_from_their_displacement(movements: str, strength: float) -> None:
    """Movements overlap, so the amounts may differ, but the points may not."""
    field = displacement(RIG, with_expression(Sliders(), movements, strength))
    found = movements_of(RIG, field)
    assert np.abs(displacement(RIG, Sliders(**found)) - field).max() < 0.006
    for name, amount in found.items():
        assert RANGES[name][0] <= amount <= RANGES[name][1]


@given(pose=poses, name=st.sampled_from(list(EXPRESSIONS)), x=st.floats(0.2, 0.8), size=st.floats(0.1, 1))
def test_a_photos_pose_as_sliders_has_the_photos_points(pose: Pose, name: str, x: float, size: float) -> None:
    full = Pose(**{**asdict(with_expression(pose, name, 1)), "x": x, "size": size})
    field = displacement(RIG, full)
    found = pose_of(RIG, neutral(full), field, RANGES)
    expected = pose_points(RIG, full, WIDTH, HEIGHT)
    assert np.abs(pose_points(RIG, found, WIDTH, HEIGHT) - expected).max() < 0.01 * size * HEIGHT
    assert (found.x, found.y, found.size) == pytest.approx((x, full.y, size), abs=1e-4)
