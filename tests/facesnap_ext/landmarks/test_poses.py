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
from facesnap_ext.landmarks.movements import EXPRESSIONS, LIDS, MOVEMENTS, TURNS, Sliders, with_expression
from facesnap_ext.landmarks.open_face import OpenShape, load_basis
from facesnap_ext.landmarks.points72 import (
    LEFT_CORNER,
    LEFT_EYE,
    NOSE_TIP,
    POLYLINES,
    RIGHT_CORNER,
    RIGHT_EYE,
    Landmarks,
    points_on,
)
from facesnap_ext.landmarks.poses import (
    TEMPLATES,
    Pose,
    Rig,
    placement,
    pose_landmarks,
    pose_points,
    reposition,
)
from facesnap_ext.landmarks.rigs import JAW_OPEN, flame_rig, movement_fields, open_face_rig
from facesnap_ext.settings.pose import pose_from_unit
from facesnap_ext.settings.unit import RANGES, Unit
from facesnap_lab.miniature.render import head
from tests.support.units import changed, make_unit

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
    points = rig.rest
    for name in MOVEMENTS:
        amount, directions = getattr(pose, name), rig.directions[name]
        if amount > 0:
            points = points + amount * directions[0]
        if amount < 0:
            points = points - amount * directions[1]
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


def test_flames_face_moves_as_far_as_icts_relative_to_its_height(flame: Flame) -> None:
    """The points of both lie on a mesh. The detector that finds a photo's landmarks places them differently."""
    basis = load_basis("ict")
    height = np.ptp(basis.mean[:, 1])
    for shape in (None, torch.linspace(-1.5, 1.5, 12)):
        directions = flame_rig(flame, shape).directions
        for name, field in movement_fields(basis).items():
            if name != "mouth":
                np.testing.assert_allclose(directions[name], field / height, atol=1e-6, err_msg=name)


def test_signs_match_the_settings(rig: Rig) -> None:
    def point(index: int, **values: float) -> np.ndarray:
        return pose_points(rig, Pose(**values), WIDTH, HEIGHT)[index]

    assert point(NOSE_TIP, yaw=30)[0] > point(NOSE_TIP)[0] + 20, "the nose moves to the image's right"
    assert point(NOSE_TIP, pitch=20)[1] > point(NOSE_TIP)[1] + 20, "the nose moves down"
    assert point(19, roll=20)[0] > point(19)[0] + 20, "the head tilts to the image's right"
    assert point(CHIN, mouth=1)[1] > point(CHIN)[1] + 20
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
    opened = rig.rest + rig.directions["mouth"][0]
    np.testing.assert_allclose(opened - opened[0], (points - points[0]) / _height(flame), atol=1e-6)
    mouth_opening = opened[63, 1] - opened[70, 1]
    assert mouth_opening > 0.1 > 5 * (rig.rest[63, 1] - rig.rest[70, 1])


def _height(flame: Flame) -> float:
    return np.ptp(points_on(flame.v_template[None], flame.faces)[0, :, 1].numpy())


@pytest.mark.parametrize(("lid", "eye"), [("lid_left", 0), ("lid_right", 1)])
def test_each_eye_closes_and_widens_on_any_head(rig: Rig, lid: str, eye: int) -> None:
    def openings(amount: float) -> np.ndarray:
        points = pose_points(rig, Pose(**{lid: amount}), WIDTH, HEIGHT)
        return (points[LOWER_LIDS, 1] - points[UPPER_LIDS, 1]).reshape(2, 3)

    np.testing.assert_allclose(openings(-1)[eye], 0, atol=1e-3)
    assert (openings(0) > 3).all()
    np.testing.assert_allclose(openings(-0.5)[eye], openings(0)[eye] / 2, atol=1e-3)
    np.testing.assert_allclose(openings(1)[eye], 1.6 * openings(0)[eye], rtol=1e-4)
    np.testing.assert_allclose(openings(-1)[1 - eye], openings(0)[1 - eye], err_msg="the other eye does not move")
    for direction in rig.directions[lid]:
        unmoved = np.flatnonzero(~direction.any(1))
        corners = {36, 40, 44, 48}
        assert {*range(72)} - {*(LEFT_EYE, RIGHT_EYE)[eye]} | corners & {*unmoved} == {*unmoved}


BROWS = {side: POLYLINES[f"{side}_eyebrow"][0] for side in ("left", "right")}  # from the image's left to its right
MOUTH = [LEFT_CORNER, RIGHT_CORNER]


