"""Write a VAE with few normalisation groups as a wider one with SDXL's 32, which computes the same.

SDXL's layout knows 32 groups only; in a network of 32 channels each would then be normalised by itself, and the picture's
colour with it. Here every hidden channel is copied, and the copies of a group fill groups of their own: equal statistics,
equal results. What follows reads the first copy and ignores the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

GROUPS = 32  # of SDXL's layout
OUTER_IN = ("encoder.conv_in", "decoder.conv_in", "quant_conv", "post_quant_conv")  # read picture or latent
OUTER_OUT = ("encoder.conv_out", "decoder.conv_out", "quant_conv", "post_quant_conv")  # write them


def widen_vae(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A VAE of diffusers' layout with `norm_num_groups` groups, a divisor of 32, as one of 32 groups.

    Returns:
        Its tensors and its configuration; widths are 32 / `norm_num_groups` times what they were.
    """
    groups = config["norm_num_groups"]
    copies = GROUPS // groups
    if copies * groups != GROUPS:
        raise ValueError(f"{groups} groups do not divide {GROUPS}")
    wide = {key: _widen(key, tensor, groups, copies) for key, tensor in tensors.items()}
    widths = tuple(copies * width for width in config["block_out_channels"])
    return wide, {**config, "block_out_channels": widths, "norm_num_groups": GROUPS}


def _widen(key: str, tensor: Tensor, groups: int, copies: int) -> Tensor:
    module = key.rpartition(".")[0]
    if tensor.ndim > 1 and module not in OUTER_IN:
        place = _places(tensor.shape[1], groups, copies)
        wide = tensor.new_zeros(tensor.shape[0], copies * tensor.shape[1], *tensor.shape[2:])
        wide[:, place[:, 0]] = tensor
        tensor = wide
    if module not in OUTER_OUT:
        place = _places(tensor.shape[0], groups, copies)
        wide = tensor.new_zeros(copies * tensor.shape[0], *tensor.shape[1:])
        if module.endswith(".to_q"):
            # queries of one copy alone, or products with the keys would add up; softmax divides by the root of the width
            wide[place[:, 0]] = tensor * math.sqrt(copies)
        else:
            for copy in range(copies):
                wide[place[:, copy]] = tensor
        tensor = wide
    return tensor


def _places(channels: int, groups: int, copies: int) -> Tensor:
    """[channels, copies] where the copies of each channel lie: each group's copies side by side, whole."""
    size = channels // groups
    channel = torch.arange(channels)[:, None]
    return (channel // size * copies + torch.arange(copies)) * size + channel % size
