"""Files of the rivals with the published names, at tiny sizes and with random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from facesnap_ext.networks.adapter import AdapterConfig
from facesnap_lab.rivals.consistentid import ConsistentIDConfig, FacePlusProjection
from facesnap_lab.rivals.ip_adapter import FaceProjection, Resampler, resampler_config
from facesnap_lab.rivals.published.ip_adapter import FACEID, FACEID_PLUS, PLUS, PORTRAIT, attention_shapes
from tests.support import tiny
from tests.support.training_world import sdxl

ID_DIM = 24
CLIP_DIM = 32
RANK = 3
VISION = {  # PhotoMaker's CLIP
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 20,
}


def small_sdxl() -> Any:
    """A pipeline whose UNet has only eight attention layers, because a LoRA for many takes long to load."""
    pipe = sdxl()
    sizes = {"block_out_channels": (32, 64), "attention_head_dim": (2, 4), "layers_per_block": 1}
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    types = {"down_block_types": down, "up_block_types": up, "transformer_layers_per_block": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet = UNet2DConditionModel(**{**tiny.DIFFUSERS, **sizes, **types}, sample_size=8)
    return pipe


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0, std: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: std * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def projection(layout: str, id_dim: int = ID_DIM, dim: int = tiny.CONTEXT) -> nn.Module:
    """The lab's module for a layout of IP-Adapter, with random weights."""
    module = {
        FACEID: lambda: FaceProjection(id_dim, 4, dim),
        PORTRAIT: lambda: FaceProjection(id_dim, 16, dim),
        PLUS: lambda: Resampler(resampler_config(CLIP_DIM, dim, queries=5)),
        FACEID_PLUS: lambda: FacePlusProjection(ConsistentIDConfig(id_dim, CLIP_DIM, AdapterConfig((), dim))),
    }[layout]()
    return tiny.randomise(module, std=0.2)


def published_name(key: str) -> str:
    """The name in a file of IP-Adapter of a tensor of `projection`."""
    return key.removeprefix("face.").replace("perceiver.", "perceiver_resampler.")


def ip_adapter(layout: str, unet: Any, id_dim: int = ID_DIM) -> dict[str, Tensor]:
    """The tensors of a file; FaceID and FaceID Plus have a LoRA."""
    rank = RANK if layout in (FACEID, FACEID_PLUS) else 0
    state = projection(layout, id_dim, unet.config.cross_attention_dim).state_dict()
    tensors = {f"image_proj.{published_name(key)}": tensor for key, tensor in state.items()}
    return tensors | random_tensors(attention_shapes(unet, rank))


def photomaker(
    version: int, unet: Any, lora_form: str = "processor.{}_lora.{}", id_dim: int = ID_DIM
) -> dict[str, Tensor]:
    """The tensors of a file.

    Args:
        lora_form: how the names of the LoRA's tensors continue after the layer's name.
    """
    dim = unet.config.cross_attention_dim
    clip = tiny.randomise(CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)), std=0.3)
    width = VISION["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {"visual_projection_2.weight": (dim - VISION["projection_dim"], width)}
    for name, inputs in (("mlp1", 2 * dim), ("mlp2", dim)):
        shapes |= linear(f"fuse_module.{name}.fc1", dim, inputs) | linear(f"fuse_module.{name}.fc2", dim, dim)
        shapes |= norm(f"fuse_module.{name}.layernorm", inputs)
    shapes |= norm("fuse_module.layer_norm", dim)
    if version == 2:
        former = "qformer_perceiver."
        shapes |= linear(f"{former}token_proj.0", 4 * id_dim, id_dim)
        shapes |= linear(f"{former}token_proj.2", 2 * dim, 4 * id_dim) | norm(f"{former}token_norm", dim)
        resampler = f"{former}perceiver_resampler."
        shapes |= linear(f"{resampler}proj_in", dim, width) | linear(f"{resampler}proj_out", dim, dim)
        shapes |= norm(f"{resampler}norm_out", dim)
        for i in range(4):
            layer = f"{resampler}layers.{i}."
            shapes |= norm(f"{layer}0.norm1", dim) | norm(f"{layer}0.norm2", dim) | norm(f"{layer}1.0", dim)
            shapes |= {f"{layer}0.to_q.weight": (128, dim), f"{layer}0.to_kv.weight": (256, dim)}
            shapes |= {f"{layer}0.to_out.weight": (dim, 128)}
            shapes |= {f"{layer}1.1.weight": (4 * dim, dim), f"{layer}1.3.weight": (dim, 4 * dim)}
    encoder = random_tensors(shapes) | clip.state_dict()
    tensors = {f"id_encoder.{key}": tensor for key, tensor in encoder.items()}
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    for key, tensor in random_tensors(attention_shapes(unet, RANK), seed=1).items():
        _, number, part, *rest = key.split(".")
        if part.endswith("_lora"):
            part = part.removesuffix("_lora")
            if "processor" not in lora_form:
                part = {"to_out": "to_out.0"}.get(part, part)
            end = lora_form.format(
                part, {"down": "lora_A", "up": "lora_B"}[rest[0]] if "lora" not in lora_form else rest[0]
            )
            tensors[f"lora_weights.unet.{names[int(number)]}.{end}.weight"] = tensor
    return tensors


def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Write tensors as safetensors, or for other suffixes by `torch.save` as a dictionary for each half."""
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        return path
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        half, _, name = key.partition(".")
        halves.setdefault(half, {})[name] = tensor
    torch.save(halves, path)
    return path
