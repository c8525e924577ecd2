"""Convert an SDXL ControlNet in diffusers' layout to a FaceSnap file, and read the `config.json` next to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.networks.ffrnet import FFRNet, FFRNetConfig
from facesnap_ext.networks.mixer import FacialAttributeMixer
from facesnap_ext.networks.number_types import unify_types
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.tensors import read_tensors, shapes_of

SIZE_DIM = 256  # SDXL's `addition_time_embed_dim`


@dataclass(frozen=True)
class ControlNetConfig:
    """Values from diffusers' `config.json` that cannot be derived from the tensors.

    Args:
        heads: attention heads of each level.
        size_dim: channels of one embedded size, `addition_time_embed_dim`.
    """

    heads: tuple[int, ...]
    size_dim: int


def controlnet_config(folder: Path, shapes: Mapping[str, Sequence[int]]) -> ControlNetConfig | None:
    """Read the `config.json` next to a ControlNet.

    Args:
        shapes: shapes of the ControlNet's tensors.

    Returns:
        None if the file does not exist or belongs to a different network, as in a folder with several models.

    Raises:
        FaceSnapError: the file is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    widths: list[int] = []
    while shape := shapes.get(f"down_blocks.{len(widths)}.resnets.0.conv1.weight"):
        widths.append(shape[0])
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("_class_name", "ControlNetModel") != "ControlNetModel":
            return None
        if config.get("block_out_channels") != widths:
            return None
        # diffusers calls the number of heads `attention_head_dim`
        heads = config.get("num_attention_heads") or config["attention_head_dim"]
        heads = (heads,) * len(widths) if isinstance(heads, int) else tuple(heads)
        size_dim = config.get("addition_time_embed_dim") or SIZE_DIM
        if len(heads) != len(widths) or not all(type(number) is int and number > 0 for number in (*heads, size_dim)):
            raise ValueError(f"{heads} attention heads, {size_dim} channels per size")
        return ControlNetConfig(heads, size_dim)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise FaceSnapError(
            f"{path} is damaged ({reason_of(error)}); download it again, or delete it, as it is not needed for SDXL's "
            "sizes."
        ) from error


@contextmanager
def reports_unusable(path: Path, kind: str) -> Iterator[None]:
    """Report a file whose tensors do not make up an FFRNet.

    Args:
        kind: what the file should be, for the message.
    """
    try:
        yield
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else reason_of(error, 200)
        raise FaceSnapError(f"{path.name} is not {kind}, or is incomplete ({what}); choose another file.") from error


def from_controlnet(controlnet: Path, out: Path, config: ControlNetConfig | None = None, seed: int = 0) -> None:
    """Write a FaceSnap file whose FFRNet is a trained SDXL ControlNet and whose Mixer is untrained.

    The ControlNet was trained with text, so the file is not text-free. It has the dtype of the ControlNet.

    Args:
        controlnet: ControlNet file in diffusers' layout.
        config: see `controlnet_config`; by default, attention heads are 64 wide and `size_dim` is SDXL's.
        seed: seed of the Mixer's random weights.

    Raises:
        FaceSnapError: the file is incomplete, its tensors have unexpected sizes, or its values are unusable.
    """
    tensors = read_tensors(controlnet)
    heads, size_dim = (config.heads, config.size_dim) if config else (None, SIZE_DIM)
    with reports_unusable(controlnet, "an SDXL ControlNet in diffusers' layout"):
        ffrnet_config = FFRNetConfig.from_shapes(shapes_of(tensors), heads, size_dim)
        with torch.device("meta"):
            ffrnet = FFRNet(ffrnet_config)
        ffrnet.load_state_dict(tensors, assign=True)
    unify_types(ffrnet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixer = FacialAttributeMixer(facesnap_file.default_mixer_config(ffrnet_config.context_dim)).to(ffrnet.dtype)
    info = facesnap_file.FaceSnapInfo(
        mixer.config, ffrnet_config, text_free=False, trained_on=f"FFRNet from {controlnet.name}; Mixer untrained"
    )
    facesnap_file.save(out, info, mixer, ffrnet)
