"""Create the FaceSnap file that training starts from, using the encoder of an SDXL checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.networks.ffrnet import FFRNet, FFRNetConfig, LandmarkEmbedding
from facesnap_ext.networks.mixer import FacialAttributeMixer, MixerConfig
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.controlnet import reports_unusable
from facesnap_ext.weights.recognise import Kind, recognise
from facesnap_ext.weights.tensors import read_index, read_tensors, shapes_of

HINT_WIDTHS = (16, 32, 96, 256)  # as in every published SDXL ControlNet
ENCODER = ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")
ZERO = ("controlnet_down_blocks.", "controlnet_mid_block.", "controlnet_cond_embedding.conv_out.")
LDM = "model.diffusion_model."

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
EMBEDDING = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
}


def initialise(
    checkpoint: Path,
    out: Path,
    *,
    head_dim: int = 64,
    size_dim: int = 256,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    mixer: MixerConfig | None = None,
    hint_widths: Sequence[int] = HINT_WIDTHS,
) -> None:
    """Write the FaceSnap file that training starts from.

    FFRNet's encoder is a copy of the UNet's encoder. Its zero convolutions are zero, so it does not change images yet.
    The landmark embedding and the Mixer are initialised from the seed.

    Args:
        checkpoint: an SDXL checkpoint in a single file, or a UNet file in diffusers' layout.
        head_dim: channels of an attention head, 64 in SDXL; cannot be read from a checkpoint.
        size_dim: channels of one embedded size, 256 in SDXL; cannot be read from a checkpoint either.
        mixer: sizes of the Mixer; by default the paper's, with tokens as wide as the UNet's context.
        hint_widths: channels of the landmark embedding. The landmark image is halved between consecutive widths: three
            times for SDXL's VAE, which reduces images by a factor of 8.

    Raises:
        FaceSnapError: the file is not an SDXL checkpoint with SDXL's UNet, or its values are unusable.
    """
    kind = recognise(checkpoint)
    if kind not in (Kind.SDXL, Kind.SDXL_UNET):
        raise FaceSnapError(f"{checkpoint.name} is {kind.value}; choose an SDXL checkpoint.")
    tensors = read_encoder(checkpoint, dtype)
    with reports_unusable(checkpoint, "an SDXL checkpoint with SDXL's UNet"):
        _initialise(tensors, checkpoint, out, head_dim, size_dim, seed, dtype, mixer, hint_widths)


def _initialise(
    tensors: dict[str, Tensor],
    checkpoint: Path,
    out: Path,
    head_dim: int,
    size_dim: int,
    seed: int,
    dtype: torch.dtype,
    mixer: MixerConfig | None,
    hint_widths: Sequence[int],
) -> None:
    """Write the file of `initialise` from the encoder half of the checkpoint."""
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :4]  # drop an inpainting checkpoint's additional channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        landmarks = LandmarkEmbedding(hint_widths, tensors["conv_in.weight"].shape[0])
        preserve_landmarks(landmarks)
        tensors |= {f"controlnet_cond_embedding.{key}": t.to(dtype) for key, t in landmarks.state_dict().items()}
        config = FFRNetConfig.from_shapes(shapes_of(tensors), size_dim=size_dim)
        config = replace(config, heads=tuple([max(1, width // head_dim) for width in config.widths]))
        mixer_net = FacialAttributeMixer(mixer or facesnap_file.default_mixer_config(config.context_dim)).to(dtype)
    with torch.device("meta"):
        ffrnet = FFRNet(config)
    for key, tensor in ffrnet.state_dict().items():
        if key.startswith(ZERO):
            tensors[key] = torch.zeros(tensor.shape, dtype=dtype)
    ffrnet.load_state_dict(tensors, assign=True)
    info = facesnap_file.FaceSnapInfo(mixer_net.config, config, trained_on=f"nothing; created from {checkpoint.name}")
    facesnap_file.save(out, info, mixer_net, ffrnet)


def preserve_landmarks(embedding: LandmarkEmbedding) -> None:
    """Initialise all convolutions but the last so that differences between landmark images reach the last one.

    The lines cover few pixels, so values stay near 0, where SiLU halves them. A standard deviation of 2 / sqrt(inputs)
    compensates for that. With PyTorch's default, which is less than a third of it, 1/2,500 of the differences after the
    first layer arrives at the last one at the paper's sizes.
    """
    for conv in (embedding.conv_in, *embedding.blocks):
        nn.init.normal_(conv.weight, std=2 / math.sqrt(conv.weight[0].numel()))
        nn.init.zeros_(conv.bias)


def with_mixer(start: Path, out: Path, kind: str, seed: int) -> None:
    """Write a copy of an untrained FaceSnap file with a Mixer of a different kind.

    With equal seeds, the ablation's Mixers start with equal weights in the layers they share.

    Args:
        start: a FaceSnap file with the paper's Mixer, whose sizes are kept.
        kind: a key of `facesnap_file.MIXERS`.
        seed: initialises the Mixer.

    Raises:
        FaceSnapError: the file does not have the paper's Mixer.
    """
    weights = facesnap_file.load(start)
    if type(weights.info.mixer) is not MixerConfig:
        raise FaceSnapError(
            f"{start.name} does not have the paper's Mixer, which the ablation's Mixers are derived from; create a "
            "file with 'facesnap init' from an SDXL checkpoint."
        )
    config, network = facesnap_file.MIXERS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixer = network(sizes := config(**asdict(weights.info.mixer))).to(weights.ffrnet.dtype)
    facesnap_file.save(out, replace(weights.info, mixer=sizes), mixer, weights.ffrnet)


def read_encoder(checkpoint: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read the encoder half of an SDXL checkpoint, or of a UNet file in diffusers' layout, with FFRNet's keys."""
    return read_tensors(checkpoint, encoder_key(read_index(checkpoint).shapes), dtype)


