"""Checkpoints of a training run: written completely or not at all, and read back to resume."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.weights import facesnap_file
from facesnap_lab.rivals.method import Rival
from facesnap_lab.storage import Url, upload_folder
from facesnap_lab.training import uploads
from facesnap_lab.training.run import Run

_NAME = re.compile(r"step-(\d{7,})")
WEIGHTS = "facesnap.safetensors"  # file in each checkpoint: the moving average; a rival's has the method's name


def prepare_out(folder: Path, resume: bool) -> None:
    """Create the run's folder, and remove incomplete checkpoints that a killed run left in it.

    Raises:
        FaceSnapError: the folder is not empty although the run is not resumed, or it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume and any(folder.iterdir()):
            raise FaceSnapError(
                f"{folder} is not empty; resume the run in it with --resume, or choose another folder for 'out'."
            )
        for part in folder.glob(".step-*.part"):
            shutil.rmtree(part)
    except OSError as error:
        raise FaceSnapError(
            f"The folder {folder} is not writable ({error}); choose another folder for 'out'."
        ) from error


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return steps and folders of the checkpoints in a run's folder, oldest first."""
    matches = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in matches)


def partial_folder(folder: Path, step: int) -> Path:
    """Return the folder that a step's checkpoint is written to until it is complete."""
    return folder / f".step-{step:07d}.part"


def finish(folder: Path, step: int, keep: int) -> Path:
    """Rename a completely written checkpoint to its final name, then remove all but the newest `keep`."""
    target = folder / f"step-{step:07d}"
    if target.exists():
        shutil.rmtree(target)
    partial_folder(folder, step).rename(target)
    for _, old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def describe_last(folder: Path) -> str:
    """Name the last checkpoint, as the end of a sentence."""
    checkpoints = list_checkpoints(folder)
    return f"the last good checkpoint is {checkpoints[-1][1]}" if checkpoints else "there is no checkpoint yet"


def save_checkpoint(run: Run, step: int) -> None:
    """Write a checkpoint: everything needed to resume, and the FaceSnap file.

    Raises:
        FaceSnapError: the disk is full or fails. Earlier checkpoints stay intact.
    """
    accelerator, out = run.accelerator, run.config.out
    networks = average_networks(run)
    folder = partial_folder(out, step)

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        accelerator.save_state(str(folder / "state"))
        if accelerator.process_index == _average_owner(run):
            torch.save(run.average, folder / f"average-{accelerator.process_index}.pt")
        if accelerator.is_main_process:
            info = replace(run.info, license=run.config.license, trained_on=trained_on(run, step))
            if isinstance(networks, Rival):
                networks.save(folder / f"{networks.name}.safetensors", info)
            else:
                facesnap_file.save(folder / WEIGHTS, info, networks.mixer, networks.ffrnet)

    _write_or_discard(out, step, write)
    accelerator.wait_for_everyone()
    if run.config.upload is not None:
        _upload(run, run.config.upload, step)
    if accelerator.is_main_process:
        _write_or_discard(out, step, lambda: finish(out, step, run.config.keep))
    accelerator.wait_for_everyone()


def _upload(run: Run, url: Url, step: int) -> None:
    """Upload a completely written checkpoint before it gets its final name, so that none in `out` is newer."""
    accelerator, folder = run.accelerator, partial_folder(run.config.out, step)
    if accelerator.is_local_main_process:
        upload_folder(url / f"step-{step:07d}", folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        uploads.finish(url, run.config.out, step, run.config.keep)


def _write_or_discard(folder: Path, step: int, write: Callable[[], object]) -> None:
    """Run `write`. If it fails, remove the incomplete checkpoint and raise an error for the user.

    When a write fails, safetensors and torch raise their own errors, which are RuntimeErrors or similar.
    """
    from safetensors import SafetensorError

    try:
        write()
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial_folder(folder, step), ignore_errors=True)
        raise FaceSnapError(
            f"The checkpoint of step {step} cannot be written to {folder} ({' '.join(str(error).split())}): free some "
            f"disk space and resume; {describe_last(folder)}."
        ) from error


