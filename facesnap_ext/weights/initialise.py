"""Make a FaceSnap file as training starts from it: from an SDXL checkpoint or a ControlNet."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.networks.ffrnet import FFRNet, FFRNetConfig, LandmarkEmbedding
from facesnap_ext.networks.mixer import FacialAttributeMixer, MixerConfig
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.recognise import Kind, recognise
from facesnap_ext.weights.tensors import read_index, read_tensors, shapes_of

HINT_WIDTHS = (16, 32, 96, 256)  # of every published SDXL ControlNet
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

    FFRNet's encoder is a copy of the checkpoint's UNet, its zero convolutions are zero, so that it changes nothing
    yet; landmark embedding and Mixer are seeded.

    Args:
        checkpoint: an SDXL checkpoint in one file, or diffusers' UNet file.
        head_dim: channels of an attention head, SDXL's 64; a checkpoint does not say it.
        size_dim: channels of one embedded size, SDXL's 256; nor does it say this.
        mixer: sizes of the Mixer; by default the paper's, with tokens as wide as the UNet's context.
        hint_widths: of the landmark embedding, one more than it halves the drawing; SDXL's VAE has eight pixels to a
            latent cell, and so three halvings.
    """
    kind = recognise(checkpoint)
    if kind not in (Kind.SDXL, Kind.SDXL_UNET):
        raise FaceSnapError(f"{checkpoint.name} is {kind.value}; FaceSnap starts from an SDXL checkpoint.")
    tensors = read_encoder(checkpoint, dtype)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :4]  # inpainting checkpoints append mask and picture

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        landmarks = LandmarkEmbedding(hint_widths, tensors["conv_in.weight"].shape[0]).to(dtype)
        tensors |= {f"controlnet_cond_embedding.{key}": t for key, t in landmarks.state_dict().items()}
        config = FFRNetConfig.from_shapes(shapes_of(tensors), size_dim=size_dim)
        config = replace(config, heads=tuple(max(1, width // head_dim) for width in config.widths))
        mixer_net = _seeded_mixer(mixer, config.context_dim).to(dtype)
    with torch.device("meta"):
        ffrnet = FFRNet(config)
    for key, tensor in ffrnet.state_dict().items():
        if key.startswith(ZERO):
            tensors[key] = torch.zeros(tensor.shape, dtype=dtype)
    ffrnet.load_state_dict(tensors, assign=True)
    info = facesnap_file.FaceSnapInfo(mixer_net.config, config, trained_on=f"nothing, made from {checkpoint.name}")
    facesnap_file.save(out, info, mixer_net, ffrnet)


def from_controlnet(
    controlnet: Path,
    out: Path,
    *,
    heads: Sequence[int] | None = None,
    size_dim: int = 256,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    mixer: MixerConfig | None = None,
) -> None:
    """Write a FaceSnap file whose FFRNet is a trained SDXL ControlNet; its Mixer is seeded.

    The ControlNet was trained with text, so the file is not text-free.

    Args:
        controlnet: diffusers' ControlNet file.
        heads: attention heads of each level, from its `config.json`; by default heads are 64 wide.
        size_dim: channels of one embedded size, `addition_time_embed_dim` there.
        dtype: floating type of the file; by default the ControlNet's.
    """
    tensors = read_tensors(controlnet, dtype=dtype)
    config = FFRNetConfig.from_shapes(shapes_of(tensors), heads, size_dim)
    with torch.device("meta"):
        ffrnet = FFRNet(config)
    ffrnet.load_state_dict(tensors, assign=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixer_net = _seeded_mixer(mixer, config.context_dim).to(ffrnet.dtype)
    info = facesnap_file.FaceSnapInfo(
        mixer_net.config, config, text_free=False, trained_on=f"FFRNet from {controlnet.name}, Mixer on nothing"
    )
    facesnap_file.save(out, info, mixer_net, ffrnet)


def with_mixer(start: Path, out: Path, kind: str, seed: int) -> None:
    """Write a start file anew with a seeded Mixer of another kind; FFRNet stays as it is.

    With one seed the ablation's Mixers begin with equal numbers wherever they have the same layers.

    Args:
        start: a FaceSnap file with the paper's Mixer, whose sizes are kept. kind: one of `facesnap_file.MIXERS`.

    Raises:
        FaceSnapError: the file has another Mixer.
    """
    weights = facesnap_file.load(start)
    if type(weights.info.mixer) is not MixerConfig:
        raise FaceSnapError(
            f"{start.name} does not have the paper's Mixer, which the ablation's are made from; make one with "
            "'facesnap init' from an SDXL checkpoint."
        )
    config, network = facesnap_file.MIXERS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixer = network(config(**asdict(weights.info.mixer))).to(weights.ffrnet.dtype)
    facesnap_file.save(out, replace(weights.info, mixer=mixer.config), mixer, weights.ffrnet)


def controlnet_config(folder: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, object]:
    """What diffusers' `config.json` says that the tensors do not: heads, and the width of an embedded size; nothing
    where there is none, or another network's, as beside the files of several.

    Args:
        shapes: of the ControlNet's tensors.

    Raises:
        FaceSnapError: the file is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    widths: list[int] = []
    while shape := shapes.get(f"down_blocks.{len(widths)}.resnets.0.conv1.weight"):
        widths.append(shape[0])
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("_class_name", "ControlNetModel") != "ControlNetModel":
            return {}
        if config.get("block_out_channels") != widths:
            return {}
        # diffusers calls the number of heads `attention_head_dim`
        heads = config.get("num_attention_heads") or config["attention_head_dim"]
        heads = (heads,) * len(widths) if isinstance(heads, int) else tuple(heads)
        size_dim = config.get("addition_time_embed_dim") or 256
        if len(heads) != len(widths) or not all(type(one) is int and one > 0 for one in (*heads, size_dim)):
            raise ValueError(f"{heads} attention heads, sizes of {size_dim}")
        return {"heads": heads, "size_dim": size_dim}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise FaceSnapError(
            f"{path} is damaged ({reason_of(error)}): download it again, or remove it: SDXL's sizes need none."
        ) from error


def _seeded_mixer(config: MixerConfig | None, context_dim: int) -> FacialAttributeMixer:
    default = MixerConfig()
    heads = max(1, context_dim * default.heads // default.dim)
    scaled = replace(default, dim=context_dim, feedforward=4 * context_dim, heads=heads)
    return FacialAttributeMixer(config or scaled)


def read_encoder(checkpoint: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The encoder half of an SDXL checkpoint in one file, or of diffusers' UNet file, by FFRNet's keys."""
    return read_tensors(checkpoint, encoder_key(read_index(checkpoint).shapes), dtype)


def encoder_key(shapes: Mapping[str, Sequence[int]]) -> Callable[[str], str | None]:
    """A function from a UNet's keys to FFRNet's; None for what is not of the encoder half.

    Args:
        shapes: of a checkpoint in one file (`model.diffusion_model.…`, LDM names) or of diffusers' UNet.
    """
    if not any(key.startswith(LDM) for key in shapes):
        return lambda key: key if key.startswith(ENCODER) else None
    places = _ldm_places(shapes)

    def rename(key: str) -> str | None:
        name = key.removeprefix(LDM)
        if name == key:
            return None
        module, tensor = name.rsplit(".", 1)
        if module in EMBEDDING:
            return f"{EMBEDDING[module]}.{tensor}"
        match = re.match(r"((?:input_blocks\.\d+|middle_block)\.\d+)\.(.+)", module)
        if not match or match[1] not in places:
            return None
        inner = RESNET.get(match[2], match[2])
        place = places[match[1]]
        return f"{place}.conv.{tensor}" if inner == "op" else f"{place}.{inner}.{tensor}"

    return rename


def _ldm_places(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """LDM numbers the encoder's blocks through; diffusers counts levels and layers: `input_blocks.4.1` is
    `down_blocks.1.attentions.0`."""
    places: dict[str, str] = {}
    level = layer = 0
    block = 1
    while any(key.startswith(f"{LDM}input_blocks.{block}.") for key in shapes):
        first = f"input_blocks.{block}.0"
        if f"{LDM}{first}.op.weight" in shapes:
            places[first] = f"down_blocks.{level}.downsamplers.0"
            level, layer = level + 1, 0
        else:
            places[first] = f"down_blocks.{level}.resnets.{layer}"
            places[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{layer}"
            layer += 1
        block += 1
    places["middle_block.0"] = "mid_block.resnets.0"
    places["middle_block.1"] = "mid_block.attentions.0"
    places["middle_block.2"] = "mid_block.resnets.1"
    return places
