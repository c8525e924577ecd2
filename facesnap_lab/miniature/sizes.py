"""What smaller files cost in likeness: FFRNet in 8 bits, and as the UNet plus differences of low rank.

    python -m facesnap_ext.miniature.sizes --people 100 --out out/sizes

Writes `sizes.json`, `sizes.md` and a plot. The second is Control-LoRA's idea (Stability AI, 2023), and is made here
alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.compress import compress
from facesnap_ext.weights.initialise import read_encoder
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.trade_offs import measure_rows, results, write

SHARES = (0.75, 0.5, 0.4, 0.3, 0.2)  # of the bytes of FFRNet's encoder
WHOLE, EIGHT_BITS, LOW_RANK = "half precision", "8 bits", "low rank"


def of_low_rank(state: Mapping[str, Tensor], unet: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Tensors whose differences to another network's are of low rank.

    Over all matrices those singular values stay that carry most energy for the numbers they take (Eckart and Young: no
    others of as many leave less behind in one matrix). A matrix whose factors take as much as it does stays whole.

    Args:
        state, unet: matrices [N,…] by name; those of `state` that `unet` does not have stay as they are, as vectors do.
        share: of the numbers of the common matrices that may be kept, 0…1.

    Returns:
        Those that are not as they were, float32.
    """
    common = {key: tensor for key, tensor in state.items() if key in unet and tensor.ndim > 1}
    differences = {key: (tensor.float() - unet[key].float()).flatten(1) for key, tensor in common.items()}
    factors = {key: torch.linalg.svd(difference, full_matrices=False) for key, difference in differences.items()}

    costs = {key: sum(difference.shape) for key, difference in differences.items()}  # numbers of one rank
    sizes = {key: difference.numel() for key, difference in differences.items()}

    def ranks(threshold: float) -> dict[str, int]:
        return {key: int((values.square() / costs[key] >= threshold).sum()) for key, (_, values, _) in factors.items()}

    def kept(threshold: float) -> float:
        numbers = [min(rank * costs[key], sizes[key]) for key, rank in ranks(threshold).items()]
        return sum(numbers) / sum(sizes.values())

    low, high = 0.0, max(float(values[0]) ** 2 for _, values, _ in factors.values()) + 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) > share else (low, middle)
    return {
        key: unet[key].float() + ((left[:, :rank] * values[:rank]) @ right[:rank]).reshape(unet[key].shape)
        for (key, rank), (left, values, right) in zip(ranks(high).items(), factors.values())
        if rank * costs[key] < sizes[key]
    }


def write_low_rank(source: Path, unet: Path, out: Path, share: float) -> None:
    """Write a FaceSnap file anew whose FFRNet is a diffusers UNet's encoder plus differences of low rank. It is as
    large as before, since what they cost in likeness is all that is to be seen."""
    weights = facesnap_file.load(source)
    state = weights.ffrnet.state_dict()
    dtype = weights.ffrnet.dtype
    state |= {
        key: tensor.to(dtype) for key, tensor in of_low_rank(state, read_encoder(unet, torch.float32), share).items()
    }
    weights.ffrnet.load_state_dict(state, assign=True)
    facesnap_file.save(out, weights.info, weights.mixer, weights.ffrnet)


def draw_curve(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Likeness over size, with intervals over people."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    sizes = {WHOLE: 1.0, EIGHT_BITS: 0.5, **{_name(share): share for share in SHARES}}
    for label, names in ((LOW_RANK, [WHOLE, *map(_name, SHARES)]), (EIGHT_BITS, [EIGHT_BITS])):
        rows = [found[name]["likeness"] for name in names]
        means = [row["mean"] for row in rows]
        bars = [[row["mean"] - row["low"] for row in rows], [row["high"] - row["mean"] for row in rows]]
        axes.errorbar([100 * sizes[name] for name in names], means, bars, fmt="o-", capsize=3, label=label)
    axes.set(xlabel="FFRNet's size in % of half precision", ylabel="likeness by the judge", ylim=(0, None))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def _name(share: float) -> str:
    return f"{LOW_RANK}, {share:.0%}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure what smaller files cost in likeness.")
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("out/sizes"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    files = {WHOLE: shipped.FACESNAP, EIGHT_BITS: options.out / "8-bits.safetensors"}
    compress(shipped.FACESNAP, files[EIGHT_BITS], fp8=True)
    unet = shipped.SDXL / "unet" / "diffusion_pytorch_model.safetensors"
    for share in SHARES:
        files[_name(share)] = options.out / f"low-rank-{share}.safetensors"
        write_low_rank(shipped.FACESNAP, unet, files[_name(share)], share)
    rows = {name: {"model": file} for name, file in files.items()}
    found = results(measure_rows(shipped.few_step_sampler(), options.people, rows))
    draw_curve(found, options.out / "sizes.png")
    write(found, options.out / "sizes")
