from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from facesnap_ext.landmarks.deca import CODE_SIZES, Deca, project
from facesnap_ext.landmarks.flame import Flame, full_pose, posed_vertices
from facesnap_ext.landmarks.points72 import POLYLINES, points_on
from facesnap_lab.miniature.head import EXPRESSIONS, SHAPES, face_layout, stand_in_flame
from tests.support.stand_in_deca import stand_in_deca


@pytest.fixture(scope="module")
def flame() -> Flame:
    return Flame(**stand_in_flame())


def points(flame: Flame, shape: dict[int, float] = {}, expression: dict[int, float] = {}) -> np.ndarray:  # noqa: B006
    codes = torch.zeros(1, 100), torch.zeros(1, 50)
    for code, chosen in zip(codes, (shape, expression)):
        for index, value in chosen.items():
            code[0, index] = value
    return points_on(posed_vertices(flame, *codes, torch.zeros(1, 5, 3)), flame.faces)[0].numpy()


def test_mesh_has_flames_counts_and_is_a_disc(flame: Flame) -> None:
    assert flame.v_template.shape == (5023, 3)
    assert flame.faces.shape == (9976, 3)
    edges = Counter(frozenset(edge) for a, b, c in flame.faces.tolist() for edge in ((a, b), (b, c), (c, a)))
    assert set(edges.values()) == {1, 2}
    rim = [tuple(edge) for edge, count in edges.items() if count == 1]
    assert sorted(Counter(v for edge in rim for v in edge).values()) == [2] * len(rim)
    assert 5023 - len(edges) + 9976 == 1, "Euler characteristic of a disc"


def test_triangles_face_outwards(flame: Flame) -> None:
    a, b, c = flame.v_template[flame.faces].unbind(1)
    outward = (torch.linalg.cross(b - a, c - a) * ((a + b + c) / 3 - flame.v_template.mean(0))).sum(1) > 0
    assert outward.double().mean() > 0.98


def test_72_points_form_a_face(flame: Flame) -> None:
    on_mesh = points(flame)
    np.testing.assert_allclose(on_mesh[:, :2], face_layout(), atol=2e-4)
    parts = {part: on_mesh[[i for line in lines for i in line]] for part, lines in POLYLINES.items()}
    mean = {part: position.mean(0) for part, position in parts.items()}
    assert mean["left_eye"][0] < -0.02 < 0.02 < mean["right_eye"][0]
    assert mean["left_eyebrow"][1] > mean["left_eye"][1] > mean["nose"][1] > mean["mouth"][1] > on_mesh[8, 1]
    assert on_mesh[30, 2] == on_mesh[:, 2].max(), "the tip of the nose is in front"
    assert mean["face_contour"][2] < mean["left_eye"][2] < mean["mouth"][2]
    assert 0.12 < np.ptp(on_mesh[:, 0]) < 0.16
    assert 0.12 < np.ptp(on_mesh[:, 1]) < 0.16


def test_face_is_symmetric(flame: Flame) -> None:
    on_mesh = points(flame, dict.fromkeys(range(40), 1.0), dict.fromkeys(range(20), 0.5))
    contour, mouth = POLYLINES["face_contour"][0], [52, 55, 54, 53, 68, 69]
    pairs = list(zip(contour, contour[::-1])) + list(zip(mouth, [57, 60, 59, 58, 65, 66]))
    pairs += [(17 + i, 26 - i) for i in range(5)]
    for left, right in pairs:
        np.testing.assert_allclose(on_mesh[left] * [-1, 1, 1], on_mesh[right], atol=1e-3)


def test_skinning_weights_and_joints_are_plausible(flame: Flame) -> None:
    torch.testing.assert_close(flame.weights.sum(1), torch.ones(5023))
    assert flame.weights.min() >= 0
    torch.testing.assert_close(flame.J_regressor.sum(1), torch.ones(5), atol=1e-4, rtol=0)
    joints = flame.J_regressor @ flame.v_template
    low, high = flame.v_template.min(0).values, flame.v_template.max(0).values
    assert ((joints > low) & (joints < high)).all()
    assert joints[0, 1] < joints[1, 1] < joints[2, 1] < joints[3, 1], "from the bottom up: root, neck, jaw, eyes"
    on_points = points_on(flame.weights[None, :, [2, 2, 2]], flame.faces)[0, :, 0]
    assert on_points[[8, 70, 71]].min() > 0.95
    assert on_points[[*range(17, 52), 62, 63]].max() < 0.1


def test_directions_do_what_their_names_say(flame: Flame) -> None:
    rest = points(flame)
    shape = {name: points(flame, shape={i: 1}) - rest for i, name in enumerate(SHAPES)}
    expression = {name: points(flame, expression={i: 1}) - rest for i, name in enumerate(EXPRESSIONS)}
    assert shape["wider jaw"][13, 0] > 0.002 > -0.002 > shape["wider jaw"][4, 0]
    assert shape["longer face"][8, 1] < -0.003
    assert expression["mouth open"][70, 1] < -0.003
    assert abs(expression["mouth open"][63, 1]) < 0.0005
    assert expression["brows up"][[17, 19, 24, 26], 1].min() > 0.001
    assert expression["smile"][[52, 57], 1].min() > 0.002
    assert expression["eyes closed"][[38, 39, 45, 46], 1].max() < -0.002


def test_seeds_are_reproducible_and_give_different_people() -> None:
    first, again, other = stand_in_flame(1, 40, 20), stand_in_flame(1, 40, 20), stand_in_flame(2, 40, 20)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(first["v_template"], other["v_template"])
    assert not torch.equal(first["shapedirs"], other["shapedirs"])
    random = np.random.default_rng(0)
    meshes = first["v_template"] + torch.einsum(
        "vcs,ns->nvc", first["shapedirs"], torch.tensor(random.normal(size=(6, 40))).float()
    )
    people = points_on(meshes, first["faces"])
    apart = (people[:, None] - people).norm(dim=-1).mean(-1)[~torch.eye(6, dtype=bool)]
    assert 0.002 < apart.min() < apart.max() < 0.02, "in metres: clearly different, but still faces"


def test_stand_in_encoder_frames_the_head(flame: Flame) -> None:
    state = stand_in_deca()
    again = stand_in_deca()
    assert all(torch.equal(tensor, again[key]) for key, tensor in state.items())
    deca = Deca({key: tuple(tensor.shape) for key, tensor in state.items()}, CODE_SIZES)
    deca.load_state_dict(state)
    generator = torch.Generator().manual_seed(5)
    small = torch.rand(8, 3, 12, 12, generator=generator)
    with torch.no_grad():
        codes = deca.eval()(torch.nn.functional.interpolate(small, (224, 224), mode="bicubic").clamp(0, 1))
    seen = project(
        points_on(posed_vertices(flame, codes["shape"], codes["exp"], full_pose(flame, codes["pose"])), flame.faces),
        codes["cam"],
    )
    extent = (seen.amax(1) - seen.amin(1)) / 2
    assert extent.min() > 0.5
    assert extent.max() < 0.95
    assert ((seen.amax(1) + seen.amin(1)) / 2).abs().max() < 0.25
    assert codes["shape"].std(0).mean() > 0.05, "different images give different codes"
