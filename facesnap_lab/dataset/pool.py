"""A pool of worker processes with a shared progress bar, which ends when one of them or the parent dies."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from facesnap_ext.errors import FaceSnapError

POLL = 0.2  # seconds between updates of the progress

Work = Callable[[Any, Callable[[], None]], None]
"""Does a job, and calls the passed function after each photo. Must be a module-level function, so that it pickles."""

RunJobs = Callable[[Work, Sequence[Any], Callable[[int], None]], None]
"""Runs all jobs, and calls the last argument with the number of photos done since the previous call."""

# shared with the parent without locks: a process killed while holding a lock would block all others
_counts: Any = None
_stop: Any = None


@contextmanager
def worker_processes(workers: int, max_jobs: int) -> Iterator[RunJobs]:
    """Start processes that run jobs inside the `with` block. The first job that fails stops all of them.

    Args:
        workers: number of processes. With 0, jobs run in the current process.
        max_jobs: the largest number of jobs passed to one call.

    Raises:
        FaceSnapError: a process died.
    """
    if workers == 0:
        yield _run_here
        return
    context = multiprocessing.get_context("spawn")
    counts, stop = context.RawArray("q", max_jobs), context.RawValue("b", 0)
    with ProcessPoolExecutor(min(workers, max_jobs), context, _initialise, (counts, stop)) as pool:

        def run_jobs(work: Work, jobs: Sequence[Any], advance: Callable[[int], None]) -> None:
            reported = sum(counts)
            pending = {pool.submit(_do, work, job, slot) for slot, job in enumerate(jobs)}
            while pending:
                done, pending = wait(pending, POLL, FIRST_COMPLETED)
                if (total := sum(counts)) > reported:
                    advance(total - reported)
                    reported = total
                for future in done:
                    future.result()

        try:
            yield run_jobs
        except BrokenProcessPool as error:
            raise FaceSnapError(
                "A process that builds the data died, possibly because memory ran out; free some memory or reduce "
                "--workers, and run the command again to continue after the finished shards."
            ) from error
        finally:
            stop.value = 1
            pool.shutdown(cancel_futures=True)


def _run_here(work: Work, jobs: Sequence[Any], advance: Callable[[int], None]) -> None:
    for job in jobs:
        work(job, lambda: advance(1))


class _StoppedError(Exception):
    pass


def _initialise(counts: Any, stop: Any) -> None:
    global _counts, _stop
    _counts, _stop = counts, stop
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # insightface uses a deprecated function of scikit-image, which would warn once in each process
    warnings.filterwarnings("ignore", category=FutureWarning, module="insightface")
    import torch

    torch.set_num_threads(1)


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _do(work: Work, job: Any, slot: int) -> None:
    def tick() -> None:
        _counts[slot] += 1
        if _stop.value:
            raise _StoppedError

    work(job, tick)
