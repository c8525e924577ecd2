"""The training loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.networks.ffrnet import FFRNet
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.facesnap_file import FaceSnapInfo
from facesnap_lab.training import checkpoints
from facesnap_lab.training.config import TrainConfig
from facesnap_lab.training.data import Pictures, Shapes, batch_rows, read_batches
from facesnap_lab.training.frozen import Frozen, load_frozen
from facesnap_lab.training.networks import TokensInText, TrainedNetworks, checkpoint_activations, update_average
from facesnap_lab.training.objective import Losses, Objective, draw, losses
from facesnap_lab.training.samples import save_samples
from facesnap_lab.training.shards import read_index


@dataclass(frozen=True)
class Step:
    """What came of one step: its number from 1, means over the batch of all processes, and the gradient's length."""

    number: int
    loss: float
    diffusion: float
    id: float | None
    learning_rate: float
    grad_norm: float


@dataclass(frozen=True, eq=False)
class Run:
    """A run in one process. networks and optimizer are accelerate's wrappers; average is the parameters' moving one."""

    config: TrainConfig
    accelerator: Any
    info: FaceSnapInfo
    file_dtype: torch.dtype  # of the FaceSnap files
    networks: nn.Module
    optimizer: Any
    average: list[Tensor]
    frozen: Frozen
    pictures: Pictures
    objective: Objective


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train Mixer and FFRNet, and return the last checkpoint's folder; its `facesnap.safetensors` is the result.

    Devices, processes and their division of labour are accelerate's: `accelerate launch -m facesnap_lab train CONFIG`.

    Raises:
        FaceSnapError: a file is missing or unfit, the loss is no number, or the disk is full.
    """
    run = prepare(config, resume)
    step = load_checkpoint(run) if resume else 0
    return loop(run, step)


def prepare(config: TrainConfig, resume: bool = False) -> Run:
    """Load and check everything that a run needs."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation, mixed_precision=config.mixed_precision
    )
    if accelerator.is_main_process:
        checkpoints.prepare_out(config.out, resume)
    accelerator.wait_for_everyone()

    index = read_index(config.shards)
    start = facesnap_file.load(config.start)
    frozen = load_frozen(config, accelerator.device)
    shapes = _shapes(config, start.info, frozen)
    pictures = Pictures(index, shapes, config.seed, config.reference, config.landmarks, config.jitter)
    _check_fit(config, start.info, frozen, pictures)

    file_dtype = start.ffrnet.dtype
    start.mixer.requires_grad_(True)
    start.ffrnet.requires_grad_(True)
    kind = TrainedNetworks if config.tokens == "ffrnet" else TokensInText
    networks = kind(start.mixer, start.ffrnet).train()
    for parameter in networks.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)  # else they would lie in the mapped file
    if config.gradient_checkpointing:
        checkpoint_activations(networks)
    groups = [
        {"params": networks.ffrnet.parameters(), "rate": 1.0},
        {"params": networks.mixer.parameters(), "rate": config.mixer_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True)
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        if plugin.zero_stage == 3:
            raise FaceSnapError("DeepSpeed's ZeRO stage 3 leaves nothing to average; use stage 2 or less, or FSDP.")
        # without a data loader of accelerate's own it cannot tell
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch_size
    networks, optimizer = accelerator.prepare(networks, optimizer)
    return Run(
        config=config,
        accelerator=accelerator,
        info=start.info,
        file_dtype=file_dtype,
        networks=networks,
        optimizer=optimizer,
        average=[parameter.detach().clone() for parameter in networks.parameters()],
        frozen=frozen,
        pictures=pictures,
        objective=Objective(
            text_free=start.info.text_free,
            size_dim=start.info.ffrnet.size_dim,
            drop_text=config.drop_text,
            lightning_scale=config.lightning_scale,
            outside=config.outside,
            terminal=config.terminal,
            snr_bounds=(config.snr_low, config.snr_high) if config.snr_weights else None,
            id_weight=config.id_weight,
            lightning_steps=config.lightning_steps,
            lightning_grad_steps=config.lightning_grad_steps,
        ),
    )


def loop(run: Run, step: int) -> Path:
    """Train from a step, 0 or a checkpoint's, to the last."""
    config, accelerator = run.config, run.accelerator
    with _progress(run, step) as (bar, board):
        for done in steps(run, step):
            bar.update()
            bar.set_postfix(loss=f"{done.loss:.4f}", refresh=False)
            if done.number % config.log_every == 0 and board is not None:
                _log(board, done, bar)
            last = done.number == config.steps
            if done.number % config.save_every == 0 or last:
                save_checkpoint(run, done.number)
            if config.sample_every and (done.number % config.sample_every == 0 or last):
                networks = average_networks(run)
                if accelerator.is_main_process:
                    save_samples(run, done.number, *networks, board)
    found = checkpoints.list_checkpoints(config.out)
    return found[-1][1]


def steps(run: Run, first: int) -> Iterator[Step]:
    """Train, one step at a time, after step `first`.

    Raises:
        FaceSnapError: loss or gradient is no number; nothing is changed by that step.
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
    batches = read_batches(run.pictures, rows, config.workers)
    latents = (run.frozen.vae.config.latent_channels, *[run.pictures.shapes.latent_side] * 2)
    for number in range(first + 1, config.steps + 1):
        learning_rate = learning_rate_at(config, number)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]
        id_rows = config.id_rows if (number - 1) % config.id_every == 0 else 0
        parts = []
        for _ in range(per_step):
            batch = next(batches)
            draws = draw(config.seed, batch.rows.tolist(), latents).to(accelerator.device)
            with accelerator.accumulate(run.networks):
                found = losses(batch.to(accelerator.device), draws, run.networks, run.frozen, run.objective, id_rows)
                parts.append(_numbers(found))
                # all processes see the same mean, so all stop
                means = accelerator.reduce(torch.stack(parts).mean(0), "mean").tolist()
                if not math.isfinite(means[0]):
                    raise _diverged(run, "loss", number)
                accelerator.backward(found.total)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(run.networks.parameters(), config.max_grad_norm)
                    norm = 0.0 if norm is None else float(norm)  # DeepSpeed keeps it to itself
                    # half precision's scaler finds its scale by overflows, and leaves those steps out itself
                    if config.mixed_precision != "fp16" and not math.isfinite(norm):
                        raise _diverged(run, "gradient", number)
                run.optimizer.step()
                run.optimizer.zero_grad()
        update_average(run.average, run.networks.parameters(), config.ema, number)
        yield Step(number, means[0], means[1], means[2] if id_rows else None, learning_rate, norm)


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 1: rising evenly over the warm-up, then constant or a half cosine."""
    rate = config.learning_rate * min(1.0, step / max(1, config.warmup))
    if config.schedule == "cosine" and step > config.warmup:
        rate *= 0.5 + 0.5 * math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup))
    return rate


