"""Rename the tensors of diffusers' SDXL and its VAE as in SDXL's own file (Stability-AI/generative-models)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.initialise import EMBEDDING, LDM, RESNET

Config = Mapping[str, Any]

UNET = {ours: ldm for ldm, ours in EMBEDDING.items()} | {"conv_norm_out": "out.0", "conv_out": "out.2"}
UNET_RESNET = {ours: ldm for ldm, ours in RESNET.items()}
VAE_INNER = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_INNER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_tensors(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Rename a UNet's tensors: the encoder by the inverse of `weights.initialise.encoder_key`, and the decoder.

    LDM numbers blocks consecutively; diffusers counts levels and layers.
    """
    layers = config["layers_per_block"]
    attended = ["CrossAttn" in kind for kind in config["up_block_types"]]

    def block(name: str) -> str:
        if match := re.match(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
            level, kind, layer, inner = int(match[1]), match[2], int(match[3]), match[4]
            return f"input_blocks.{1 + level * (layers + 1) + layer}.{_slot(kind)}.{UNET_RESNET.get(inner, inner)}"
        if match := re.match(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
            level, kind, layer, inner = int(match[1]), match[2], int(match[3]), match[4]
            return f"output_blocks.{level * (layers + 1) + layer}.{_slot(kind)}.{UNET_RESNET.get(inner, inner)}"
        if match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", name):
            return f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op"
        if match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", name):
            level = int(match[1])
            return f"output_blocks.{(level + 1) * (layers + 1) - 1}.{1 + attended[level]}.conv"
        if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
            place = 1 if match[1] == "attentions" else 2 * int(match[2])
            return f"middle_block.{place}.{UNET_RESNET.get(match[3], match[3])}"
        return UNET[name]

    return {LDM + _renamed(key, block, "UNet"): tensor for key, tensor in tensors.items()}


def vae_tensors(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Rename a VAE's tensors.

    LDM counts the decoder's levels from the image inwards, and implements its attention as 1 × 1 convolutions.
    """
    levels = len(config["block_out_channels"])

    def block(name: str) -> str:
        half, _, rest = name.partition(".")
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets\.(\d+)|(down|up)samplers\.0)\.(.+)", rest):
            level = int(match[2]) if match[1] == "down" else levels - 1 - int(match[2])
            place = f"block.{match[4]}" if match[4] else f"{match[5]}sample"
            return f"{half}.{match[1]}.{level}.{place}.{VAE_INNER.get(match[6], match[6])}"
        if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", rest):
            place = f"{'block' if match[1] == 'resnets' else 'attn'}_{int(match[2]) + 1}"
            return f"{half}.mid.{place}.{VAE_INNER.get(match[3], match[3])}"
        return name.replace("conv_norm_out", "norm_out")

    renamed = {}
    for key, tensor in tensors.items():
        if ".attentions." in key and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        renamed[f"first_stage_model.{_renamed(key, block, 'VAE')}"] = _widened(key, tensor, config["norm_num_groups"])
    return renamed


def _widened(key: str, tensor: Tensor, groups: int) -> Tensor:
    """Convert a VAE's tensor to 32 normalisation groups, the number fixed in LDM.

    The channels of each group are repeated until there are 32 groups. Each copy has the mean and variance of its
    original, and layers that read the copies average them, so the network computes the same function.
    """
    copies = 32 // groups
    if key.startswith(("quant_conv", "post_quant_conv")):
        return tensor
    if ".conv_out." not in key:
        tensor = tensor.unflatten(0, (groups, -1)).repeat_interleave(copies, 0).flatten(0, 1)
    if tensor.ndim > 1 and ".conv_in." not in key:
        tensor = tensor.unflatten(1, (groups, -1)).repeat_interleave(copies, 1).flatten(1, 2) / copies
    return tensor / copies**0.5 if ".to_q." in key else tensor  # attention sums over the copies


def open_clip_tensors(tensors: Mapping[str, Tensor], rows: Iterable[int], prefix: str) -> dict[str, Tensor]:
    """Rename the second text encoder's tensors to open_clip's names.

    Queries, keys and values are concatenated, and token embeddings are rearranged for CLIP's vocabulary.

    Args:
        rows: for each of CLIP's ids, the row in the miniature's embedding table.
    """
    tensors = {text_key(key): tensor for key, tensor in tensors.items()}
    renamed = {ldm: tensors.pop(key) for key, ldm in OPEN_CLIP.items()}
    renamed["token_embedding.weight"] = renamed["token_embedding.weight"][torch.tensor(list(rows))]
    renamed["text_projection"] = tensors.pop("text_projection.weight").T
    for key, tensor in tensors.items():
        match = re.match(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", key)
        if not match:
            continue  # position ids
        place, inner, kind = f"transformer.resblocks.{match[1]}", match[2], match[3]
        if inner == "self_attn.q_proj":
            parts = [tensors[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            renamed[f"{place}.attn.in_proj_{kind}"] = torch.cat(parts)
        elif inner in OPEN_CLIP_INNER:
            renamed[f"{place}.{OPEN_CLIP_INNER[inner]}.{kind}"] = tensor
    return {prefix + key: tensor for key, tensor in renamed.items()}


def text_key(key: str) -> str:
    """Add the prefix that transformers uses before version 5 and omits from version 5 on."""
    return key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"


def _renamed(key: str, block: Callable[[str], str], part: str) -> str:
    module, tensor = key.rsplit(".", 1)
    try:
        return f"{block(module)}.{tensor}"
    except KeyError:
        raise FaceSnapError(f"The miniature's {part} has a tensor {key}, which SDXL's layout does not have.") from None


def _slot(kind: str) -> int:
    return 1 if kind == "attentions" else 0
