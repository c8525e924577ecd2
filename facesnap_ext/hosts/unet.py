"""Features common to the UNets of all WebUIs: LDM's block layout, and GPU memory shared with FFRNets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.conditioning import Conditioning
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.networks.ffrnet import FFRNet

OUTPUT_CONVOLUTIONS = (".0.out_layers.3.weight", ".0.op.weight", ".0.weight")
"""Endings of the name of a block's last convolution: of a residual block, of a downsampling, of the first block."""

REFINER_DIFFERS = "FaceSnap stopped when the refiner took over, because its UNet has different channel widths."
on_gpu: WeakSet[FFRNet] = WeakSet()  # FFRNets that may be in GPU memory


def offload() -> None:
    """Move every FFRNet out of GPU memory."""
    for network in on_gpu:
        network.to("cpu")
    on_gpu.clear()


def skip_widths(unet: Any) -> tuple[int, ...]:
    """Channels of the skips of an LDM-style UNet from shallow to deep, read from its input blocks' weights.

    The blocks may be wrapped in other modules, as deep shrink extensions do.

    Raises:
        FaceSnapError: a block has been replaced by something else.
    """
    return tuple([_output_width(number, block) for number, block in enumerate(unet.input_blocks)])


def _output_width(number: int, block: nn.Module) -> int:
    shapes = {f".{name}": parameter.shape for name, parameter in block.named_parameters()}
    for ending in OUTPUT_CONVOLUTIONS:
        for name, shape in shapes.items():
            if name.endswith(ending):
                return int(shape[0])
    raise FaceSnapError(
        f"Another extension has replaced input block {number} of the UNet, so FaceSnap cannot tell whether its file "
        "fits; disable that extension and reload the checkpoint."
    )


def fitted(residual: Tensor, features: Tensor) -> Tensor:
    """A residual [R or 1, C, h, w], resized to the features that it is added to.

    The sizes differ if another extension shrinks the features of some blocks, as Kohya's deep shrink does.
    """
    if residual.shape[2:] != features.shape[2:]:
        return F.interpolate(residual.float(), features.shape[2:], mode="bilinear").to(residual.dtype)
    return residual


def check_fit(p: Any, people: Sequence[Conditioning], unet: nn.Module) -> None:
    """Check that a job's checkpoint is SDXL and that its UNet has the widths that each person's file was made for.

    Raises:
        FaceSnapError: the checkpoint is not SDXL, or its UNet has different widths.
    """
    if not getattr(p.sd_model, "is_sdxl", False):
        title = getattr(getattr(p.sd_model, "sd_checkpoint_info", None), "title", "the loaded checkpoint")
        raise FaceSnapError(f"FaceSnap needs an SDXL checkpoint and {title} is not one; choose an SDXL checkpoint.")
    expected = skip_widths(unet)
    for person in people:
        actual = person.ffrnet.config.skip_widths
        if actual != expected:
            raise FaceSnapError(
                f"{person.name} was made for a UNet with channel widths {_short(actual)} and this checkpoint's UNet "
                f"has {_short(expected)}; choose a FaceSnap file made for this kind of checkpoint."
            )


def _short(widths: tuple[int, ...]) -> str:
    levels = list(dict.fromkeys(widths))
    return f"{'/'.join(map(str, levels))} ({len(widths)} skips)"
