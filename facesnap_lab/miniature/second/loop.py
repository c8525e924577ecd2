"""The training loop of every stage: it resumes from its checkpoint, and the same steps produce the same weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from facesnap_ext.files import atomic_write

CHECKPOINT_EVERY = 60.0  # seconds
REPORT_EVERY = 250  # steps; a report takes as long as several steps
WARMUP = 100  # steps
LAST_RATE = 0.01  # relative to the peak learning rate

T = TypeVar("T")


@dataclass(frozen=True)
class Compute:
    """Where and how a stage is trained."""

    device: str = "cpu"  # of the networks; random numbers are always drawn on the CPU
    batch: int = 1  # multiplies the images of a step; the learning rate grows with its square root
    threads: int = 0  # that prepare the batches of the next steps; 0: each batch is prepared when it is needed
    workers: int = 1  # processes that render images and write shards
    anneal: bool = False  # whether the learning rate falls to its end within the minutes, even if steps remain


CPU = Compute()


def fit(
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    out: Path,
    *,
    steps: int,
    minutes: float,
    rate: float,
    decay: float = 1e-4,
    report: Callable[[], str] | None = None,
    average: nn.Module | None = None,
    ema: float = 0.999,
    compute: Compute = CPU,
) -> int:
    """Train with AdamW until the steps are done or time is up, and return the number of steps so far.

    `out/state.pt` is written every minute and at the end, and the next call resumes from it. The learning rate rises
    over the first steps and falls along a cosine over all steps, regardless of how many calls they take. With
    `compute.anneal`, it falls to the end of the cosine in every call, and the next call raises it again.

    Args:
        loss_of: draws the batch of a step, seeded by its number, and returns the loss.
        report: called at a checkpoint, at most every `REPORT_EVERY` steps; returns a note for the log.
        average: a copy of the module, which becomes the moving average of its parameters over about 1 / (1 - `ema`)
            steps, fewer in the beginning.
        compute: its factor for the batch changes the learning rate. The module is already on its device.
    """
    rate *= math.sqrt(compute.batch)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=decay)
    step = load_state(out, module, optimizer, average)
    began, first = time.monotonic(), step
    saved, reported = began, step
    losses: list[Tensor] = []
    while step < steps and time.monotonic() - began < 60 * minutes:
        elapsed = (time.monotonic() - began) / (60 * minutes) if compute.anneal else 0.0
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_share(step, max(step / steps, first / steps + (1 - first / steps) * elapsed))
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if average is not None:
            _update_average(average, module, min(ema, step / (step + 20)))
        losses.append(loss.detach())
        if (now := time.monotonic()) - saved >= CHECKPOINT_EVERY:
            saved = now
            _save_state(out, module, optimizer, step, average)
            mean = torch.stack(losses).mean().item()
            losses.clear()
            speed = (step - first) / (now - began)
            note = ""
            if report is not None and step - reported >= REPORT_EVERY:
                note, reported = f", {report()}", step
            print(f"{step} of {steps} steps, {speed:.2f}/s, loss {mean:.5f}{note}", flush=True)
    if step > first:
        _save_state(out, module, optimizer, step, average)
    return step


def rate_share(step: int, progress: float) -> float:
    """Return a step's learning rate as a fraction of the peak rate.

    Args:
        progress: position on the cosine, 0…1.
    """
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress))
    return min(1, (step + 1) / WARMUP) * (LAST_RATE + (1 - LAST_RATE) * cosine)


def prepared(draw: Callable[[int], T], threads: int) -> Callable[[int], T]:
    """Return a function with the same results as `draw`, called with consecutive steps, that threads compute ahead.

    Args:
        draw: prepares the batch of a step, seeded by its number, without touching anything that others change.
        threads: 0 for no threads.
    """
    if threads == 0:
        return draw
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    waiting: dict[int, Future[T]] = {}

    def take(step: int) -> T:
        for number in range(step, step + 2 * threads):
            if number not in waiting:
                waiting[number] = pool.submit(draw, number)
        return waiting.pop(step).result()

    return take


@torch.no_grad()
def _update_average(average: nn.Module, module: nn.Module, keep: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - keep)


def load_state(
    out: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    average: nn.Module | None = None,
) -> int:
    """Load the checkpoint in `out`, if there is one, and return its step."""
    file = out / "state.pt"
    if not file.exists():
        return 0
    state = torch.load(file, map_location="cpu", weights_only=True)
    module.load_state_dict(state["module"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    if average is not None:
        average.load_state_dict(state["average"])
    return state["step"]


def _save_state(
    out: Path, module: nn.Module, optimizer: torch.optim.Optimizer, step: int, average: nn.Module | None
) -> None:
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    if average is not None:
        state["average"] = average.state_dict()
    with atomic_write(out / "state.pt") as part:
        torch.save(state, part)
