"""How long a training takes and how much it reads and writes, from a few measured steps."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from facesnap_lab import storage
from facesnap_lab.markdown import markdown_table
from facesnap_lab.training.checkpoints import average_networks, save_checkpoint
from facesnap_lab.training.config import TrainConfig
from facesnap_lab.training.prepare import prepare_run
from facesnap_lab.training.run import Run
from facesnap_lab.training.samples import save_samples
from facesnap_lab.training.trainer import steps

MEASURED = 6  # steps
WARM_UP = 2  # steps before the measured ones, in which memory is allocated and kernels are chosen
SIZES = (10**5, 10**6, 10**7, 10**8)  # images


@dataclass(frozen=True)
class Rates:
    """What was measured on this machine.

    Attributes:
        step: seconds of a step, averaged over a cycle of `id_every` steps. Those before `id_start` take less.
        waiting: seconds of `step` in which the main process waited for images.
        checkpoint, samples: seconds to write a checkpoint, and to draw the sample images.
        checkpoint_bytes: size of a checkpoint.
        memory_bytes: peak memory of the GPU; 0 on the CPU.
    """

    step: float
    waiting: float
    checkpoint: float
    samples: float
    checkpoint_bytes: int
    memory_bytes: int


def estimate(config: TrainConfig) -> dict[str, Any]:
    """Train a few steps, discard them, and extrapolate.

    A checkpoint is written beside `config.out` and removed again, so the estimate needs space for one.

    Returns:
        The rates, and for the configuration and for each of `SIZES` the images, steps, hours, GPU-hours and GB. All
        have the same number of epochs.

    Raises:
        FaceSnapError: see `trainer.train`.
    """
    from accelerate import PartialState

    out = config.out.parent / f".{config.out.name}-estimate"
    state = PartialState()
    if state.is_main_process:
        shutil.rmtree(out, ignore_errors=True)  # of an estimate that was killed
    state.wait_for_everyone()
    try:
        run = prepare_run(replace(config, out=out, upload=None))
        rates = measure(run)
    finally:
        state.wait_for_everyone()
        if state.is_main_process:
            shutil.rmtree(out, ignore_errors=True)
    return {"rates": asdict(rates), **extrapolate(config, rates, run)}


def measure(run: Run) -> Rates:
    """Run the first steps, write a checkpoint, and draw the sample images if the configuration asks for them."""
    config, cuda = run.config, run.accelerator.device.type == "cuda"
    cycle = config.id_every if config.id_rows else 1
    warm_up, measured = (cycle * math.ceil(count / cycle) for count in (WARM_UP, MEASURED))
    run = replace(run, config=replace(config, steps=warm_up + measured, id_start=0))
    began, waiting = 0.0, 0.0
    for step in steps(run, 0):
        if step.number == warm_up:
            began = time.perf_counter()
        elif step.number > warm_up:
            waiting += step.waiting
    seconds = time.perf_counter() - began
    memory = torch.cuda.max_memory_allocated() if cuda else 0
    began = time.perf_counter()
    save_checkpoint(run, warm_up + measured)
    saved = time.perf_counter()
    size = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    if config.sample_every:
        networks = average_networks(run)
        if run.accelerator.is_main_process:
            save_samples(run, warm_up + measured, networks, None)
    sampled = time.perf_counter()
    return Rates(seconds / measured, waiting / measured, saved - began, sampled - saved, size, memory)


def extrapolate(config: TrainConfig, rates: Rates, run: Run) -> dict[str, Any]:
    """Return the images per step and epochs of a run, and the rows of the table."""
    processes, images = run.accelerator.num_processes, len(run.images.index)
    per_step = config.batch_size * config.gradient_accumulation * processes
    shard_bytes = sum(map(storage.size, config.shards)) / images
    rows = []
    for count in (images, *SIZES):
        number = config.steps * count / images
        seconds = number * (rates.step + rates.checkpoint / config.save_every)
        if config.sample_every:
            seconds += number / config.sample_every * rates.samples
        rows.append(
            {
                "images": count,
                "steps": round(number),
                "hours": seconds / 3600,
                "device_hours": seconds / 3600 * processes,
                "shards_GB": count * shard_bytes / 1e9,
                "checkpoints_GB": config.keep * rates.checkpoint_bytes / 1e9,
            }
        )
    return {
        "device": str(run.accelerator.device.type),
        "processes": processes,
        "images_per_step": per_step,
        "epochs": config.steps * per_step / images,
        "runs": rows,
    }


def as_text(found: Mapping[str, Any]) -> str:
    """Format an estimate as sentences and a table."""
    rates, count = Rates(**found["rates"]), found["processes"]
    memory = f", with a peak of {rates.memory_bytes / 1e9:.1f} GB of GPU memory" if rates.memory_bytes else ""
    where = f"{count} process{'es' if count > 1 else ''} ({found['device']})"
    rows = []
    for row in found["runs"]:
        sizes = [f"{row[name]:,.3g}" for name in ("hours", "device_hours", "shards_GB", "checkpoints_GB")]
        rows.append((f"{row['images']:,} images", [f"{row['steps']:,}", *sizes]))
    lines = [
        f"A step of {found['images_per_step']} images takes {rates.step:.3g} s with {where}{memory}.",
        f"For {100 * rates.waiting / rates.step:.0f} % of a step, the main process waits for images.",
        f"A checkpoint takes {rates.checkpoint:.3g} s, and the sample images take {rates.samples:.3g} s.",
        f"Each row trains for {found['epochs']:.2f} epochs.",
        "",
        *markdown_table(["steps", "hours", "device hours", "shards, GB", "checkpoints, GB"], rows),
    ]
    return "\n".join(lines)
