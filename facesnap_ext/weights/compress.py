"""Compress a FaceSnap file: keep fewer of FFRNet's transformer blocks, or store FFRNet in 8 bits.

Most of SDXL's cost lies in the ten transformer blocks after each ResNet block of the deepest level. With two instead of
ten, FFRNet needs 0.46 times the FLOPs and a third of the memory (docs/performance.md). Such a file is a starting point:
further training (`facesnap train`) compensates for the removed blocks. In 8 bits, FFRNet takes half the memory.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.networks.ffrnet import FFRNet
from facesnap_ext.networks.layers import CastingConv2d, CastingLinear
from facesnap_ext.weights import facesnap_file


def compress(source: Path, out: Path, blocks: int | None = None, fp8: bool = False) -> None:
    """Write a compressed copy of a FaceSnap file.

    Args:
        blocks: maximum number of consecutive transformer blocks at the deepest level and in the middle block. The first
            blocks, which process the output of the ResNet block, and the last blocks, whose output the following layers
            are trained on, are kept; if the number is odd, one more of the first blocks is kept. With 0, identity is
            injected only at the levels above.
        fp8: whether to store the weights of linear and convolution layers in ResNet and transformer blocks as
            float8_e4m3fn.

    Raises:
        FaceSnapError: `source` is not a FaceSnap file, has no more than `blocks` blocks, or contains values too
        large for 8 bits.
    """
    weights = facesnap_file.load(source)
    ffrnet = weights.ffrnet
    changes: list[str] = []
    if blocks is not None:
        if ffrnet.config.with_blocks(blocks) == ffrnet.config:
            raise FaceSnapError(
                f"{source.name} has no more than {blocks} consecutive transformer blocks at its deepest level; choose "
                "a lower number."
            )
        _keep_blocks(ffrnet, blocks)
        changes.append(f"consecutive blocks: {blocks}")
    if fp8:
        for name, module in ffrnet.named_modules():
            if isinstance(module, CastingLinear | CastingConv2d):
                if float(module.weight.float().abs().max()) > torch.finfo(torch.float8_e4m3fn).max:
                    raise FaceSnapError(
                        f"{source.name} contains values in {name} that are too large for 8 bits; leave out --fp8."
                    )
                module.weight.data = module.weight.data.to(torch.float8_e4m3fn)
        changes.append("8-bit weights")
    adapter = facesnap_file.load_adapter(source) if weights.info.adapter is not None else None
    trained_on = "; ".join([weights.info.trained_on, *changes])
    facesnap_file.save(
        out, replace(weights.info, ffrnet=ffrnet.config, trained_on=trained_on), weights.mixer, ffrnet, adapter
    )


def _keep_blocks(ffrnet: FFRNet, blocks: int) -> None:
    deepest: Any = ffrnet.down_blocks[-1]
    for transformer in [*(deepest.attentions or []), *(ffrnet.mid_block.attentions or [])]:
        old = list(transformer.transformer_blocks)
        last = min(len(old), blocks) // 2
        first = min(len(old), blocks) - last
        transformer.transformer_blocks = nn.ModuleList(old[:first] + old[len(old) - last :])
    if not blocks:
        deepest.attentions = None
    ffrnet.config = ffrnet.config.with_blocks(blocks)
