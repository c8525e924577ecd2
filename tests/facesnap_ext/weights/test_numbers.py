"""The types and values of tensors are checked once, when a file is read, and the file is named."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from facesnap_ext import convert
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.clip import load_image_encoder
from facesnap_ext.landmarks.deca import load_deca
from facesnap_ext.landmarks.flame import load_flame
from facesnap_ext.networks.layers import CastingConv2d, CastingLinear
from facesnap_ext.weights import facesnap_file, instantid
from facesnap_ext.weights.compress import compress
from facesnap_ext.weights.initialise import initialise
from facesnap_ext.weights.tensors import is_finite, read_tensors
from tests.support import tiny
from tests.support.stand_ins import write_instantid

LOADERS = {
    "random.safetensors": facesnap_file.load,
    "stand-in-clip/model.safetensors": load_image_encoder,
    "stand-in-deca.safetensors": load_deca,
    "stand-in-flame.safetensors": load_flame,
    "InstantID/ControlNetModel/diffusion_pytorch_model.safetensors": lambda path: instantid.load(
        path, path.parent.parent / "ip-adapter.bin"
    ),
}


@pytest.fixture
def models(stand_ins, tmp_path):
    folder = shutil.copytree(stand_ins, tmp_path / "facesnap")
    write_instantid(folder / "InstantID", tiny.ffrnet(3), (32, 32))
    return folder


def rewrite(path, change, which=lambda key, tensor: tensor.is_floating_point() and tensor.ndim > 1):
    """Apply a change to the first matching tensor of a file, and return its key."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    key = next(key for key, tensor in tensors.items() if which(key, tensor))
    tensors[key] = change(tensors[key].clone())
    save_file(tensors, path, metadata)
    return key


def with_value(value):
    def change(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    return change


BAD = {
    "NaN": (with_value(torch.nan), "not finite"),
    "infinity": (with_value(torch.inf), "not finite"),
    "minus infinity": (with_value(-torch.inf), "not finite"),
    "int8": (lambda tensor: tensor.to(torch.int8), "as int8"),
    "int64": (lambda tensor: tensor.to(torch.int64), "as int64"),
    "bool": (lambda tensor: tensor > 0, "as bool"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "as complex64"),
}


@pytest.mark.parametrize("file", LOADERS)
@pytest.mark.parametrize("case", BAD)
def test_unusable_numbers_are_reported_with_file_and_tensor(models, file, case):
    change, message = BAD[case]
    key = rewrite(models / file, change)
    with pytest.raises(FaceSnapError) as error:
        LOADERS[file](models / file)
    assert str(error.value).startswith(f"{(models / file).name} ")
    assert message in str(error.value)
    assert key in str(error.value)


def run(ffrnet):
    x = torch.zeros(1, 4, 8, 8, dtype=ffrnet.dtype)
    identity = ffrnet.embed_tokens(torch.ones(1, 4, tiny.CONTEXT))
    landmarks = ffrnet.embed_landmarks(torch.ones(1, 3, 64, 64))
    return ffrnet(x, torch.tensor([5]), identity, landmarks, torch.ones(1, tiny.ADM))


F8 = torch.float8_e4m3fn
MIXED = {
    "all in fp8": lambda key: F8,
    "all in fp8 e5m2": lambda key: torch.float8_e5m2,
    "one block in half precision": lambda key: torch.float16 if "down_blocks.1" in key else torch.float32,
    "bfloat16 and half precision": lambda key: torch.bfloat16 if "mid_block" in key else torch.float16,
    "fp8 and single": lambda key: F8 if "weight" in key else torch.float32,
    "double": lambda key: torch.float64,
}


@pytest.mark.parametrize(
    ("case", "door"),
    [
        *((case, "convert") for case in MIXED),
        *(
            (case, "instantid")
            for case in ("one block in half precision", "bfloat16 and half precision", "fp8 and single")
        ),
        *((case, "compress") for case in ("all in fp8", "bfloat16 and half precision", "fp8 and single")),
    ],
)
def test_a_network_in_mixed_types_computes_what_its_numbers_say(tmp_path, case, door):
    network = tiny.ffrnet(3)
    for key, tensor in network.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(MIXED[case](key))
    expected = tiny.ffrnet(3)
    expected.load_state_dict({key: t.float() for key, t in network.state_dict().items()})
    write_instantid(tmp_path, network, (32, 32))
    controlnet = tmp_path / instantid.IDENTITYNET
    if door == "instantid":
        actual = instantid.load(controlnet, tmp_path / instantid.ADAPTER).ffrnet
    else:
        out = convert.convert(controlnet.parent, tmp_path / "out.safetensors")
        if door == "compress":
            compress(out, tmp_path / "small.safetensors", blocks=1)
            expected = None
            out = tmp_path / "small.safetensors"
        actual = facesnap_file.load(out).ffrnet
    own = {id(module.weight) for module in actual.modules() if isinstance(module, CastingLinear | CastingConv2d)}
    types = {weight.dtype for weight in actual.parameters() if id(weight) not in own}
    assert types == {actual.dtype}
    residuals = run(actual)
    assert all(bool(residual.isfinite().all()) for residual in residuals)
    if expected is not None:
        for one, other in zip(residuals, run(expected), strict=True):
            torch.testing.assert_close(one.float(), other, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F8])