def moved(rig: Rig, **amounts: float) -> np.ndarray:
    """The displacement [72,2] of the face seen from the front, in face heights: x to the right, y up."""
    both = [pose_points(rig, Pose(x=0, y=0, size=1, **one), 1, 1) for one in ({}, amounts)]
    return (both[1] - both[0]) * (1, -1)


@pytest.mark.parametrize(
    ("name", "amount", "points", "axis", "sign"),
    [
        ("mouth", 1, [CHIN, 71], 1, -1),
        ("lips", 1, [63], 1, 1),
        ("smile_left", 1, [LEFT_CORNER], 1, 1),
        ("smile_left", 1, [LEFT_CORNER], 0, -1),
        ("smile_right", 1, [RIGHT_CORNER], 1, 1),
        ("smile_right", 1, [RIGHT_CORNER], 0, 1),
        ("frown", 1, MOUTH, 1, -1),
        ("pucker", 1, [LEFT_CORNER], 0, 1),
        ("pucker", 1, [RIGHT_CORNER], 0, -1),
        ("stretch", 1, [RIGHT_CORNER], 0, 1),
        ("stretch", 1, [LEFT_CORNER], 0, -1),
        ("mouth_shift", 1, MOUTH, 0, 1),
        ("mouth_shift", -1, MOUTH, 0, -1),
        ("sneer", 1, [63, 31, 35], 1, 1),
        ("brow_inner", 1, [BROWS["left"][-1], BROWS["right"][-1]], 1, 1),
        ("brow_inner", -1, [BROWS["left"][-1], BROWS["right"][-1]], 1, -1),
        ("brow_outer_left", 1, BROWS["left"][:3], 1, 1),
        ("brow_outer_left", -1, BROWS["left"][:3], 1, -1),
        ("brow_outer_right", 1, BROWS["right"][:3], 1, 1),
        ("brow_outer_right", -1, BROWS["right"][:3], 1, -1),
    ],
)
def test_each_movement_displaces_its_points_as_its_name_says(
    rig: Rig, name: str, amount: float, points: list[int], axis: int, sign: int
) -> None:
    assert (sign * moved(rig, **{name: amount})[points, axis] > 0.015).all()


@pytest.mark.parametrize("name", [name for name in MOVEMENTS if name.endswith(("_left", "_right"))])
def test_movements_of_one_side_move_that_side(rig: Rig, name: str) -> None:
    sizes = np.abs(moved(rig, **{name: 1})).sum(1)
    left = rig.rest[:, 0] < -0.02
    assert sizes[left].sum() * (10 if name.endswith("_right") else 0.1) < sizes[~left].sum() or name.endswith("_left")
    assert sizes[left].sum() > 3 * sizes[~left].sum() or name.endswith("_right")


def openings(points: np.ndarray) -> np.ndarray:
    """Mean opening of the left and the right eye."""
    return (points[UPPER_LIDS, 1] - points[LOWER_LIDS, 1]).reshape(2, 3).mean(1)


def _smiles(move: np.ndarray, face: np.ndarray, rest: np.ndarray) -> bool:
    return (move[MOUTH, 1] > 0.02).all() and move[LEFT_CORNER, 0] < -0.02 < 0.02 < move[RIGHT_CORNER, 0]


def _mouth_opening(points: np.ndarray) -> float:
    return points[63, 1] - points[70, 1]


