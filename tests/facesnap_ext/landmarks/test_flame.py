from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from scipy.spatial.transform import Rotation

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.flame import (
    GLOBAL,
    JAW,
    Flame,
    convert_flame,
    full_pose,
    load_flame,
    posed_vertices,
    rotation_matrices,
    save_flame,
    unposed_vertices,
)
from facesnap_ext.landmarks.points72 import POLYLINES, points_on
from facesnap_lab.miniature.head import stand_in_flame

vectors = st.lists(st.floats(-4, 4, allow_subnormal=False), min_size=3, max_size=3)


def small_flame(seed: int = 0, vertices: int = 60) -> Flame:
    """Return a model with FLAME's joints but random dense tensors, not shaped like a head."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.normal(size=shape)).float()

    weights = random.dirichlet(np.ones(5), vertices)
    return Flame(
        v_template=normal(vertices, 3),
        shapedirs=normal(vertices, 3, 7),
        expressiondirs=normal(vertices, 3, 4),
        posedirs=normal(vertices, 3, 36),
        J_regressor=normal(5, vertices) / vertices,
        weights=torch.from_numpy(weights).float(),
        parents=torch.tensor([-1, 0, 1, 1, 1]),
        faces=torch.from_numpy(random.integers(0, vertices, (90, 3))),
    )


def random_codes(seed: int, count: int, shapes: int = 7, expressions: int = 4) -> list[torch.Tensor]:
    random = np.random.default_rng(seed)
    sizes = ((count, shapes), (count, expressions), (count, 5, 3))
    return [torch.from_numpy(random.normal(0, 0.7, size)).float() for size in sizes]


def reference_skinning(flame: Flame, shape: np.ndarray, expression: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Pose one FLAME mesh in float64 with 4x4 matrices: each joint's world matrix times its inverse rest matrix."""
    template, shapes, expressions, correctives, regressor, weights = (
        getattr(flame, name).double().numpy()
        for name in ("v_template", "shapedirs", "expressiondirs", "posedirs", "J_regressor", "weights")
    )
    rest = template.copy()
    for coefficient, direction in zip(
        [*shape, *expression], [*shapes.transpose(2, 0, 1), *expressions.transpose(2, 0, 1)]
    ):
        rest += coefficient * direction
    joints = regressor @ rest

    rotations = Rotation.from_rotvec(pose).as_matrix()
    feature = [entry for rotation in rotations[1:] for entry in (rotation - np.eye(3)).ravel()]
    corrected = rest + sum(value * direction for value, direction in zip(feature, correctives.transpose(2, 0, 1)))

    def rigid(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = rotation, translation
        return matrix

    world: list[np.ndarray] = []
    for joint, parent in enumerate(flame.parents.tolist()):
        if parent < 0:
            world.append(rigid(rotations[joint], joints[joint]))
        else:
            world.append(world[parent] @ rigid(rotations[joint], joints[joint] - joints[parent]))
    skinning = [matrix @ np.linalg.inv(rigid(np.eye(3), position)) for matrix, position in zip(world, joints)]

    result = np.empty_like(corrected)
    for vertex, (position, blend_weights) in enumerate(zip(corrected, weights)):
        blended = sum(weight * matrix for weight, matrix in zip(blend_weights, skinning))
        result[vertex] = (blended @ [*position, 1])[:3]
    return result


@settings(max_examples=50, deadline=None)
@given(st.lists(vectors, min_size=1, max_size=4))
def test_rotation_matrices_match_scipy(rotation_vectors: list[list[float]]) -> None:
    ours = rotation_matrices(torch.tensor(rotation_vectors, dtype=torch.float64))
    np.testing.assert_allclose(ours, Rotation.from_rotvec(rotation_vectors).as_matrix(), atol=1e-12)


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-8, math.pi, 2 * math.pi, 30.0])
def test_rotation_matrices_are_orthogonal_at_every_angle(length: float) -> None:
    rotation = rotation_matrices(torch.tensor([[0.6, 0.0, -0.8]], dtype=torch.float64) * length)[0]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3, dtype=torch.float64))
    assert torch.linalg.det(rotation) == pytest.approx(1)