def load_checkpoint(run: Run) -> int:
    """Load the last checkpoint and return its step, or 0 if there is none yet.

    Raises:
        FaceSnapError: the checkpoint cannot be read, or belongs to different networks.
    """
    checkpoints = list_checkpoints(run.config.out)
    if not checkpoints:
        return 0
    step, folder = checkpoints[-1]
    _check_sharding(run, folder)
    rates = [group["rate"] for group in run.optimizer.param_groups]
    try:
        run.accelerator.load_state(str(folder / "state"))
        for group, rate in zip(run.optimizer.param_groups, rates):
            group["rate"] = rate  # `mixer_rate` may have been changed since
        average = torch.load(folder / f"average-{_average_owner(run)}.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for own, saved in zip(run.average, average, strict=True):
                own.copy_(saved)
    except Exception as error:  # pickle, torch, safetensors and accelerate each raise their own errors
        raise FaceSnapError(
            f"The checkpoint {folder} cannot be resumed ({reason_of(error)}); remove it to resume from the previous "
            "one."
        ) from error
    return step


def _check_sharding(run: Run, folder: Path) -> None:
    """Check that the processes of this run can read the checkpoint.

    Raises:
        FaceSnapError: it consists of the shards of FSDP or DeepSpeed, and this run has different ones.
    """
    state, accelerator = folder / "state", run.accelerator
    saved = "FSDP" if any(state.glob("*_fsdp_*")) else "DeepSpeed" if (state / "pytorch_model").is_dir() else ""
    processes = len(list(state.glob("random_states_*.pkl")))
    own = _sharding(run)
    if saved != own or (saved and processes != accelerator.num_processes):
        raise FaceSnapError(
            f"The checkpoint {folder} was written by {_processes(processes, saved)}, but this run has "
            f"{_processes(accelerator.num_processes, own)}; resume it with the same configuration of accelerate, or "
            f"start a new run from its {WEIGHTS}."
        )


def _sharding(run: Run) -> str:
    """Return what divides networks and optimizer among the processes, or "" if every process has all of them."""
    from accelerate.utils import DistributedType

    names = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}
    return names.get(run.accelerator.distributed_type, "")


def _processes(count: int, sharding: str) -> str:
    return f"{count} process{'es' if count > 1 else ''} with{f' {sharding}' if sharding else 'out sharding'}"


def _average_owner(run: Run) -> int:
    """Return which process saves the average: with FSDP, which shards it, this one; otherwise the first."""
    return run.accelerator.process_index if _sharding(run) == "FSDP" else 0


def trained_on(run: Run, step: int) -> str:
    """Describe the training for the FaceSnap file's metadata."""
    config, index = run.config, run.images.index
    seen = step * config.gradient_accumulation * config.batch_size * run.accelerator.num_processes
    data = f"{len(index)} images of {index.people} people" + (f" ({config.trained_on})" if config.trained_on else "")
    ablation = ", only the Mixer, with its tokens appended to the text" if config.tokens == "text" else ""
    return f"{data}, {step} steps, {seen} images seen, on {config.base.name} from {config.start.name}{ablation}"


@torch.no_grad()
def average_networks(run: Run) -> nn.Module:
    """Return the moving average on the CPU, in the start file's dtype.

    All processes must call this; with FSDP, only the main process gets weights.
    """
    parameters = list(run.networks.parameters())
    trained = [parameter.detach().clone() for parameter in parameters]
    for parameter, mean in zip(parameters, run.average):
        parameter.copy_(mean)
    state = run.accelerator.get_state_dict(run.networks)
    state = {key: tensor.detach().to("cpu", run.file_dtype, copy=True) for key, tensor in state.items()}
    for parameter, own in zip(parameters, trained):
        parameter.copy_(own)
    with torch.device("meta"):
        networks = run.build()
    if run.accelerator.is_main_process:  # FSDP gathers the weights only in the main process
        networks.load_state_dict(state, assign=True)
    return networks.eval().requires_grad_(False)
