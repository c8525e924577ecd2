"""Tiny networks with random weights, with the classes and structure of the real ones."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import nn

from facesnap_ext.conditioning import Conditioning
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.networks.ffrnet import FFRNet, FFRNetConfig
from facesnap_ext.regions import PaintedRegion
from facesnap_ext.settings.strength import Strength
from facesnap_ext.settings.unit import PART_NAMES

WIDTHS = (32, 64, 96)
CONTEXT = 48
ADM = 68
DIFFUSERS = {  # the same sizes as arguments of diffusers' UNet and ControlNet
    "block_out_channels": WIDTHS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 6),
    "cross_attention_dim": CONTEXT,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": ADM,
    "use_linear_projection": True,
}


def config(**changes) -> FFRNetConfig:
    values = {
        "in_channels": 4,
        "widths": WIDTHS,
        "depths": ((0, 0), (1, 1), (2, 2)),
        "middle_depth": 2,
        "context_dim": CONTEXT,
        "adm_dim": ADM,
        "hint_widths": (16, 32, 96, 256),
        "heads": (2, 4, 6),
        "size_dim": 8,
    }
    return FFRNetConfig(**{**values, **changes})


def randomise(network: nn.Module, seed: int = 0, std: float = 0.08) -> nn.Module:
    """Set all parameters to random values, including those initialised to zero."""
    parameters = list(network.parameters())
    with torch.no_grad():
        for parameter, values in zip(parameters, _normal(tuple([one.shape for one in parameters]), seed, std)):
            parameter.copy_(values)
    return network.eval().requires_grad_(False)


@lru_cache(maxsize=16)
def _normal(shapes: tuple[torch.Size, ...], seed: int, std: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [std * torch.randn(shape, generator=generator) for shape in shapes]


def ffrnet(seed: int = 0, **changes) -> FFRNet:
    with torch.device("meta"):  # its own initial values would take longer than most tests
        network = FFRNet(config(**changes))
    return randomise(network.to_empty(device="cpu"), seed)


def landmarks(seed: int = 0, width: int = 128, height: int = 128) -> Landmarks:
    points = np.random.default_rng(seed).uniform(0.1, 0.9, (72, 2)) * (width, height)
    return Landmarks(points.astype(np.float32), width, height)


def side_by_side() -> tuple[Conditioning, Conditioning]:
    """Two people with different weight files, side by side. The first, on the left, affects only conditional rows."""
    left = PaintedRegion(np.float32([[1, 0]]))
    return (
        conditioning(cond_only=True, weight=0.7, region=left),
        conditioning(3, weight=1.2, region=PaintedRegion(1 - left.mask)),
    )


PEOPLE = {
    "one": lambda: (conditioning(weight=0.7),),
    "one on the conditional side": lambda: (conditioning(weight=0.7, cond_only=True),),
    "two": side_by_side,
}


def conditioning(seed: int = 0, network: FFRNet | None = None, **changes) -> Conditioning:
    tokens = torch.randn(1, 16, CONTEXT, generator=torch.Generator().manual_seed(seed))
    values = {"ffrnet": network or ffrnet(seed), "tokens": tokens, "landmarks": landmarks(seed)}
    strength = {name: changes.pop(name) for name in PART_NAMES["strength"] if name in changes}
    return Conditioning(**{**values, **changes}, strength=Strength(**strength))
