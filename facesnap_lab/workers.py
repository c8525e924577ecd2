"""Where the lab's work runs: in this process, in processes of this machine, or on the workers of a dask cluster.

The results of a task must depend only on its argument, so that they are the same everywhere. Local processes use only
the standard library. Processes and workers run one task at a time, with one thread.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any

from facesnap_ext.errors import FaceSnapError, reason_of

ATTEMPTS = 3  # how many local processes may die while they do one task; on a cluster, the scheduler decides
SUBMITTED = 2000  # maximum number of tasks that a scheduler gets at once, because it keeps them in memory
GPU = "GPU"  # the resource of dask workers with a GPU
PACKAGES = (
    *("insightface", "numpy", "onnxruntime", "onnxruntime-gpu", "opencv-python", "opencv-python-headless", "Pillow"),
    *("scikit-image", "sd-webui-facesnap", "torch", "transformers", "webdataset"),
)
"""Packages on which results depend, and whose versions must therefore be the same on all machines."""


@dataclass(frozen=True)
class Task:
    """One call of a function with an argument. name: for error messages. size: what it adds to the progress."""

    name: str
    size: int
    argument: Any


Work = Callable[[Any], Any]
"""Does a task, given its argument. Must be a module-level function, so that it pickles."""

RunTasks = Callable[[Work, Sequence[Task], Callable[[int], Any]], list[Any]]
"""Runs tasks in any order, calls the last argument with the size of each when it is done, and returns the results in
the order of the tasks. The first error stops all of them."""


@contextmanager
def open_workers(count: int, scheduler: str = "", gpu: bool = False) -> Iterator[RunTasks]:
    """Start or find workers that run tasks inside the `with` block.

    Args:
        count: number of local processes. With 0, tasks run in the current process.
        scheduler: address of a dask scheduler, such as "tcp://10.0.0.1:8786", whose workers are used instead.
        gpu: run tasks only where a GPU is: in one process per local GPU, or on the cluster's workers with the resource
            `GPU`. With at most one local GPU, the current process is used.

    Raises:
        FaceSnapError: the cluster cannot be used, or several processes died while they were doing the same task.
    """
    if scheduler:
        with _cluster(scheduler, gpu) as run_tasks:
            yield run_tasks
        return
    if gpu:
        import torch

        count = torch.cuda.device_count() if torch.cuda.device_count() > 1 else 0
    if count == 0:
        yield run_here
    else:
        with _processes(count) as run_tasks:
            yield run_tasks


def run_here(work: Work, tasks: Sequence[Task], advance: Callable[[int], Any]) -> list[Any]:
    """Run tasks in the current process, in their order."""
    results = []
    for task in tasks:
        results.append(work(task.argument))
        advance(task.size)
    return results


@contextmanager
def _processes(count: int) -> Iterator[RunTasks]:
    """Each process belongs to an executor of its own: if it dies, only its own task has to be done again."""
    context = multiprocessing.get_context("spawn")
    stop, stopper = context.Pipe(duplex=False)
    pools: list[ProcessPoolExecutor | None] = [None] * count
    idle: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(count):
        idle.put(number)

    def run_task(work: Work, task: Task) -> Any:
        number = idle.get()
        try:
            for _ in range(ATTEMPTS):
                pool = pools[number] = pools[number] or ProcessPoolExecutor(1, context, _initialise, (stop, number))
                try:
                    return pool.submit(_do, work, task.argument).result()
                except BrokenProcessPool:
                    if stopper.closed:
                        raise
                    pools[number] = None
            raise _deaths(task, "the process that worked on it", f"died {ATTEMPTS} times")
        finally:
            idle.put(number)

    def run_tasks(work: Work, tasks: Sequence[Task], advance: Callable[[int], Any]) -> list[Any]:
        futures = [threads.submit(run_task, work, task) for task in tasks]
        sizes = {future: task.size for future, task in zip(futures, tasks)}
        running = set(futures)
        while running:
            done, running = wait(running, 1, FIRST_COMPLETED)  # without a timeout, Windows ignores Ctrl-C
            for future in done:
                future.result()
                advance(sizes[future])
        return [future.result() for future in futures]

    threads = ThreadPoolExecutor(count)
    try:
        yield run_tasks
    finally:
        stopper.close()  # ends all processes
        threads.shutdown(cancel_futures=True)
        for pool in filter(None, pools):
            pool.shutdown()
        stop.close()


def _deaths(task: Task, who: str, what: str) -> FaceSnapError:
    return FaceSnapError(
        f"{task.name} cannot be finished, because {who} {what}, possibly because memory ran out; free some memory or "
        "use fewer workers, and run the command again to continue."
    )


_number = 0


def local_gpu() -> int:
    """Return which GPU of the machine this process should use."""
    import torch

    return _number % max(1, torch.cuda.device_count())


def _initialise(stop: Any, number: int) -> None:
    global _number
    _number = number
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the others
    threading.Thread(target=_exit_when_stopped, args=(stop,), daemon=True).start()


def _exit_when_stopped(stop: Any) -> None:
    with suppress(OSError, EOFError):
        stop.poll(None)  # returns when the parent closes the other end, or dies
    os._exit(1)


def _do(work: Work, argument: Any) -> Any:
    """Do a task with one thread."""
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"))  # read when torch is imported
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    # insightface uses a deprecated function of scikit-image, which would warn once in each process
    warnings.filterwarnings("ignore", category=FutureWarning, module="insightface")
    return work(argument)


@contextmanager
def _cluster(address: str, gpu: bool) -> Iterator[RunTasks]:
    try:
        from distributed import Client, KilledWorker, as_completed
        from distributed.client import FutureCancelledError
    except ImportError as error:
        raise FaceSnapError(
            "Work on a cluster requires dask; install it with: pip install distributed (in the extra 'scale')."
        ) from error
    try:
        client = Client(address, set_as_default=False)
    except (OSError, ValueError) as error:
        raise FaceSnapError(
            f"The scheduler {address} cannot be reached ({reason_of(error)}); check that it is running."
        ) from error
    versions = _versions()

    def run_tasks(work: Work, tasks: Sequence[Task], advance: Callable[[int], Any]) -> list[Any]:
        remaining = iter(enumerate(tasks))
        numbers: dict[Any, int] = {}
        results: list[Any] = [None] * len(tasks)
        running = as_completed(loop=client.loop)

        def submit_next() -> None:
            number, task = next(remaining, (0, None))
            if task is not None:
                resources = {GPU: 1} if gpu else None
                future = client.submit(_work_on_cluster, work, task.argument, versions, resources=resources, pure=False)
                numbers[future] = number
                running.add(future)

        try:
            for _ in range(SUBMITTED):
                submit_next()
            for future in running:
                number = numbers[future]
                try:
                    results[number] = future.result()
                except KilledWorker as error:
                    raise _deaths(tasks[number], "workers", f"died while they were doing it ({address})") from error
                except (FutureCancelledError, CancelledError) as error:
                    raise FaceSnapError(
                        f"The scheduler {address} lost {tasks[number].name} ({reason_of(error)}); check that it is "
                        "running, and run the command again to continue."
                    ) from error
                del numbers[future]
                advance(tasks[number].size)
                submit_next()
        finally:
            client.cancel(list(numbers))
        return results

    with client:
        if gpu:
            workers = client.scheduler_info(n_workers=-1)["workers"].values()
            if not any(worker["resources"].get(GPU) for worker in workers):
                raise FaceSnapError(
                    f'No worker of {address} has the resource {GPU}; start one with: dask worker --resources "{GPU}=1".'
                )
        yield run_tasks


_one_at_a_time = threading.Lock()


def _work_on_cluster(work: Work, argument: Any, versions: dict[str, str]) -> Any:
    own = _versions()
    for package in versions | own:
        if own.get(package) != versions.get(package):
            raise FaceSnapError(
                f"The worker on {socket.gethostname()} has {package} {own.get(package, '(not installed)')}, but the "
                f"command has {versions.get(package, '(not installed)')}; install the same version on all machines."
            )
    with _one_at_a_time:  # the worker may have several threads
        return _do(work, argument)


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
