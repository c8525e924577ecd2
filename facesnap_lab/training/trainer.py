"""The training loop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.training import uploads
from facesnap_lab.training.checkpoints import (
    average_networks,
    describe_last,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from facesnap_lab.training.config import TrainConfig
from facesnap_lab.training.data import batch_rows, read_batches
from facesnap_lab.training.networks import update_average
from facesnap_lab.training.objective import Losses, compute_losses, draw_random_inputs
from facesnap_lab.training.prepare import prepare_run
from facesnap_lab.training.run import Run
from facesnap_lab.training.samples import save_samples


@dataclass(frozen=True)
class Step:
    """The result of one step: its number from 1, losses averaged over all processes' batches, the gradient norm, and
    the seconds in which this process waited for images."""

    number: int
    loss: float
    diffusion: float
    id: float | None
    learning_rate: float
    grad_norm: float
    waiting: float = field(compare=False)


def train(config: TrainConfig, resume: bool = False, minutes: float = math.inf) -> Path:
    """Train the Mixer and FFRNet, or a rival, and return the last checkpoint's folder.

    The result is the `facesnap.safetensors` in it, or the rival's file, which has the name of `config.method`.

    accelerate manages devices and processes: `accelerate launch -m facesnap_lab train CONFIG`.

    Args:
        minutes: time after which training stops with a checkpoint, even if steps remain. Only for a single process.

    Raises:
        FaceSnapError: a file is missing or does not match the others, the loss is not finite, or the disk is full.
    """
    run = prepare_run(config, resume)
    step = load_checkpoint(run) if resume else 0
    return train_from(run, step, minutes)


def train_from(run: Run, step: int, minutes: float = math.inf) -> Path:
    """Train from step 0, or from the loaded checkpoint's step, to the last one, and return the last checkpoint's
    folder."""
    config, accelerator = run.config, run.accelerator
    end = time.monotonic() + 60 * minutes
    with _progress(run, step) as (bar, board):
        for result in steps(run, step):
            bar.update()
            bar.set_postfix(loss=f"{result.loss:.4f}", refresh=False)
            if result.number % config.log_every == 0 and board is not None:
                _log(board, result, bar)
            last = result.number == config.steps or time.monotonic() >= end
            if result.number % config.save_every == 0 or last:
                save_checkpoint(run, result.number)
            if config.sample_every and (result.number % config.sample_every == 0 or last):
                networks = average_networks(run)
                if accelerator.is_main_process:
                    save_samples(run, result.number, networks, board)
            if last:
                break
    if config.upload is not None and accelerator.is_main_process:
        uploads.upload_samples(config.upload, config.out)  # of the last step
    return list_checkpoints(config.out)[-1][1]


def steps(run: Run, first: int) -> Iterator[Step]:
    """Train one step at a time, starting after step `first`.

    Raises:
        FaceSnapError: the loss or the gradient is not finite. That step does not change the networks.
    """
    config, accelerator = run.config, run.accelerator
    per_step = config.gradient_accumulation
    rows = batch_rows(
        config.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        first * per_step,
        config.steps * per_step,
    )
    batches = read_batches(run.images, rows, config.workers)
    latent_shape = (run.frozen.vae.config.latent_channels, *[run.images.sizes.latent_side] * 2)
    for number in range(first + 1, config.steps + 1):
        learning_rate = learning_rate_at(config, number)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]
        id_rows = id_rows_at(config, number)
        values = []
        waiting = 0.0
        for _ in range(per_step):
            began = time.perf_counter()
            batch = next(batches)
            waiting += time.perf_counter() - began
            inputs = draw_random_inputs(config.seed, batch.rows.tolist(), latent_shape).to(accelerator.device)
            with accelerator.accumulate(run.networks):
                losses = compute_losses(
                    batch.to(accelerator.device), inputs, run.networks, run.frozen, run.objective, id_rows
                )
                values.append(_loss_values(losses))
                # the mean is the same in all processes, so all of them stop
                means = accelerator.reduce(torch.stack(values).mean(0), "mean").tolist()
                if not math.isfinite(means[0]):
                    raise _diverged(run, "loss", number)
                accelerator.backward(losses.total)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(run.networks.parameters(), config.max_grad_norm)
                    norm = 0.0 if norm is None else float(norm)  # DeepSpeed does not return the norm
                    # the fp16 gradient scaler finds its scale by overflowing, and skips those steps itself
                    if config.mixed_precision != "fp16" and not math.isfinite(norm):
                        raise _diverged(run, "gradient", number)
                run.optimizer.step()
                run.optimizer.zero_grad()
        update_average(run.average, run.networks.parameters(), config.ema, number)
        yield Step(number, means[0], means[1], means[2] if id_rows else None, learning_rate, norm, waiting)


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 1: a linear warm-up, then constant or cosine decay."""
    rate = config.learning_rate * min(1.0, step / max(1, config.warmup))
    if config.schedule == "cosine" and step > config.warmup:
        rate *= 0.5 + 0.5 * math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup))
    return rate


def id_rows_at(config: TrainConfig, step: int) -> int:
    """Return the number of images per batch in the lightning branch in a step, counted from 1."""
    after = step - 1 - config.id_start
    return config.id_rows if after >= 0 and after % config.id_every == 0 else 0


def _loss_values(losses: Losses) -> Tensor:
    zero = torch.zeros_like(losses.total)
    return torch.stack([losses.total, losses.diffusion, zero if losses.id is None else losses.id]).detach()


def _diverged(run: Run, what: str, number: int) -> FaceSnapError:
    return FaceSnapError(
        f"The {what} is not finite at step {number}: lower 'learning_rate' or change 'mixed_precision', and resume; "
        f"{describe_last(run.config.out)}."
    )


@contextlib.contextmanager
def _progress(run: Run, step: int) -> Iterator[tuple[Any, Any]]:
    """A progress bar, and TensorBoard's writer, which is None in all but the main process."""
    from tqdm import tqdm

    main = run.accelerator.is_main_process
    board = None
    if main:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(run.config.out / "logs"), purge_step=step + 1 if step else None)
    with tqdm(total=run.config.steps, initial=step, desc="training", unit="step", disable=not main) as bar:
        try:
            yield bar, board
        finally:
            if board is not None:
                board.close()


def _log(board: Any, step: Step, bar: Any) -> None:
    board.add_scalar("loss/total", step.loss, step.number)
    board.add_scalar("loss/diffusion", step.diffusion, step.number)
    if step.id is not None:
        board.add_scalar("loss/id", step.id, step.number)
    board.add_scalar("learning_rate", step.learning_rate, step.number)
    board.add_scalar("grad_norm", step.grad_norm, step.number)
    board.add_scalar("seconds_waiting_for_images", step.waiting, step.number)
    if bar.format_dict["rate"]:
        board.add_scalar("steps_per_second", bar.format_dict["rate"], step.number)
