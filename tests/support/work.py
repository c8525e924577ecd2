"""Tasks for the tests of `facesnap_lab.workers`, in a module that processes import quickly."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from facesnap_ext.errors import FaceSnapError

if TYPE_CHECKING:
    from facesnap_lab.dataset.jobs import Job


def square(number: int) -> int:
    return number**2


def fail(number: int) -> None:
    raise FaceSnapError(f"Task {number} fails; nothing can be done.")


def fail_or_hang(number: int) -> None:
    if number == 0:
        fail(number)
    time.sleep(90)


def die(deaths: tuple[Path, int]) -> str:
    """Kill the process, unless it has been done so often before that `deaths` files are in the folder."""
    folder, times = deaths
    before = len(list(folder.iterdir()))
    if before < times:
        (folder / str(before)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return f"alive after {before} deaths"


def build_after_death(deaths: Path, job: Job) -> None:
    """Build a shard with one thread, but kill the process that does shard 1 for the first time."""
    import torch

    from facesnap_lab.dataset.jobs import build_shard

    assert torch.get_num_threads() == 1
    if job.planned.number == 1:
        die((deaths, 1))
    build_shard(job)


def sleep(argument: tuple[Path, float]) -> None:
    folder, seconds = argument
    (folder / str(os.getpid())).touch()
    time.sleep(seconds)
