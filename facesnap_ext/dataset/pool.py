"""Work in several processes, with one bar of progress, that ends when one of them or their parent dies."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from facesnap_ext.errors import FaceSnapError

T = TypeVar("T")
POLL = 0.2  # seconds between looks at the counts

# shared with the parent, without locks: a process killed while it holds one would stop all others
_counts: Any = None
_stop: Any = None


def run_all(
    work: Callable[[T, Callable[[], None]], None], jobs: Sequence[T], workers: int, advance: Callable[[int], None]
) -> None:
    """Do `work(job, tick)` for all jobs; it calls `tick` after each photo.

    Args:
        work: a function of a module, for other processes to find.
        workers: processes; with 0 the work is done in this one.
        advance: told how many photos were done since it was told last.

    Raises:
        FaceSnapError: that of the first job to fail, or a process died. The other jobs are stopped.
    """
    if workers == 0:
        for job in jobs:
            work(job, lambda: advance(1))
        return
    context = multiprocessing.get_context("spawn")
    counts, stop = context.RawArray("q", len(jobs)), context.RawValue("b", 0)
    told = 0
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _begin, (counts, stop)) as pool:
        try:
            left = {pool.submit(_do, work, job, slot) for slot, job in enumerate(jobs)}
            while left:
                done, left = wait(left, POLL, FIRST_COMPLETED)
                if (now := sum(counts)) > told:
                    advance(now - told)
                    told = now
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise FaceSnapError(
                "A process that builds the data died, as where memory runs out; free memory or take fewer --workers, "
                "and give the command again, it goes on from the shards that are whole."
            ) from error
        finally:
            stop.value = 1
            pool.shutdown(cancel_futures=True)


class _StoppedError(Exception):
    pass


def _begin(counts: Any, stop: Any) -> None:
    global _counts, _stop
    _counts, _stop = counts, stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # insightface calls what scikit-image will one day rename, once in each process
    warnings.filterwarnings("ignore", category=FutureWarning, module="insightface")
    import torch

    torch.set_num_threads(1)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _do(work: Callable[[T, Callable[[], None]], None], job: T, slot: int) -> None:
    def tick() -> None:
        _counts[slot] += 1
        if _stop.value:
            raise _StoppedError

    work(job, tick)
