"""Make a lighter FaceSnap file of one: FFRNet with fewer transformer blocks, or in 8 bits.

SDXL's cost is in the ten transformer blocks behind each ResNet block of its deepest level. With two there FFRNet takes
0.46 of its FLOPs and a third of its memory (docs/performance.md). Such a file is a start: trained on as any other
(`facesnap train`), it learns to do without the blocks that went. In 8 bits it takes half the memory.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.networks.ffrnet import Conv2d, FFRNet, Linear
from facesnap_ext.weights import facesnap_file


def compress(source: Path, out: Path, blocks: int | None = None, fp8: bool = False) -> None:
    """Write a lighter FaceSnap file.

    Args:
        blocks: how many transformer blocks in a row stay at most at the deepest level and in the middle: the first of
            them, which take in what the ResNet block made, and the last, which the way out is used to; the additional
            one of an odd number is a first. With 0 identity enters at the levels above alone.
        fp8: whether the matrices of ResNet and transformer blocks are stored as float8_e4m3fn.

    Raises:
        FaceSnapError: `source` is no FaceSnap file, or has no more blocks than that.
    """
    weights = facesnap_file.load(source)
    ffrnet, done = weights.ffrnet, []
    if blocks is not None:
        if ffrnet.config.with_blocks(blocks) == ffrnet.config:
            raise FaceSnapError(
                f"{source.name} has no more than {blocks} transformer blocks in a row where it is deepest; give a "
                "lower number."
            )
        _keep_blocks(ffrnet, blocks)
        done.append(f"blocks in a row: {blocks}")
    if fp8:
        for module in ffrnet.modules():
            if isinstance(module, Linear | Conv2d):
                module.weight.data = module.weight.data.to(torch.float8_e4m3fn)
        done.append("in 8 bits")
    adapter = facesnap_file.load_adapter(source) if weights.info.adapter is not None else None
    trained_on = "; ".join([weights.info.trained_on, *done])
    facesnap_file.save(
        out, replace(weights.info, ffrnet=ffrnet.config, trained_on=trained_on), weights.mixer, ffrnet, adapter
    )


def _keep_blocks(ffrnet: FFRNet, blocks: int) -> None:
    deepest = ffrnet.down_blocks[-1]
    for transformer in [*(deepest.attentions or []), *(ffrnet.mid_block.attentions or [])]:
        old = list(transformer.transformer_blocks)
        last = min(len(old), blocks) // 2
        first = min(len(old), blocks) - last
        transformer.transformer_blocks = nn.ModuleList(old[:first] + old[len(old) - last :])
    if not blocks:
        deepest.attentions = None
    ffrnet.config = ffrnet.config.with_blocks(blocks)