def test_zero_pose_equals_unposed_mesh_bit_for_bit(flame: Flame) -> None:
    shape, expression = torch.zeros(2, 100), torch.zeros(2, 50)
    shape[1, 3], expression[1, 5] = 1.5, -2
    posed = posed_vertices(flame, shape, expression, torch.zeros(2, 5, 3))
    assert torch.equal(posed[0], flame.v_template)
    assert torch.equal(posed, unposed_vertices(flame, shape, expression))
    expected = flame.v_template + 1.5 * flame.shapedirs[..., 3] - 2 * flame.expressiondirs[..., 5]
    torch.testing.assert_close(posed[1], expected, atol=1e-7, rtol=0)


def test_posed_vertices_match_reference_skinning() -> None:
    flame = small_flame()
    codes = random_codes(1, 3)
    posed = posed_vertices(flame, *codes)
    for index in range(3):
        expected = reference_skinning(flame, *(code[index].double().numpy() for code in codes))
        np.testing.assert_allclose(posed[index], expected, atol=1e-5, rtol=1e-5)


def test_posed_vertices_match_reference_skinning_on_a_head(flame: Flame) -> None:
    codes = random_codes(2, 1, 100, 50)
    expected = reference_skinning(flame, *(code[0].double().numpy() for code in codes))
    np.testing.assert_allclose(posed_vertices(flame, *codes)[0], expected, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(vectors)
def test_global_rotation_turns_the_mesh_about_its_joint(vector: list[float]) -> None:
    flame = small_flame(3)
    shape, expression, pose = random_codes(4, 1)
    pose = torch.zeros_like(pose)
    pose[0, GLOBAL] = torch.tensor(vector)
    rest = unposed_vertices(flame, shape, expression)[0].double().numpy()
    joint = flame.J_regressor[GLOBAL].double().numpy() @ rest
    turned = Rotation.from_rotvec(pose[0, GLOBAL].double().numpy()).apply(rest - joint) + joint
    np.testing.assert_allclose(posed_vertices(flame, shape, expression, pose)[0], turned, atol=2e-5)


def test_jaw_moves_the_lower_lip_but_not_the_brows(flame: Flame) -> None:
    pose = torch.zeros(2, 5, 3)
    pose[1, JAW, 0] = 0.3
    closed, opened = points_on(
        posed_vertices(replace(flame, posedirs=flame.posedirs * 0), torch.zeros(2, 1), torch.zeros(2, 1), pose),
        flame.faces,
    )
    moved = (opened - closed).norm(dim=1)
    brows = [i for part in ("left_eyebrow", "right_eyebrow") for i in POLYLINES[part][0]]
    assert moved[brows].max() < 1e-4
    assert moved[[71, 70, 8]].min() > 0.01
    assert (opened - closed)[[71, 70, 8], 1].max() < -0.01, "a positive angle opens the mouth"
    assert moved[62] < 0.002, "the upper lip does not move"


def test_batch_matches_single_meshes(flame: Flame) -> None:
    codes = random_codes(5, 4, 100, 50)
    batched = posed_vertices(flame, *codes)
    for index in range(4):
        torch.testing.assert_close(
            batched[index : index + 1], posed_vertices(flame, *(c[index : index + 1] for c in codes))
        )


def test_missing_coefficients_are_zero(flame: Flame) -> None:
    shape, expression, pose = random_codes(6, 1, 100, 50)
    shape[:, 10:], expression[:, 6:] = 0, 0
    torch.testing.assert_close(
        posed_vertices(flame, shape[:, :10], expression[:, :6], pose), posed_vertices(flame, shape, expression, pose)
    )


def test_full_pose_assigns_decas_code_to_global_and_jaw_joints(flame: Flame) -> None:
    pose = full_pose(flame, torch.arange(12.0).reshape(2, 6))
    assert pose.shape == (2, 5, 3)
    assert pose[1, GLOBAL].tolist() == [6, 7, 8]
    assert pose[1, JAW].tolist() == [9, 10, 11]
    assert pose[:, [1, 3, 4]].abs().max() == 0


def flame_pickle(vertices: int = 30) -> dict[str, object]:
    """Return the contents of a generic_model.pkl, with the same types but fewer vertices."""
    import scipy.sparse

    random = np.random.default_rng(9)
    return {
        "v_template": random.normal(size=(vertices, 3)),
        "shapedirs": random.normal(size=(vertices, 3, 400)),
        "posedirs": random.normal(size=(vertices, 3, 36)),
        "J_regressor": scipy.sparse.csc_matrix(random.random((5, vertices)) * (random.random((5, vertices)) < 0.3)),
        "J": random.normal(size=(5, 3)),
        "weights": random.dirichlet(np.ones(5), vertices),
        "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], [0, 1, 2, 3, 4]], dtype=np.uint32),
        "f": random.integers(0, vertices, (40, 3)).astype(np.uint32),
        "bs_style": "lbs",
        "bs_type": "lrotmin",
    }


def test_pickle_converts_exactly(tmp_path: Path) -> None:
    content = flame_pickle()
    source, destination = tmp_path / "generic_model.pkl", tmp_path / "flame.safetensors"
    source.write_bytes(pickle.dumps(content, protocol=2))
    convert_flame(source, destination)
    flame = load_flame(destination)

    assert flame.shapedirs.shape == (30, 3, 300)
    assert flame.expressiondirs.shape == (30, 3, 100)
    np.testing.assert_array_equal(flame.shapedirs, content["shapedirs"][..., :300].astype(np.float32))
    np.testing.assert_array_equal(flame.expressiondirs, content["shapedirs"][..., 300:].astype(np.float32))
    np.testing.assert_array_equal(flame.J_regressor, content["J_regressor"].toarray().astype(np.float32))
    for name in ("v_template", "posedirs", "weights"):
        np.testing.assert_array_equal(getattr(flame, name), content[name].astype(np.float32))
    np.testing.assert_array_equal(flame.faces, content["f"])
    assert flame.parents.tolist() == [-1, 0, 1, 1, 1]
    with safe_open(destination, "pt") as file:
        assert file.metadata() == {"format": "facesnap-flame", "version": "1", "source": "generic_model.pkl"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapedirs": None}, "shapedirs is missing"),
        ({"weights": np.ones((30, 4))}, "weights has the wrong shape"),
        ({"posedirs": np.ones((30, 3, 27))}, "posedirs has the wrong shape"),
        ({"f": np.full((40, 3), 30)}, "triangles"),
        ({"kintree_table": np.array([[-1, 2, 0, 1, 1]] * 2)}, "joints"),
    ],
)
def test_pickles_that_are_not_flame_are_rejected(tmp_path: Path, change: dict[str, object], message: str) -> None:
    source = tmp_path / "model.pkl"
    content = {key: value for key, value in (flame_pickle() | change).items() if value is not None}
    source.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(FaceSnapError, match=rf"model\.pkl.*{message}"):
        convert_flame(source, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_saved_model_loads_unchanged(tmp_path: Path) -> None:
    tensors = stand_in_flame(3, 5, 4)
    save_flame(tmp_path / "f.safetensors", tensors, "test")
    loaded = load_flame(tmp_path / "f.safetensors")
    assert all(torch.equal(getattr(loaded, name), tensor) for name, tensor in tensors.items())


def test_unconverted_pickle_is_rejected(tmp_path: Path) -> None:
    source = tmp_path / "generic_model.pkl"
    source.write_bytes(pickle.dumps(flame_pickle(), protocol=2))
    with pytest.raises(FaceSnapError, match=r"generic_model\.pkl .* convert"):
        load_flame(source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("part", ["", "shapedirs", "J_regressor", "weights"])
def test_files_of_any_type_compute_in_single_precision(tmp_path: Path, dtype: torch.dtype, part: str) -> None:
    original, path = small_flame(), tmp_path / "flame.safetensors"
    stored = {key: t.to(dtype) if t.is_floating_point() and part in key else t for key, t in vars(original).items()}
    stored["faces"] = stored["faces"].int()
    save_flame(path, stored, "test")
    loaded, codes = load_flame(path), random_codes(0, 1)
    rounded = Flame(**{key: stored[key].to(tensor.dtype) for key, tensor in vars(original).items()})
    torch.testing.assert_close(posed_vertices(loaded, *codes), posed_vertices(rounded, *codes))
    assert points_on(posed_vertices(loaded, *codes), loaded.faces[:1].repeat(9976, 1)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("part", ["faces", "parents"])
def test_indices_that_are_not_whole_numbers_are_rejected(tmp_path: Path, dtype: torch.dtype, part: str) -> None:
    tensors = dict(vars(small_flame()))
    tensors[part] = tensors[part].to(dtype)
    with pytest.raises(FaceSnapError, match="joints or triangles are invalid"):
        save_flame(tmp_path / "flame.safetensors", tensors, "test")
