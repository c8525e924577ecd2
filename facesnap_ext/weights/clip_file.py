"""The layouts in which CLIP's image encoder is published, and a name for its content that does not depend on them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.recognise import Shapes
from facesnap_ext.weights.tensors import read_index, read_tensors

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in a transformers folder

_FROM_OPEN_CLIP = (
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("class_embedding", "embeddings.class_embedding"),
    ("conv1.", "embeddings.patch_embedding."),
    ("ln_pre.", "pre_layrnorm."),
    ("ln_post.", "post_layernorm."),
    ("transformer.resblocks.", "encoder.layers."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.in_proj_", ".self_attn.in_proj."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)


def weight_file(path: Path) -> Path:
    """Return the file with the tensors: `path` itself, or the weight file inside a transformers folder."""
    if not path.is_dir():
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    raise FaceSnapError(f"The folder {path} contains no model.safetensors: put the CLIP image encoder there.")


def encoder_names(shapes: Shapes) -> dict[str, str]:
    """Map the tensor names in a file to those of transformers without their prefix (`embeddings.…`, `encoder.…`).

    The result is empty if the file contains no image encoder.
    """
    for key in shapes:
        prefix = key.removesuffix("class_embedding")
        if key == prefix:
            continue
        if prefix.endswith("embeddings.") and f"{prefix}patch_embedding.weight" in shapes:
            prefix = prefix.removesuffix("embeddings.")
            return {key: key[len(prefix) :] for key in shapes if key.startswith(prefix)}
        if f"{prefix}conv1.weight" in shapes and f"{prefix}positional_embedding" in shapes:
            return {key: _from_open_clip(key[len(prefix) :]) for key in shapes if key.startswith(prefix)}
    return {}


def split_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split open_clip's joint projections into query, key and value, which they contain in this order."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".in_proj." in name:
            split |= {name.replace("in_proj", f"{letter}_proj"): part for letter, part in zip("qkv", tensor.chunk(3))}
        else:
            split[name] = tensor
    return split


def encoder_hash(path: Path) -> str:
    """Return the SHA-256 that identifies an image encoder, computed from its vectors and patch embedding in half
    precision.

    The hash is the same for files in single and half precision, and in the layouts of transformers and open_clip. The
    biases and norms of two encoders differ even if one was fine-tuned from the other, and take only a few megabytes.
    """
    file = weight_file(path)
    shapes = read_index(file).shapes
    names = {key: name for key, name in encoder_names(shapes).items() if len(shapes[key]) == 1 or "patch_" in name}
    vectors = split_qkv(read_tensors(file, names.get, torch.float16))
    digest = hashlib.sha256()
    for name, vector in sorted(vectors.items()):
        if name.startswith(("embeddings.class", "embeddings.patch", "pre_layrnorm.", "encoder.")):
            digest.update(f"{name} {tuple(vector.shape)}".encode())
            digest.update(vector.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _from_open_clip(name: str) -> str:
    for old, new in _FROM_OPEN_CLIP:
        name = name.replace(old, new)
    return name
