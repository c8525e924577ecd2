"""Build the same miniature photos in one process, in several, and on a cluster, and compare the shards.

python -m facesnap_lab.benchmarks.build OUT --photos 20000

The last build runs on a cluster of two nodes on this machine, each a `dask worker` command, one of which is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from facesnap_ext.identity.faces import NoFaceError, find_faces
from facesnap_ext.photos import from_path
from facesnap_ext.weights.search import find_models
from facesnap_lab.dataset.build import build
from facesnap_lab.dataset.images import NetworkFiles, Settings, load_networks
from facesnap_lab.markdown import markdown_table
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.render import render
from facesnap_lab.miniature.world import person, scene
from facesnap_lab.workers import Task, open_workers

SHOTS = 8  # photos of each person
SIDE = 64
SETTINGS = Settings(resolution=SIDE, min_face=16, min_score=0.7)
PER_SHARD = 50


def write_person(argument: tuple[Path, int]) -> None:
    folder, index = argument
    who = person("test", index)
    if (folder / f"n{index:06d}" / f"{SHOTS - 1:04d}_01.txt").exists():  # written last
        return
    (folder / f"n{index:06d}").mkdir(parents=True, exist_ok=True)
    for shot, rendering in enumerate(render([who] * SHOTS, [scene(who, shot) for shot in range(SHOTS)], SIDE)):
        path = folder / f"n{index:06d}" / f"{shot:04d}_01.png"
        Image.fromarray(rendering.picture).save(path)
        path.with_suffix(".txt").write_text("a portrait", encoding="utf-8")


def detect(argument: tuple[NetworkFiles, Path]) -> None:
    """Only find the faces in a person's photos."""
    files, folder = argument
    pack = load_networks(files, "cpu").pack
    for path in folder.glob("*.png"):
        with contextlib.suppress(NoFaceError):
            find_faces(pack, from_path(path))


@contextlib.contextmanager
def two_nodes(processes: int) -> Iterator[tuple[str, subprocess.Popen]]:
    """Start a dask scheduler and two nodes, and yield the scheduler's address and the second node."""
    port, dask = "38786", [sys.executable, "-m", "dask"]
    address = f"tcp://127.0.0.1:{port}"
    worker = [*dask, "worker", address, "--nworkers", str(processes), "--nthreads", "1", "--no-dashboard"]
    commands = ([*dask, "scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"], worker, worker)
    started = [subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL) for command in commands]
    try:
        yield address, started[2]
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()


def kill_after(node: subprocess.Popen, out: Path, shards: int) -> threading.Thread:
    """Kill a node as soon as a build has finished some shards."""

    def wait_and_kill() -> None:
        while len(list(out.glob("work/shard-*.json"))) < shards:
            time.sleep(0.05)
        os.killpg(node.pid, signal.SIGKILL)

    thread = threading.Thread(target=wait_and_kill, daemon=True)
    thread.start()
    return thread


def digest(folder: Path) -> str:
    """Return a hash of all shards."""
    shards = (path.read_bytes() for path in sorted(folder.glob("shard-*.tar")))
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in shards)).hexdigest()


def measure(run: Callable[[], object], photos: int) -> list[str]:
    """Return photos per second, and CPU time per photo of this process and of those that it started and that ended."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    before, began = cpu(), time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    return [f"{photos / seconds:.0f}", f"{1000 * (cpu() - before) / photos:.0f} ms"]


def compare(out: Path, photos: int, processes: Sequence[int]) -> str:
    """Write photos, build them everywhere, and return a table.

    Raises:
        RuntimeError: two builds have different shards.
    """
    folder, models = out / "photos", out / "models"
    people = -(-photos // SHOTS)
    photos = people * SHOTS
    if not models.exists():
        shipped.write_models(models)
    with open_workers(max(processes)) as run_tasks:
        run_tasks(write_person, [Task("photos", SHOTS, (folder, index)) for index in range(people)], lambda size: None)
    found = find_models(models)
    files = NetworkFiles(*(found.require(part) for part in ("face_pack", "deca", "flame")))
    rows: list[tuple[str, list[str]]] = []
    digests: dict[str, str] = {}

    detected = sorted(folder.iterdir())[:: min(4, people)]

    def detect_some() -> None:
        with open_workers(1) as run_tasks:
            tasks = [Task("photos", SHOTS, (files, path)) for path in detected]
            run_tasks(detect, tasks, lambda size: None)

    def build_into(name: str, workers: int = 1, scheduler: str = "") -> None:
        target = out / name.replace(" ", "-")
        shutil.rmtree(target, ignore_errors=True)
        build([folder], target, models, SETTINGS, PER_SHARD, workers=workers, scheduler=scheduler)
        digests[name] = digest(target)

    def build_on_nodes(name: str) -> None:
        shutil.rmtree(out / name.replace(" ", "-"), ignore_errors=True)  # else its files would end the node at once
        with two_nodes(max(1, max(processes) // 2)) as (address, node):
            kill_after(node, out / name.replace(" ", "-"), max(1, photos // PER_SHARD // 3))
            build_into(name, scheduler=address)
            if node.poll() is None:
                raise RuntimeError("the build ended before the node could be killed")

    def add_row(name: str, run: Callable[[], object], measured: int = photos) -> None:
        rows.append((name, measure(run, measured)))
        print(*rows[-1][1], name, flush=True)

    add_row("only the detector, in one process", detect_some, SHOTS * len(detected))
    for count in processes:
        name = f"{count} process{'es' if count > 1 else ''}"
        add_row(name, lambda name=name, count=count: build_into(name, count))
    nodes = "two nodes of which one is killed"
    add_row(nodes, lambda: build_on_nodes(nodes))
    if len(set(digests.values())) > 1:
        raise RuntimeError(f"the shards differ: {digests}")
    return "\n".join(markdown_table(["photos/s", "CPU time per photo"], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare builds in one process, in several, and on a cluster.")
    parser.add_argument("out", type=Path, help="folder for photos and shards")
    parser.add_argument("--photos", type=int, default=20_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    print(compare(options.out, options.photos, options.processes))
