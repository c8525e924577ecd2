"""What the WebUIs' UNets have in common: LDM's blocks, and the GPU's memory that FFRNets share with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

from torch import nn

from facesnap_ext.conditioning import Conditioning
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.networks.ffrnet import FFRNet

OUTPUT_CONVOLUTIONS = ("0.out_layers.3.weight", "0.op.weight", "0.weight")
REFINER_DIFFERS = "FaceSnap acted until the refiner took over, whose UNet has other widths."
placed: WeakSet[FFRNet] = WeakSet()  # networks that may be in the GPU's memory


def offload() -> None:
    """Move every FFRNet out of the GPU's memory."""
    for network in placed:
        network.to("cpu")
    placed.clear()


def skip_widths(unet: nn.Module) -> tuple[int, ...]:
    """Channels of the skips of an LDM-style UNet from shallow to deep, read from the weights of its input blocks."""
    widths = []
    for block in unet.input_blocks:
        shapes = {name: parameter.shape for name, parameter in block.named_parameters()}
        widths.append(next(shapes[name][0] for name in OUTPUT_CONVOLUTIONS if name in shapes))
    return tuple(widths)


def check_fit(p: Any, conditionings: Sequence[Conditioning], unet: nn.Module) -> None:
    """Raise `FaceSnapError` when a job's checkpoint is not SDXL or its UNet has other widths than a person's file."""
    if not getattr(p.sd_model, "is_sdxl", False):
        title = getattr(getattr(p.sd_model, "sd_checkpoint_info", None), "title", "the loaded checkpoint")
        raise FaceSnapError(f"FaceSnap needs an SDXL checkpoint and {title} is none; choose an SDXL checkpoint.")
    wanted = skip_widths(unet)
    for conditioning in conditionings:
        own = conditioning.ffrnet.config.skip_widths
        if own != wanted:
            raise FaceSnapError(
                f"{conditioning.name} was made for a UNet of widths {_short(own)} and this checkpoint's UNet has "
                f"{_short(wanted)}; choose a FaceSnap file made for this kind of checkpoint."
            )


def _short(widths: tuple[int, ...]) -> str:
    levels = list(dict.fromkeys(widths))
    return f"{'/'.join(map(str, levels))} ({len(widths)} skips)"
