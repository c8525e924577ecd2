"""Model files of random numbers in the sizes of the published ones, or smaller, to measure loading and memory.

The face detector is the miniature's, so that faces are found; it is smaller than antelopev2's. All other networks have
random weights and preserve no identity.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from facesnap_ext.landmarks.deca import CODE_SIZES, Deca, save_deca
from facesnap_ext.networks.adapter import Adapter, AdapterConfig
from facesnap_ext.networks.ffrnet import FFRNet, FFRNetConfig
from facesnap_ext.networks.mixer import FacialAttributeMixer, MixerConfig
from facesnap_ext.networks.resampler import ResamplerConfig, ResamplerMixer
from facesnap_ext.weights.facesnap_file import FaceSnapInfo, save
from facesnap_ext.weights.instantid import ADAPTER, IDENTITYNET, RECOGNITION
from facesnap_lab.benchmarks.sampler import SDXL_WIDTHS, create_unet, shape_of
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.head import face_layout, write_stand_in_flame
from facesnap_lab.miniature.perception import export

INSTANTID, FACESNAP = "instantid", "facesnap"
RECOGNITION_SIDE, EMBEDDING = 112, 512
FACE_IN_CROP = 0.70  # extent of the landmarks that DECA predicts, relative to the side of its crop


@dataclass(frozen=True)
class Sizes:
    """Sizes of the networks. The defaults are those of SDXL, InstantID, antelopev2, CLIP-ViT-H and DECA.

    Attributes:
        widths: channels of SDXL's levels; the width of the last one is also CLIP's and the Resampler's.
        clip_layers: layers of CLIP's image encoder.
        recognition: residual blocks of each level of the recognition model, whose first level has `recognition_width`
            channels (IResNet-100).
        deca: residual blocks of each level of DECA's encoder, whose first level has `deca_width` channels (ResNet-50).
    """

    widths: tuple[int, int, int] = SDXL_WIDTHS
    clip_layers: int = 32
    recognition: tuple[int, int, int, int] = (3, 13, 30, 3)
    recognition_width: int = 64
    deca: tuple[int, int, int, int] = (3, 4, 6, 3)
    deca_width: int = 64


FULL_SIZE = Sizes()
SMALL_SIZE = Sizes((64, 64, 128), 3, (1, 1, 1, 1), 8, (1, 1, 1, 1), 4)


def write_models(folder: Path, kind: str, sizes: Sizes = FULL_SIZE) -> None:
    """Write the content of a `models/facesnap` folder.

    Args:
        kind: "instantid" for a face model pack and InstantID's pair, as most users have them. "facesnap" for a pack, a
            FaceSnap file in half precision, CLIP, DECA and FLAME.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_pack(folder / "antelopev2", sizes)
    if kind == INSTANTID:
        write_instantid(folder, sizes)
    else:
        write_facesnap(folder / "random.safetensors", sizes)
        write_clip(folder / "clip", sizes)
        write_deca(folder / "deca.safetensors", sizes)
        write_stand_in_flame(folder / "flame.safetensors", shapes=300, expressions=100)


