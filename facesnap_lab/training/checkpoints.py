"""Checkpoints on the disk: whole or not there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from facesnap_ext.errors import FaceSnapError

_NAME = re.compile(r"step-(\d{7,})")
WEIGHTS = "facesnap.safetensors"  # in each checkpoint: the moving average, as users load it


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints in a run's folder, oldest first."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found)


def unfinished(folder: Path, step: int) -> Path:
    return folder / f".step-{step:07d}.part"


def finish(folder: Path, step: int, keep: int) -> Path:
    """Give a checkpoint, now that all its files are written, its name; then remove the oldest beyond `keep`."""
    target = folder / f"step-{step:07d}"
    if target.exists():
        shutil.rmtree(target)
    unfinished(folder, step).rename(target)
    for _, old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def save_error(folder: Path, step: int, error: Exception) -> FaceSnapError:
    """The error for the user when the checkpoint of a step could not be written; what there is of it goes."""
    shutil.rmtree(unfinished(folder, step), ignore_errors=True)
    return FaceSnapError(
        f"The checkpoint of step {step} cannot be written to {folder} ({' '.join(str(error).split())}): make room and "
        f"resume; {last_good(folder)}."
    )


def last_good(folder: Path) -> str:
    """Which checkpoint there is, as the end of a sentence."""
    found = list_checkpoints(folder)
    return f"the last good checkpoint is {found[-1][1]}" if found else "there is no checkpoint yet"


def prepare_out(folder: Path, resume: bool) -> None:
    """Make the run's folder, and remove what a killed run left half-written.

    Raises:
        FaceSnapError: there is something in it and it is not to be resumed, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        filled = any(folder.iterdir())
        if filled and not resume:
            raise FaceSnapError(f"{folder} is not empty; resume the run in it with --resume, or name another 'out'.")
        for part in folder.glob(".step-*.part"):
            shutil.rmtree(part)
    except OSError as error:
        raise FaceSnapError(f"{folder} cannot be written to ({error}); name another 'out'.") from error


def guarded(folder: Path, step: int, write: Callable[[], None]) -> None:
    """Run `write`, and turn a failure of the disk into the error for the user.

    safetensors and torch raise errors of their own, both RuntimeErrors or close to it, where a write fails.
    """
    from safetensors import SafetensorError

    try:
        write()
    except (OSError, RuntimeError, SafetensorError) as error:
        raise save_error(folder, step, error) from error
