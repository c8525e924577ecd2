"""Convert the weights of a loaded network to types that it can compute with."""

from __future__ import annotations

from functools import reduce

import torch
from torch import nn

from facesnap_ext.networks.ffrnet import FLOAT8_TYPES
from facesnap_ext.networks.layers import CastingConv2d, CastingLinear


def unify_types(network: nn.Module) -> None:
    """Convert the weights of a file with mixed types to the widest type in the file.

    8-bit weights are kept in layers that cast them during computation (`CastingLinear` and `CastingConv2d`). In other
    layers, which a file has if it was cast to 8 bits entirely, they become half precision. All values are preserved,
    except that double precision is rounded to single.
    """
    kept = {id(module.weight) for module in network.modules() if isinstance(module, CastingLinear | CastingConv2d)}
    others = [weight for weight in network.parameters() if weight.dtype not in FLOAT8_TYPES]
    widest = reduce(torch.promote_types, {weight.dtype for weight in others}) if others else torch.float16
    widest = torch.float32 if widest is torch.float64 else widest
    for weight in network.parameters():
        if weight.dtype is not widest and not (weight.dtype in FLOAT8_TYPES and id(weight) in kept):
            weight.data = weight.data.to(widest)