def encoder_key(shapes: Mapping[str, Sequence[int]]) -> Callable[[str], str | None]:
    """Return a function that maps a UNet's keys to FFRNet's, and keys outside the encoder half to None.

    Args:
        shapes: tensor shapes of a single-file checkpoint (`model.diffusion_model.…`, LDM names) or of a UNet in
            diffusers' layout.
    """
    if not any(key.startswith(LDM) for key in shapes):
        return lambda key: key if key.startswith(ENCODER) else None
    blocks = _diffusers_blocks(shapes)

    def rename(key: str) -> str | None:
        name = key.removeprefix(LDM)
        if name == key:
            return None
        module, tensor = name.rsplit(".", 1)
        if module in EMBEDDING:
            return f"{EMBEDDING[module]}.{tensor}"
        match = re.match(r"((?:input_blocks\.\d+|middle_block)\.\d+)\.(.+)", module)
        if not match or match[1] not in blocks:
            return None
        inner = RESNET.get(match[2], match[2])
        block = blocks[match[1]]
        return f"{block}.conv.{tensor}" if inner == "op" else f"{block}.{inner}.{tensor}"

    return rename


def _diffusers_blocks(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Map the names of LDM's encoder blocks to diffusers' names.

    LDM numbers the blocks consecutively, diffusers by level and layer: `input_blocks.4.1` is
    `down_blocks.1.attentions.0`.
    """
    names: dict[str, str] = {}
    level = layer = 0
    block = 1
    while any(key.startswith(f"{LDM}input_blocks.{block}.") for key in shapes):
        first = f"input_blocks.{block}.0"
        if f"{LDM}{first}.op.weight" in shapes:
            names[first] = f"down_blocks.{level}.downsamplers.0"
            level, layer = level + 1, 0
        else:
            names[first] = f"down_blocks.{level}.resnets.{layer}"
            names[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{layer}"
            layer += 1
        block += 1
    names["middle_block.0"] = "mid_block.resnets.0"
    names["middle_block.1"] = "mid_block.attentions.0"
    names["middle_block.2"] = "mid_block.resnets.1"
    return names