INNER = [BROWS["left"][-1], BROWS["right"][-1]]
OUTER = [BROWS["left"][0], BROWS["right"][0]]
SHOWS = {
    "neutral": lambda move, face, rest: not move.any(),
    "smile": lambda move, face, rest: _smiles(move, face, rest) and _mouth_opening(face) < 0.06,
    "laugh": lambda move, face, rest: (
        move[MOUTH, 1].min() > move[63, 1] - 0.01 and _mouth_opening(face) > _mouth_opening(rest) + 0.05
    ),
    "surprise": lambda move, face, rest: (
        (openings(face) > 1.2 * openings(rest)).all()
        and (move[INNER + OUTER, 1] > 0.02).all()
        and _mouth_opening(face) > _mouth_opening(rest) + 0.08
    ),
    "sad": lambda move, face, rest: (move[MOUTH, 1] < -0.02).all() and (move[INNER, 1] - move[OUTER, 1] > 0.04).all(),
    "angry": lambda move, face, rest: (move[INNER, 1] < -0.02).all() and (move[OUTER, 1] - move[INNER, 1] > 0.03).all(),
    "wink": lambda move, face, rest: (
        openings(face)[1] < 0.01 < 0.8 * openings(rest)[0] < openings(face)[0]  # exactly one eye
    ),
    "kiss": lambda move, face, rest: np.ptp(face[MOUTH, 0]) < 0.85 * np.ptp(rest[MOUTH, 0]),
    "disgust": lambda move, face, rest: (
        (move[INNER, 1] < -0.01).all()
        and (move[[31, 35, 63], 1] > 0.015).all()
        and (openings(face) < openings(rest)).all()
    ),
    "fear": lambda move, face, rest: (
        (openings(face) > 1.2 * openings(rest)).all()
        and (move[INNER, 1] - move[OUTER, 1] > 0.03).all()
        and np.ptp(face[MOUTH, 0]) > 1.1 * np.ptp(rest[MOUTH, 0])
    ),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_named_expressions_look_like_their_names(rig: Rig, name: str) -> None:
    amounts = vars(with_expression(Sliders(), name, 1))
    move = moved(rig, **amounts)
    rest = pose_points(rig, Pose(x=0, y=0, size=1), 1, 1) * (1, -1)
    assert SHOWS[name](move, rest + move, rest)


@given(strength=st.floats(0, 1.5), name=st.sampled_from(list(EXPRESSIONS)))
def test_strength_scales_a_named_expression_up_to_the_sliders_ranges(strength: float, name: str) -> None:
    at = with_expression(Sliders(), name, strength)
    for movement in MOVEMENTS:
        amount = strength * EXPRESSIONS[name].get(movement, 0)
        assert getattr(at, movement) == pytest.approx(np.clip(amount, *RANGES[movement]))
    assert EXPRESSIONS[name].keys() <= MOVEMENTS.keys()


def test_every_rig_has_every_movement_and_turns_need_none(rig: Rig) -> None:
    assert list(rig.directions) == list(MOVEMENTS)
    for name, slider in MOVEMENTS.items():
        assert rig.directions[name].shape == (2 if slider.range[0] < 0 else 1, 72, 3), name
        assert slider.range in ((0, 1), (-1, 1))
        assert all(direction.any() for direction in rig.directions[name])
    assert set(TURNS).isdisjoint(MOVEMENTS)
    assert LIDS.keys() <= MOVEMENTS.keys()


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
    unit = make_unit(pose="template", template="tilted", yaw=60, mouth=1, x=0.2, size=0.3)
    assert pose_from_unit(unit, 1024, 1024) == replace(TEMPLATES["tilted"], x=0.2, size=0.3)
    with pytest.raises(FaceSnapError, match="no pose template named 'sideways'; choose one of front, three"):
        pose_from_unit(replace(unit, template="sideways"), 1024, 1024)


def test_sliders_override_the_template() -> None:
    sliders = {"yaw": 10, "pitch": -5, "roll": 3, "mouth": 0.2, "brow_inner": -0.1, "lid_left": 0.3}
    unit = make_unit(pose="sliders", template="tilted", y=0.7, **sliders)
    assert pose_from_unit(unit, 1024, 1024) == Pose(**sliders, y=0.7)
    assert pose_from_unit(unit, 512, 1024).size == Pose().size / 2, "the default is a fraction of the shorter side"
    assert pose_from_unit(replace(unit, size=0.4), 512, 1024).size == 0.4, (
        "an explicit size is a fraction of the height"
    )


def test_the_chosen_expression_replaces_that_of_the_pose_and_adds_up_with_the_sliders() -> None:
    chosen = {"expression_source": "custom", "expression": "wink", "expression_strength": 0.5, "mouth": 0.3}
    unit = make_unit(pose="template", template="looking down", lid_left=0.2, **chosen)
    pose = pose_from_unit(unit, 1024, 1024)
    assert (pose.pitch, pose.size) == (TEMPLATES["looking down"].pitch, TEMPLATES["looking down"].size)
    wink = EXPRESSIONS["wink"]
    assert pose.lid_left == pytest.approx(0.5 * wink["lid_left"] + 0.2)
    assert (pose.lid_right, pose.mouth, pose.frown) == (pytest.approx(0.5 * wink["lid_right"]), 0.3, 0)
    sliders = pose_from_unit(changed(unit, pose="sliders", yaw=7), 1024, 1024)
    assert (sliders.yaw, sliders.lid_left, sliders.lid_right) == (7, pose.lid_left, pose.lid_right)


@pytest.mark.parametrize("source", ["reference", "driving"])
@pytest.mark.parametrize("kind", ["template", "sliders"])
def test_the_face_is_neutral_before_a_photos_expression_is_added(source: str, kind: str) -> None:
    unit = make_unit(pose=kind, template="looking up", mouth=1, expression="laugh", expression_source=source, yaw=5)
    pose = pose_from_unit(unit, 1024, 1024)
    assert {name: getattr(pose, name) for name in MOVEMENTS} == dict.fromkeys(MOVEMENTS, 0)


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