def test_files_of_one_type_keep_it(tmp_path, dtype):
    weights = tiny.ffrnet(3).to(torch.float16 if dtype is F8 else dtype)
    from facesnap_ext.networks.number_types import unify_types

    if dtype is F8:
        for module in weights.modules():
            if isinstance(module, CastingLinear | CastingConv2d):
                module.weight.data = module.weight.data.to(F8)
    before = {key: (tensor.dtype, tensor.data_ptr()) for key, tensor in weights.state_dict().items()}
    unify_types(weights)
    assert {key: (tensor.dtype, tensor.data_ptr()) for key, tensor in weights.state_dict().items()} == before


@pytest.mark.parametrize("key", ["x.scale_weight", "scaled_fp8", "a.weight.absmax", "a.quant_state.bitsandbytes__nf4"])
@pytest.mark.parametrize("reader", ["init", "convert", "read"])
def test_quantised_files_are_refused_in_one_sentence(tmp_path, key, reader):
    path = tmp_path / "model.safetensors"
    tensors = {f"model.diffusion_model.{name}": t for name, t in tiny.ffrnet().state_dict().items()}
    if reader == "convert":
        tensors = tiny.ffrnet().state_dict()
    if reader == "init":
        tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.ones(4, 4, 3, 3)
        tensors["model.diffusion_model.label_emb.0.0.weight"] = torch.ones(4, 2816)
    save_file({**tensors, key: torch.ones(1)}, path)
    readers = {
        "init": lambda: initialise(path, tmp_path / "out.safetensors"),
        "convert": lambda: convert.convert(path, tmp_path / "out.safetensors"),
        "read": lambda: read_tensors(path),
    }
    with pytest.raises(FaceSnapError, match=r"^model\.safetensors is quantised"):
        readers[reader]()


def test_values_that_overflow_the_target_type_are_refused(tmp_path, stand_ins):
    path = tmp_path / "random.safetensors"
    shutil.copy(stand_ins / path.name, path)
    rewrite(path, lambda tensor: tensor.float().fill_(1e6))
    with pytest.raises(FaceSnapError, match="too large for float16"):
        facesnap_file.load(path, torch.float16)
    rewrite(path, lambda tensor: tensor.float().fill_(1e6), lambda key, tensor: key.endswith("attn2.to_k.weight"))
    with pytest.raises(FaceSnapError, match="too large for 8 bits"):
        compress(path, tmp_path / "out.safetensors", fp8=True)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("has_aminmax", [True, False], ids=["aminmax", "sum"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_one_value_that_is_not_finite_is_found_anywhere(dtype, has_aminmax, monkeypatch):
    """Also by the way of torch versions whose `aminmax` lacks half precision."""
    if not has_aminmax:
        monkeypatch.setattr(torch.Tensor, "aminmax", lambda self: (_ for _ in ()).throw(RuntimeError("Half")))
    for sign in (1, -1):
        assert is_finite(torch.full((3, 1001), sign * torch.finfo(dtype).max, dtype=torch.float64).to(dtype))
    assert is_finite(torch.empty(0, 4, dtype=dtype))
    for value in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 1500, 3002):
            tensor = torch.zeros(3, 1001, dtype=torch.float32)
            tensor.view(-1)[place] = value
            assert not is_finite(tensor.to(dtype)), (value, place)