def _numbers(found: Losses) -> Tensor:
    zero = torch.zeros_like(found.total)
    return torch.stack([found.total, found.diffusion, zero if found.id is None else found.id]).detach()


def _diverged(run: Run, what: str, number: int) -> FaceSnapError:
    return FaceSnapError(
        f"The {what} is no number at step {number}: lower 'learning_rate' or change 'mixed_precision', and resume; "
        f"{checkpoints.last_good(run.config.out)}."
    )


def _shapes(config: TrainConfig, info: FaceSnapInfo, frozen: Frozen) -> Shapes:
    levels = 2 ** (len(frozen.unet.config.block_out_channels) - 1)
    if config.resolution % (frozen.vae_scale * levels):
        raise FaceSnapError(
            f"'resolution' is {config.resolution} and must be a multiple of {frozen.vae_scale * levels} for "
            f"{config.base.name}; correct it."
        )
    side = config.resolution // frozen.vae_scale
    return Shapes(config.resolution, side, info.ffrnet.pixels_per_latent * side, frozen.clip.image_size)


def _check_fit(config: TrainConfig, info: FaceSnapInfo, frozen: Frozen, pictures: Pictures) -> None:
    name = config.start.name
    widths = tuple(frozen.unet.config.block_out_channels)
    if widths != info.ffrnet.widths:
        raise FaceSnapError(
            f"{name} was made for a UNet of widths {info.ffrnet.widths} and {config.base.name} has {widths}; make it "
            "with 'facesnap init' from this base."
        )
    if frozen.clip.width != info.mixer.clip_dim:
        raise FaceSnapError(
            f"{name} wants CLIP tokens of {info.mixer.clip_dim} numbers and {config.clip.name} gives "
            f"{frozen.clip.width}; use the encoder that it was made for."
        )
    found = len(pictures.read(0).embedding)
    if found != info.mixer.id_dim:
        raise FaceSnapError(
            f"{name} wants ArcFace embeddings of {info.mixer.id_dim} numbers and those in {config.shards[0].name} have "
            f"{found}; make the shards with the face pack that it was made for."
        )


