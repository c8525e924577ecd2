"""Weight files whose numbers are of unusual types, not finite or very large, or whose tensors have other shapes: they
are refused with the file's name, or the loaded network computes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from facesnap_ext import convert
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.clip import load_image_encoder
from facesnap_ext.landmarks.deca import load_deca, save_deca
from facesnap_ext.landmarks.flame import load_flame, posed_vertices, save_flame
from facesnap_ext.networks.adapter import Adapter
from facesnap_ext.weights import facesnap_file, instantid
from facesnap_ext.weights.clip_file import encoder_hash
from facesnap_ext.weights.compress import compress
from facesnap_ext.weights.facesnap_file import FaceSnapWeights
from facesnap_ext.weights.initialise import initialise
from facesnap_ext.weights.tensors import fingerprint, read_tensors
from tests.fuzz import corpus
from tests.fuzz.harness import check_sentence, fuzz, new_folder
from tests.fuzz.mutations import json_values
from tests.fuzz.watch import only_reading
from tests.support.ldm_unet import ldm_unet
from tests.support.stand_in_deca import stand_in_deca

TYPES = [
    *(torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8),
    *(torch.int64, torch.int32, torch.bool, torch.complex64),
]
VALUES = [torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e20, 65504.0, 1e-45, 0.0]
SIZES = [0, 1, 2, 3, 64, 4096]
METADATA = {
    "code_sizes",
    "image_size",
    "version",
    "mixer",
    "ffrnet",
    "text_free",
    "adapter",
    "networks",
    "null_identity",
}


@dataclass(frozen=True)
class Valid:
    """A small valid file, what reads it, and what computes with the result."""

    content: bytes
    read: Callable[[Path], Any]
    compute: Callable[[Any], Any] = lambda loaded: None
    name: str = "changed.safetensors"


def compute_tokens_and_residuals(weights: FaceSnapWeights) -> None:
    mixer, config = weights.mixer.float(), weights.info.mixer
    clip = torch.ones(1, 1, 3, config.clip_dim) if config.clip_dim else None
    tokens = mixer(torch.ones(1, 1, config.id_dim), clip)
    ffrnet, sizes = weights.ffrnet, weights.ffrnet.config
    ffrnet.to(torch.promote_types(ffrnet.dtype, torch.bfloat16))
    x = torch.zeros(1, 4, 16, 16, dtype=ffrnet.dtype)
    landmarks = ffrnet.embed_landmarks(torch.ones(1, 3, 128, 128))
    ffrnet(x, torch.tensor([5]), ffrnet.embed_tokens(tokens), landmarks, torch.ones(1, sizes.adm_dim))


def compute_keys_and_values(adapter: Adapter) -> None:
    tokens = torch.ones(1, 2, adapter.config.context_dim)
    adapter.float()(tokens, tokens)


def compute_mesh(flame: Any) -> None:
    posed_vertices(flame, torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, len(flame.parents), 3))


@cache
def numbers_folder() -> Path:
    return new_folder()


@cache
def valid_files() -> dict[str, Valid]:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.safetensors"
        save_deca(path, stand_in_deca(), "stand-in")
        deca = path.read_bytes()
        save_flame(path, small_flame(), "stand-in")
        flame = path.read_bytes()
    out = numbers_folder() / "out.safetensors"
    instant = corpus.instantid()
    controlnet = next(content for key, content in instant.items() if key.endswith(".safetensors"))
    checkpoint = {f"model.diffusion_model.{key}": tensor for key, tensor in ldm_unet().state_dict().items()}
    (pair := numbers_folder() / "controlnet.safetensors").write_bytes(controlnet)
    (numbers_folder() / "config.json").write_bytes(instant["config.json"])
    adapter = save(read_tensors_of(instant[instantid.ADAPTER]))
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    clip = CLIPVisionModel(CLIPVisionConfig(**sizes, patch_size=2, image_size=8)).state_dict()
    clip = {key if key.startswith("vision_model.") else f"vision_model.{key}": tensor for key, tensor in clip.items()}
    crop = np.zeros((9, 9, 3), np.uint8)
    return {
        "facesnap": Valid(corpus.weights()[0], facesnap_file.load, compute_tokens_and_residuals),
        "compress": Valid(corpus.weights()[0], lambda path: compress(path, out, blocks=1, fp8=True)),
        "controlnet": Valid(controlnet, lambda path: convert.convert(path, out)),
        "instantid": Valid(adapter, lambda path: instantid.load(pair, path), compute_tokens_and_residuals),
        "adapter": Valid(adapter, instantid.load_adapter, compute_keys_and_values),
        "checkpoint": Valid(save(checkpoint), lambda path: initialise(path, out, head_dim=16, size_dim=8)),
        "clip": Valid(save(clip), load_image_encoder, lambda encoder: encoder([crop])),
        "clip's hash": Valid(save(clip), encoder_hash),
        "hash": Valid(controlnet, fingerprint),
        "deca": Valid(
            deca, load_deca, lambda network: network(torch.zeros(1, 3, network.image_size, network.image_size))
        ),
        "flame": Valid(flame, load_flame, compute_mesh),
    }


def read_tensors_of(torch_file: bytes) -> dict[str, Tensor]:
    path = numbers_folder() / "x.bin"
    path.write_bytes(torch_file)
    return read_tensors(path)


def small_flame() -> dict[str, Tensor]:
    """A head with 12 vertices, five joints and three directions of each kind."""
    random = torch.Generator().manual_seed(0)
    shapes = {"v_template": (12, 3), "shapedirs": (12, 3, 3), "expressiondirs": (12, 3, 3), "posedirs": (12, 3, 36)}
    tensors = {key: torch.randn(shape, generator=random) for key, shape in shapes.items()}
    tensors |= {"J_regressor": torch.full((5, 12), 1 / 12), "weights": torch.full((12, 5), 0.2)}
    faces = torch.arange(12).reshape(4, 3)
    return {**tensors, "parents": torch.tensor([-1, 0, 1, 1, 1]), "faces": faces}


def changed(data: st.DataObject, tensors: dict[str, Tensor]) -> None:
    """Change one to three tensors of a file, or all of them in the same way."""
    kind = data.draw(st.sampled_from(["type", "type", "value", "value", "shape", "drop", "add", "swap"]))
    every = kind == "type" and data.draw(st.booleans())
    names = sorted(tensors)
    chosen = names if every else data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    dtype, value = data.draw(st.sampled_from(TYPES)), data.draw(st.sampled_from(VALUES))
    for name in chosen:
        tensor = tensors[name]
        if kind == "type":
            tensors[name] = tensor.to(dtype)
        elif kind == "value" and tensor.is_floating_point() and tensor.numel():
            tensors[name] = tensor.float().clone()
            tensors[name].view(-1)[data.draw(st.integers(0, tensor.numel() - 1)) :: data.draw(st.integers(1, 99))] = (
                value
            )
        elif kind == "value" and tensor.numel():
            tensors[name] = torch.full_like(tensor, data.draw(st.sampled_from([-1, 0, 7, 2**31, 2**62])))
        elif kind == "shape":
            sizes = list(tensor.shape) or [1]
            axis = data.draw(st.integers(0, len(sizes)))
            sizes[axis : axis + data.draw(st.integers(0, 1))] = [data.draw(st.sampled_from(SIZES))]
            if (count := int(np.prod(sizes))) <= 2**20:
                tensors[name] = torch.ones(count, dtype=tensor.dtype).reshape(sizes)
        elif kind == "drop":
            del tensors[name]
        elif kind == "add":
            ending = data.draw(st.sampled_from([".scale_weight", ".absmax", ".more", "", ".lora_down.weight"]))
            tensors[name + ending] = torch.ones(1)
        elif kind == "swap":
            other = data.draw(st.sampled_from(sorted(tensors)))
            tensors[name], tensors[other] = tensors[other], tensors[name]


@fuzz
@given(st.data())
def test_numbers_and_shapes(data):
    files = valid_files()
    valid = files[data.draw(st.sampled_from(sorted(files)))]
    header, _ = corpus.safetensors_headers(valid.content)
    tensors = load(valid.content)
    for _ in range(data.draw(st.integers(0, 2)) or 1):
        changed(data, tensors)
    metadata = dict(header.get("__metadata__", {"format": "pt"}))
    check(valid, save(tensors, metadata))


@fuzz
@given(st.data())
def test_metadata_of_networks(data):
    """Metadata of DECA, FLAME and FaceSnap files, beside intact tensors."""
    valid = valid_files()[data.draw(st.sampled_from(["deca", "flame", "facesnap"]))]
    header, numbers = corpus.safetensors_headers(valid.content)
    metadata = header["__metadata__"] = dict(header["__metadata__"])
    values = json_values(
        st.sampled_from(["shape", "exp", "pose", "cam", "0" * 64, "1e9", "9" * 5000, "\N{SUPERSCRIPT TWO}"])
    )
    for _ in range(data.draw(st.integers(1, 2))):
        field = data.draw(st.sampled_from(sorted(METADATA & set(metadata) | {"version", "source"})))
        try:
            content = json.loads(metadata.get(field, ""))
        except ValueError:
            content = None
        if isinstance(content, dict) and content and data.draw(st.integers(0, 3)):
            content[data.draw(st.sampled_from(sorted(content)))] = data.draw(values | st.integers(-1, 10**6))
        else:
            content = data.draw(values | st.integers(-1, 10**6))
        metadata[field] = content if isinstance(content, str) else json.dumps(content)
    text = json.dumps(header).encode()
    check(valid, len(text).to_bytes(8, "little") + text + numbers)


def check(valid: Valid, content: bytes) -> None:
    """Read a changed file, and compute with what was loaded."""
    path = numbers_folder() / valid.name
    path.write_bytes(content)
    with only_reading(path.parent, may_change=True), torch.no_grad():
        try:
            loaded = valid.read(path)
        except FaceSnapError as error:
            check_sentence(error)
            assert path.name in str(error)
        else:
            valid.compute(loaded)
