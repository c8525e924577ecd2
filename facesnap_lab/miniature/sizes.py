"""Measure how much likeness smaller files lose: FFRNet in 8 bits, and as the UNet plus low-rank differences.

    python -m facesnap_lab.miniature.sizes --people 100 --out out/sizes

Writes `sizes.json`, `sizes.md` and a plot. Low-rank differences are Control-LoRA's idea (Stability AI, 2023); only this
experiment implements them.
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

SHARES = (0.75, 0.5, 0.4, 0.3, 0.2)  # relative to the size of FFRNet's encoder
HALF_PRECISION, EIGHT_BITS, LOW_RANK = "half precision", "8 bits", "low rank"


def low_rank_approximation(state: Mapping[str, Tensor], unet: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Approximate a network by a second one plus low-rank differences.

    Over all matrices, the singular values with the most energy per number are kept (Eckart and Young: no other matrix
    of that rank is closer). A matrix is kept unchanged if its factors would be as large as the matrix itself.

    Args:
        state, unet: matrices [N,…] by name. Vectors, and tensors of `state` that `unet` does not have, are unchanged.
        share: fraction of the common matrices' elements that may be stored, 0…1.

    Returns:
        The changed tensors, float32.
    """
    common = {key: tensor for key, tensor in state.items() if key in unet and tensor.ndim > 1}
    differences = {key: (tensor.float() - unet[key].float()).flatten(1) for key, tensor in common.items()}
    factors = {key: torch.linalg.svd(difference, full_matrices=False) for key, difference in differences.items()}

    costs = {key: sum(difference.shape) for key, difference in differences.items()}  # stored values per rank
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
    """Write a FaceSnap file whose FFRNet is a diffusers UNet's encoder plus low-rank differences.

    The file is as large as before, since only the likeness is measured.
    """
    weights = facesnap_file.load(source)
    state = weights.ffrnet.state_dict()
    dtype = weights.ffrnet.dtype
    state |= {
        key: tensor.to(dtype)
        for key, tensor in low_rank_approximation(state, read_encoder(unet, torch.float32), share).items()
    }
    weights.ffrnet.load_state_dict(state, assign=True)
    facesnap_file.save(out, weights.info, weights.mixer, weights.ffrnet)


def plot_likeness(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Plot likeness over size, with intervals over people."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    sizes = {HALF_PRECISION: 1.0, EIGHT_BITS: 0.5, **{_low_rank_name(share): share for share in SHARES}}
    for label, names in ((LOW_RANK, [HALF_PRECISION, *map(_low_rank_name, SHARES)]), (EIGHT_BITS, [EIGHT_BITS])):
        rows = [found[name]["likeness"] for name in names]
        means = [row["mean"] for row in rows]
        bars = [[row["mean"] - row["low"] for row in rows], [row["high"] - row["mean"] for row in rows]]
        axes.errorbar([100 * sizes[name] for name in names], means, bars, fmt="o-", capsize=3, label=label)
    axes.set(xlabel="FFRNet's size, % of half precision", ylabel="likeness measured by the judge", ylim=(0, None))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def _low_rank_name(share: float) -> str:
    return f"{LOW_RANK}, {share:.0%}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure how much likeness smaller files lose.")
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("out/sizes"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    files = {HALF_PRECISION: shipped.FACESNAP, EIGHT_BITS: options.out / "8-bits.safetensors"}
    compress(shipped.FACESNAP, files[EIGHT_BITS], fp8=True)
    unet = shipped.SDXL / "unet" / "diffusion_pytorch_model.safetensors"
    for share in SHARES:
        files[_low_rank_name(share)] = options.out / f"low-rank-{share}.safetensors"
        write_low_rank(shipped.FACESNAP, unet, files[_low_rank_name(share)], share)
    rows = {name: {"model": file} for name, file in files.items()}
    found = results(measure_rows(shipped.few_step_sampler(), options.people, rows))
    plot_likeness(found, options.out / "sizes.png")
    write(found, options.out / "sizes")