def fill(state: Mapping[str, Tensor], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors with the names and shapes of a state dict: norms that change nothing, biases of 0, and
    matrices that keep the scale of their inputs."""
    generator = torch.Generator().manual_seed(seed)
    filled = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            filled[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
        elif tensor.ndim < 2:
            norm = name.endswith(("weight", "running_var")) and "embedding" not in name
            filled[name] = torch.full(tensor.shape, float(norm), dtype=dtype)
        else:
            bound = tensor[0].numel() ** -0.5
            filled[name] = torch.empty(tensor.shape, dtype=dtype).uniform_(-bound, bound, generator=generator)
    return filled


def build(create: Callable[[], nn.Module], dtype: torch.dtype, seed: int = 0) -> Any:
    """Return a network with the weights of `fill`, without initialising it twice."""
    with torch.device("meta"):
        network = create()
    network.load_state_dict(fill(network.state_dict(), dtype, seed), assign=True)
    return network.eval().requires_grad_(False)


def write_pack(folder: Path, sizes: Sizes) -> None:
    """Write a face model pack: the miniature's detector, and a recognition model in single precision."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(shipped.MODELS / "identity" / "detector.onnx", folder / "scrfd_10g_bnkps.onnx")
    network = build(lambda: Recognition(sizes.recognition, sizes.recognition_width), torch.float32)
    example = torch.rand(1, 3, RECOGNITION_SIDE, RECOGNITION_SIDE)
    export(network, example, folder / RECOGNITION, {"face": {0: "faces"}, "embedding": {0: "faces"}})


def write_instantid(folder: Path, sizes: Sizes) -> None:
    """Write IdentityNet in half precision and `ip-adapter.bin` in single precision, as they were published."""
    from safetensors.torch import save_file

    config = ffrnet_config(sizes)
    path = folder / IDENTITYNET
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = FFRNet(config).state_dict()
    save_file(fill(shapes, torch.float16), path, {"format": "pt"})
    described = {
        "_class_name": "ControlNetModel",
        "block_out_channels": config.widths,
        "attention_head_dim": config.heads,
        "addition_time_embed_dim": config.size_dim,
    }
    path.with_name("config.json").write_text(json.dumps(described), encoding="utf-8")
    width = sizes.widths[-1]
    resampler = ResamplerConfig(clip_dim=0, width=width, feedforward=4 * width, heads=width // 64)
    with torch.device("meta"):
        adapter = Adapter(AdapterConfig(cross_attention_widths(sizes.widths), config.context_dim))
        halves = {"image_proj": ResamplerMixer(resampler).state_dict(), "ip_adapter": adapter.state_dict()}
    torch.save({name: fill(state, torch.float32) for name, state in halves.items()}, folder / ADAPTER)


def write_facesnap(path: Path, sizes: Sizes) -> None:
    """Write a FaceSnap file in half precision."""
    mixer, ffrnet = MixerConfig(clip_dim=sizes.widths[-1]), ffrnet_config(sizes)
    info = FaceSnapInfo(mixer, ffrnet, trained_on="nothing, random")
    save(
        path,
        info,
        build(lambda: FacialAttributeMixer(mixer), torch.float16),
        build(lambda: FFRNet(ffrnet), torch.float16),
    )


def write_clip(folder: Path, sizes: Sizes) -> None:
    """Write a CLIP image encoder in half precision as a transformers folder."""
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModel

    width = sizes.widths[-1]
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=sizes.clip_layers,
        num_attention_heads=max(1, width // 80),
        patch_size=14,
        hidden_act="gelu",
    )
    network = build(lambda: CLIPVisionModel(config), torch.float16)
    prefix = "" if any(key.startswith("vision_model.") for key in network.state_dict()) else "vision_model."
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file({prefix + key: value for key, value in network.state_dict().items()}, folder / "model.safetensors")


def write_deca(path: Path, sizes: Sizes) -> None:
    """Write an encoder with DECA's layout, which returns the same face for every photo."""
    shapes: dict[str, tuple[int, ...]] = {"encoder.conv1.weight": (sizes.deca_width, 3, 7, 7)}
    for level, blocks in enumerate(sizes.deca, 1):
        width = sizes.deca_width * 2 ** (level - 1)
        for block in range(blocks):
            name = f"encoder.layer{level}.{block}"
            shapes |= {f"{name}.conv1.weight": (width,), f"{name}.conv3.weight": (4 * width,)}
        shapes[f"encoder.layer{level}.0.downsample.0.weight"] = (4 * width,)
    features, codes = 32 * sizes.deca_width, sum(CODE_SIZES.values())
    shapes |= {"layers.0.weight": (features // 2, features), "layers.2.weight": (codes, features // 2)}
    with torch.device("meta"):
        state = Deca(shapes, CODE_SIZES).state_dict()
    tensors = fill(state, torch.float32)
    low, high = face_layout().min(0), face_layout().max(0)
    means = {name: torch.zeros(size) for name, size in CODE_SIZES.items()}
    means["cam"] = torch.tensor([2 * FACE_IN_CROP / (high - low).mean(), *-(low + high) / 2], dtype=torch.float32)
    tensors["layers.2.weight"].zero_()
    tensors["layers.2.bias"] = torch.cat(list(means.values()))
    save_deca(path, tensors, "random numbers")


def ffrnet_config(sizes: Sizes) -> FFRNetConfig:
    """Return the configuration of an FFRNet for a UNet with these widths."""
    from diffusers import ControlNetModel

    with torch.device("meta"):
        network = ControlNetModel(**shape_of(sizes.widths))
    return FFRNetConfig.from_shapes({key: tuple(tensor.shape) for key, tensor in network.state_dict().items()})


def cross_attention_widths(widths: tuple[int, ...]) -> tuple[int, ...]:
    """Return the widths of the UNet's cross-attentions in the order of `AdapterConfig`."""
    from facesnap_ext.hosts.attention import cross_attentions

    with torch.device("meta"):
        unet = create_unet(widths)
    return tuple([layer.to_q.out_features for layer in cross_attentions(unet)])


class Recognition(nn.Module):
    """ArcFace's IResNet (github.com/deepinsight/insightface): faces [N, 3, 112, 112] to embeddings [N, 512]."""

    def __init__(self, depths: tuple[int, ...], width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1), nn.PReLU(width)]
        inputs = width
        for level, depth in enumerate(depths):
            outputs = width * 2**level
            layers += [_Residual(inputs if i == 0 else outputs, outputs, 2 if i == 0 else 1) for i in range(depth)]
            inputs = outputs
        self.body = nn.Sequential(*layers)
        self.last = nn.Linear(inputs * (RECOGNITION_SIDE // 16) ** 2, EMBEDDING)

    def forward(self, faces: Tensor) -> Tensor:
        return self.last(self.body(faces).flatten(1))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)
