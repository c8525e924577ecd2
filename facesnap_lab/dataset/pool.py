"""Work in several processes, with one bar of progress, that ends when one of them or their parent dies."""

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

POLL = 0.2  # seconds between looks at the counts

Work = Callable[[Any, Callable[[], None]], None]
"""Does a job, and calls the function that it is given after each photo. It is a module's, for processes to find."""

Run = Callable[[Work, Sequence[Any], Callable[[int], None]], None]
"""Does all jobs, and tells how many photos were done since it told last."""

# shared with the parent, without locks: a process killed while it holds one would stop all others
_counts: Any = None
_stop: Any = None


@contextmanager
def processes(workers: int, most: int) -> Iterator[Run]:
    """Processes that do jobs until the context ends. The first job that fails stops all of them.

    Args:
        workers: with 0 the work is done in this process.
        most: jobs of one run.

    Raises:
        FaceSnapError: a process died.
    """
    if workers == 0:
        yield _run_here
        return
    context = multiprocessing.get_context("spawn")
    counts, stop = context.RawArray("q", most), context.RawValue("b", 0)
    with ProcessPoolExecutor(min(workers, most), context, _begin, (counts, stop)) as pool:

        def run(work: Work, jobs: Sequence[Any], advance: Callable[[int], None]) -> None:
            told = sum(counts)
            left = {pool.submit(_do, work, job, slot) for slot, job in enumerate(jobs)}
            while left:
                done, left = wait(left, POLL, FIRST_COMPLETED)
                if (now := sum(counts)) > told:
                    advance(now - told)
                    told = now
                for future in done:
                    future.result()

        try:
            yield run
        except BrokenProcessPool as error:
            raise FaceSnapError(
                "A process that builds the data died, as where memory runs out; free memory or take fewer --workers, "
                "and give the command again, it goes on from the shards that are whole."
            ) from error
        finally:
            stop.value = 1
            pool.shutdown(cancel_futures=True)


def _run_here(work: Work, jobs: Sequence[Any], advance: Callable[[int], None]) -> None:
    for job in jobs:
        work(job, lambda: advance(1))


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


def _do(work: Work, job: Any, slot: int) -> None:
    def tick() -> None:
        _counts[slot] += 1
        if _stop.value:
            raise _StoppedError

    work(job, tick)
