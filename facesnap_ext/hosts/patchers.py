"""FFRNets under the memory management of Forge and its forks.

These hosts move networks to the GPU through a `ModelPatcher`, and know what is loaded by the patcher. Each FFRNet
therefore has one patcher for as long as the network exists. The host then moves it once, keeps it on the GPU for the
next pass and the next job, and moves it out, wholly or in part, when it needs the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from facesnap_ext.networks.ffrnet import FFRNet
from facesnap_ext.networks.layers import Movable

CASTING = ("parameters_manual_cast", "ldm_patched_cast_weights")
"""Attributes of the hosts' own layers that compute with weights on a different device: in Forge and Forge Neo, and in
reForge. A host leaves a layer on the CPU only if it has the attribute."""

_patchers: WeakKeyDictionary[FFRNet, Any] = WeakKeyDictionary()


class FFRNetLayers(nn.Module):
    """All layers of an FFRNet, without the FFRNet itself.

    A patcher refers to its module. If this were the FFRNet, its entry in `_patchers` would keep it in memory.
    """

    def __init__(self, network: FFRNet):
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)


def patchers_of(networks: Sequence[FFRNet], unet: Any) -> list[Any]:
    """The networks' patchers, after the networks were converted to the type in which the host's UNet computes.

    Args:
        unet: the host's `UnetPatcher`.
    """
    return [_patcher_of(network, unet) for network in networks]


def _patcher_of(network: FFRNet, unet: Any) -> Any:
    kind, dtype = type_of_model_patcher(unet), compute_dtype(unet)
    patcher = _patchers.get(network)
    if patcher is not None and network.dtype == dtype and patcher.load_device == unet.load_device:
        return patcher
    if patcher is not None and hasattr(
        patcher, "detach"
    ):  # where the host notes in layers what it has loaded; the size is about to change
        patcher.detach()
    network.to(dtype)
    for layer in network.modules():
        if isinstance(layer, Movable):
            for name in CASTING:
                setattr(layer, name, False)
    _patchers[network] = kind(FFRNetLayers(network), unet.load_device, unet.offload_device)
    return _patchers[network]


def type_of_model_patcher(unet: Any) -> type[Any]:
    """The host's own `ModelPatcher`, the base class of its `UnetPatcher`."""
    return type(unet).__mro__[1]


def compute_dtype(unet: Any) -> torch.dtype:
    """The dtype in which the UNet computes; its weights may be stored in a quantised type."""
    dtype = getattr(unet.model, "computation_dtype", None)
    return dtype or unet.model_dtype()
