from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.deca import (
    CODE_SIZES,
    Deca,
    ResNet,
    convert_deca,
    crop_face,
    crop_transform,
    load_deca,
    project,
    save_deca,
    to_photo,
)
from tests.support.stand_in_deca import stand_in_deca


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return stand_in_deca()


def build(state: dict[str, torch.Tensor]) -> Deca:
    deca = Deca({key: tuple(tensor.shape) for key, tensor in state.items()}, CODE_SIZES)
    deca.load_state_dict(state)
    return deca.eval().requires_grad_(False)


def resnet_shapes(depths: list[int], outputs: list[int], stem: int) -> dict[str, tuple[int, ...]]:
    shapes = {"conv1.weight": (stem, 3, 7, 7)}
    for level, (depth, output) in enumerate(zip(depths, outputs), 1):
        for block in range(depth):
            shapes[f"layer{level}.{block}.conv1.weight"] = (output // 4, 0, 1, 1)
            shapes[f"layer{level}.{block}.conv3.weight"] = (output, output // 4, 1, 1)
        shapes[f"layer{level}.0.downsample.0.weight"] = (output, 0, 1, 1)
    return shapes


def transformers_name(key: str) -> str:
    """Translate a torchvision tensor name to the name in transformers' ResNet."""
    kinds = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    parts = key.split(".")
    if len(parts) == 2:
        return f"embedder.embedder.{kinds[parts[0][:-1]]}.{parts[1]}"
    stage, block = int(parts[0][-1]) - 1, parts[1]
    layer = f"encoder.stages.{stage}.layers.{block}"
    if parts[2] == "downsample":
        return f"{layer}.shortcut.{kinds[parts[3]]}.{parts[4]}"
    return f"{layer}.layer.{int(parts[2][-1]) - 1}.{kinds[parts[2][:-1]]}.{parts[3]}"


@pytest.mark.parametrize(("depths", "outputs"), [([1, 1, 1, 1], [16, 24, 32, 40]), ([3, 4, 6, 3], [16, 32, 48, 64])])
def test_resnet_matches_transformers(depths: list[int], outputs: list[int]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=outputs, depths=depths, layer_type="bottleneck", downsample_in_first_stage=False
    )
    theirs = transformers.ResNetModel(config).eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    ours = ResNet(resnet_shapes(depths, outputs, 8)).eval()
    reference = theirs.state_dict()
    ours.load_state_dict({key: reference.pop(transformers_name(key)) for key in ours.state_dict()})
    assert not reference, "every tensor of the reference is used"
    x = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).pooler_output.flatten(1), atol=1e-5, rtol=1e-4)


def test_published_sizes_are_resnet50() -> None:
    with torch.device("meta"):
        network = ResNet(resnet_shapes([3, 4, 6, 3], [256, 512, 1024, 2048], 64))
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters == 25_557_032 - 2_049_000, "ResNet-50 without its classifier"


def test_codes_are_split_in_decas_order(state: dict[str, torch.Tensor]) -> None:
    numbered = state | {"layers.2.weight": state["layers.2.weight"] * 0, "layers.2.bias": torch.arange(236.0)}
    codes = build(numbered)(torch.rand(1, 3, 224, 224))
    first = {name: int(code[0, 0]) for name, code in codes.items()}
    assert first == {"shape": 0, "tex": 100, "exp": 150, "pose": 200, "cam": 206, "light": 209}
    assert {name: code.shape[1] for name, code in codes.items()} == CODE_SIZES


def reference_crop(photo: np.ndarray, size: float, centre: np.ndarray) -> np.ndarray:
    """Compute the crop as DECA's data set does: estimate the transform from three corners and warp the whole photo."""
    from skimage.transform import estimate_transform, warp

    side = int(size * 1.25)
    corners = centre + np.array([[-side / 2, -side / 2], [-side / 2, side / 2], [side / 2, -side / 2]])
    transform = estimate_transform("similarity", corners, np.array([[0, 0], [0, 223], [223, 0]]))
    return warp(photo / 255.0, transform.inverse, output_shape=(224, 224))


boxes = st.tuples(st.floats(-60, 300), st.floats(-60, 200), st.floats(8, 400), st.floats(8, 400))
grid = np.random.default_rng(0).integers(0, 256, (220, 310, 3), dtype=np.uint8)


@settings(max_examples=50, deadline=None)
@given(boxes)
def test_crop_matches_deca(corner_and_size: tuple[float, float, float, float]) -> None:
    left, top, width, height = corner_and_size
    box = np.array([left, top, left + width, top + height])
    size = (box[2] - box[0] + box[3] - box[1]) / 2  # as DECA does, which truncates 1.25 times the size
    expected = reference_crop(grid, size, np.array([left + width / 2, top + height / 2 + 0.12 * size]))
    crop = crop_face(grid, crop_transform(box))
    assert crop.shape == (3, 224, 224)
    np.testing.assert_allclose(crop, expected.transpose(2, 0, 1), atol=2e-3)


