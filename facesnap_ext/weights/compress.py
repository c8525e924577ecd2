"""Make a lighter FaceSnap file of one: FFRNet with fewer transformer blocks, or in 8 bits.

SDXL's cost is in the ten transformer blocks behind each ResNet block of its deepest level. With two everywhere FFRNet
takes 0.46 of its FLOPs and a third of its memory (docs/performance.md). Such a file is a start: trained on as any other
(`facesnap train`), it learns to do without the blocks that went. In 8 bits it takes half the
memory and somewhat longer.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.ffrnet import Conv2d, FFRNet, FFRNetConfig, Linear
from facesnap_ext.weights import facesnap_file

BLOCK = re.compile(r"(.*\.transformer_blocks)\.(\d+)\.(.*)")


def compress(source: Path, out: Path, blocks: int | None = None, fp8: bool = False) -> None:
    """Write a lighter FaceSnap file.

    Args:
        blocks: how many transformer blocks in a row stay at most: the first of them, which take in what the ResNet
            block made, and the last, which the way out is used to; the additional one of an odd number is a first.
        fp8: whether the matrices of ResNet and transformer blocks are stored as float8_e4m3fn.

    Raises:
        FaceSnapError: `source` is no FaceSnap file, or has no more blocks than that.
    """
    weights = facesnap_file.load(source)
    ffrnet, done = weights.ffrnet, []
    if blocks is not None:
        ffrnet = _with_blocks(ffrnet, blocks, source.name)
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


def _with_blocks(ffrnet: FFRNet, blocks: int, name: str) -> FFRNet:
    old = ffrnet.config
    new = replace(
        old,
        depths=tuple(tuple(min(depth, blocks) for depth in depths) for depths in old.depths),
        middle_depth=min(old.middle_depth, blocks),
    )
    if new == old:
        raise FaceSnapError(f"{name} has no more than {blocks} transformer blocks in a row; give a lower number.")
    kept = _kept(old, blocks)
    tensors = {}
    for key, tensor in ffrnet.state_dict().items():
        if match := BLOCK.fullmatch(key):
            place, number, rest = match.groups()
            if int(number) not in kept[place]:
                continue
            key = f"{place}.{kept[place].index(int(number))}.{rest}"
        tensors[key] = tensor
    with torch.device("meta"):
        lighter = FFRNet(new)
    lighter.load_state_dict(tensors, assign=True)
    return lighter


def _kept(config: FFRNetConfig, blocks: int) -> dict[str, list[int]]:
    """Numbers of the blocks that stay, by where they are."""
    depths = {
        f"down_blocks.{level}.attentions.{number}.transformer_blocks": depth
        for level, depths in enumerate(config.depths)
        for number, depth in enumerate(depths)
    }
    depths["mid_block.attentions.0.transformer_blocks"] = config.middle_depth
    return {place: _ends(depth, blocks) for place, depth in depths.items()}


def _ends(depth: int, blocks: int) -> list[int]:
    """Of the numbers below `depth` the first and the last, `blocks` of them in all."""
    if depth <= blocks:
        return list(range(depth))
    last = blocks // 2
    return [*range(blocks - last), *range(depth - last, depth)]