def save_checkpoint(run: Run, step: int) -> None:
    """Write a checkpoint of everything that resuming needs, and the FaceSnap file.

    Raises:
        FaceSnapError: the disk is full, or fails; the checkpoints before this one are untouched.
    """
    accelerator, out = run.accelerator, run.config.out
    mixer, ffrnet = average_networks(run)
    folder = checkpoints.unfinished(out, step)

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        accelerator.save_state(str(folder / "state"))
        if accelerator.process_index == _average_owner(run):
            torch.save(run.average, folder / f"average-{accelerator.process_index}.pt")
        if accelerator.is_main_process:
            info = replace(run.info, license=run.config.license, trained_on=trained_on(run, step))
            facesnap_file.save(folder / checkpoints.WEIGHTS, info, mixer, ffrnet)

    checkpoints.guarded(out, step, write)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoints.guarded(out, step, lambda: checkpoints.finish(out, step, run.config.keep))
    accelerator.wait_for_everyone()


def load_checkpoint(run: Run) -> int:
    """Go back to the last checkpoint and return its step; 0 where there is none yet.

    Raises:
        FaceSnapError: it cannot be read, or belongs to other networks.
    """
    found = checkpoints.list_checkpoints(run.config.out)
    if not found:
        return 0
    step, folder = found[-1]
    try:
        run.accelerator.load_state(str(folder / "state"))
        average = torch.load(folder / f"average-{_average_owner(run)}.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for own, saved in zip(run.average, average, strict=True):
                own.copy_(saved)
    except Exception as error:  # pickle, torch, safetensors and accelerate each have their own
        reason = reason_of(error)
        raise FaceSnapError(
            f"The checkpoint {folder} cannot be resumed ({reason}); remove it to resume from the one before."
        ) from error
    return step


def _average_owner(run: Run) -> int:
    """The process whose average this one shares: with FSDP its own part, else the first one's, all are the same."""
    from accelerate.utils import DistributedType

    return run.accelerator.process_index if run.accelerator.distributed_type == DistributedType.FSDP else 0


def trained_on(run: Run, step: int) -> str:
    """What the FaceSnap file says of its training."""
    config, index = run.config, run.pictures.index
    seen = step * config.gradient_accumulation * config.batch_size * run.accelerator.num_processes
    data = f"{len(index)} pictures of {index.people} people" + (f" ({config.trained_on})" if config.trained_on else "")
    idle = ", the Mixer alone, for tokens behind the text" if config.tokens == "text" else ""
    return f"{data}, {step} steps, {seen} pictures seen, on {config.base.name} from {config.start.name}{idle}"


@torch.no_grad()
def average_networks(run: Run) -> tuple[nn.Module, FFRNet]:
    """The moving average as networks of their own, on the CPU, in the start file's type. All processes take part."""
    parameters = list(run.networks.parameters())
    trained = [parameter.detach().clone() for parameter in parameters]
    for parameter, mean in zip(parameters, run.average):
        parameter.copy_(mean)
    state = run.accelerator.get_state_dict(run.networks)
    state = {key: tensor.detach().to("cpu", run.file_dtype, copy=True) for key, tensor in state.items()}
    for parameter, own in zip(parameters, trained):
        parameter.copy_(own)
    with torch.device("meta"):
        networks = TrainedNetworks(facesnap_file.build_mixer(run.info.mixer), FFRNet(run.info.ffrnet))
    if run.accelerator.is_main_process:  # FSDP gathers there alone
        networks.load_state_dict(state, assign=True)
    networks.eval().requires_grad_(False)
    return networks.mixer, networks.ffrnet


@contextlib.contextmanager
def _progress(run: Run, step: int) -> Iterator[tuple[Any, Any]]:
    """A progress bar, and TensorBoard's writer in the first process."""
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


def _log(board: Any, done: Step, bar: Any) -> None:
    board.add_scalar("loss/total", done.loss, done.number)
    board.add_scalar("loss/diffusion", done.diffusion, done.number)
    if done.id is not None:
        board.add_scalar("loss/id", done.id, done.number)
    board.add_scalar("learning_rate", done.learning_rate, done.number)
    board.add_scalar("grad_norm", done.grad_norm, done.number)
    if bar.format_dict["rate"]:
        board.add_scalar("steps_per_second", bar.format_dict["rate"], done.number)