def test_crop_coordinates_map_back_to_the_photo() -> None:
    photo = np.zeros((400, 500, 3), np.uint8)
    photo[130:134, 310:314] = 255  # centred at (312, 132) from the photo's corner
    transform = crop_transform(np.array([250.0, 80.0, 350.0, 200.0]))
    crop = crop_face(photo, transform)[0].double().numpy()
    rows, columns = np.mgrid[:224, :224]
    index = np.array([(crop * columns).sum(), (crop * rows).sum()]) / crop.sum()
    in_crop = index / 112 - 1  # DECA's -1 and 1 are the indices 0 and 224
    np.testing.assert_allclose(to_photo(in_crop[None], transform)[0], [312, 132], atol=0.02)


@settings(max_examples=50, deadline=None)
@given(st.floats(2, 20), st.floats(-0.1, 0.1), st.floats(-0.1, 0.1), boxes)
def test_projection_can_be_inverted(scale: float, x: float, y: float, corner_and_size: tuple[float, ...]) -> None:
    left, top, width, height = corner_and_size
    transform = crop_transform(np.array([left, top, left + width, top + height]))
    points = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 10
    cam = torch.tensor([[scale, x, y], [2 * scale, y, x]], dtype=torch.float64)
    for n, projected in enumerate(project(points, cam)):
        s, tx, ty = cam[n].tolist()
        in_photo = to_photo(projected.numpy(), transform)
        homogeneous = np.column_stack([in_photo - 0.5, np.ones(5)]) @ transform.T  # pixel indices of the crop
        back = homogeneous[:, :2] / 112 - 1
        np.testing.assert_allclose(back[:, 0] / s - tx, points[n, :, 0], atol=1e-9)
        np.testing.assert_allclose(-back[:, 1] / s - ty, points[n, :, 1], atol=1e-9)


def test_batch_matches_single_crops(state: dict[str, torch.Tensor]) -> None:
    deca = build(state)
    crops = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    batched = deca(crops)
    for index in range(3):
        for name, code in deca(crops[index : index + 1]).items():
            torch.testing.assert_close(batched[name][index : index + 1], code, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_either_torch_format_convert_exactly(
    tmp_path: Path, state: dict[str, torch.Tensor], zipped: bool
) -> None:
    checkpoint = {"E_flame": dict(state), "E_detail": {"layers.0.weight": torch.zeros(3)}, "global_step": 7}
    source, destination = tmp_path / "deca_model.tar", tmp_path / "deca.safetensors"
    torch.save(checkpoint, source, _use_new_zipfile_serialization=zipped)
    convert_deca(source, destination)
    converted = load_file(destination)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)
    crops = torch.rand(1, 3, 224, 224)
    loaded = load_deca(destination)
    assert not loaded.training
    assert all(torch.equal(code, build(state)(crops)[name]) for name, code in loaded(crops).items())


def test_code_sizes_are_read_from_the_file(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    sizes = {"shape": 230, "exp": 0, "pose": 3, "cam": 3}
    save_deca(tmp_path / "d.safetensors", state, "test", sizes, image_size=160)
    deca = load_deca(tmp_path / "d.safetensors")
    assert deca.image_size == 160
    assert [code.shape[1] for code in deca(torch.rand(1, 3, 160, 160)).values()] == [230, 0, 3, 3]
    with pytest.raises(FaceSnapError, match="236 codes, but 235"):
        save_deca(tmp_path / "e.safetensors", state, "test", sizes | {"cam": 2})


def test_damaged_metadata_are_reported(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, tmp_path / "d.safetensors", {"format": "facesnap-deca", "version": "1"})
    with pytest.raises(FaceSnapError, match=r"d\.safetensors is damaged .*code_sizes"):
        load_deca(tmp_path / "d.safetensors")
    save_file(state, tmp_path / "d.safetensors", {"format": "facesnap-deca", "version": "2"})
    with pytest.raises(FaceSnapError, match=r"d\.safetensors was written by a newer FaceSnap"):
        load_deca(tmp_path / "d.safetensors")


def test_missing_tensors_are_reported(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    for missing in ("encoder.conv1.weight", "encoder.layer3.0.bn2.running_mean", "layers.2.weight"):
        torch.save({"E_flame": {k: v for k, v in state.items() if k != missing}}, tmp_path / "cut.tar")
        with pytest.raises(
            FaceSnapError, match=r"cut\.tar is not a complete DECA encoder.*" + missing.split(".", 1)[1]
        ):
            convert_deca(tmp_path / "cut.tar", tmp_path / "out.safetensors")
    torch.save({"state_dict": state}, tmp_path / "other.tar")
    with pytest.raises(FaceSnapError, match=r"other\.tar does not contain a DECA encoder"):
        convert_deca(tmp_path / "other.tar", tmp_path / "out.safetensors")
