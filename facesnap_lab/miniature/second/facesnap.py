"""FaceSnap's training in the second edition: its shards, start file and settings, and a run that fits a time.

A reference and its target share a look, so the tokens have to carry hair, glasses and beard as well as the face.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from facesnap_ext.files import atomic_write
from facesnap_lab.miniature.second import dataset, lightning
from facesnap_lab.miniature.second.base import captions_of
from facesnap_lab.miniature.second.dataset import SHOTS
from facesnap_lab.miniature.second.loop import CPU, Compute
from facesnap_lab.miniature.second.render import SIDE
from facesnap_lab.miniature.shards import PER_SHARD, Source, samples
from facesnap_lab.miniature.start import SETTINGS, write_start
from facesnap_lab.training import estimate, trainer
from facesnap_lab.training.checkpoints import WEIGHTS, list_checkpoints
from facesnap_lab.training.config import TrainConfig, read_config
from facesnap_lab.training.shard_writer import write_shard
from facesnap_lab.workers import Task, open_workers

FILE = "facesnap.safetensors"  # in the folder `facesnap`: the weights of the last checkpoint
MARGIN = 0.9  # share of the time that the planned steps fill
CHECKPOINTS = 10  # of a run that fits a time
CHANGES: dict[str, Any] = {
    "resolution": SIDE,
    "landmark_jitter": 1.4,
    "batch_size": 6,
    "lightning_scale": lightning.SCALE,
    "id_weight": 0.2,
    "id_start": 5000,
    "steps": 12_000,
    "trained_on": "the second edition of FaceSnap's miniature world",
}
ABLATION: dict[str, Any] = {  # what the ablation changes; docs/ablation.md explains the numbers
    "steps": 1200,
    "warm_up": 2400,
    "id_start": 1200,
    "seeds": list(range(6)),
    "people": 200,
    "sample_every": 0,
    "save_every": 600,
}


def write_inputs(out: Path, workers: int = 1) -> Path:
    """Write `out/shards`, the few-step UNet `out/lightning/unet` and, in `out/facesnap`, `start.safetensors` and
    `train.yaml`; return the latter.

    Shards that exist are kept. `ablation.yaml` is for `facesnap ablation`.

    Args:
        out: folder of all stages; `identity`, `clip`, `base` and `lightning` must be complete.
        workers: number of processes that write shards.
    """
    folder = out / "facesnap"
    folder.mkdir(exist_ok=True)
    images = len(dataset.load(out / "data" / "train").pictures)
    per_shard = SHOTS * math.ceil(PER_SHARD / SHOTS)  # so that no person is split
    tasks = [
        Task(f"shard {number}", 1, (out, number, slice(first, min(first + per_shard, images))))
        for number, first in enumerate(range(0, images, per_shard))
    ]
    with open_workers(workers if workers > 1 else 0) as run_tasks:
        run_tasks(_write_shard, tasks, lambda _: None)
    merged = out / "lightning" / "unet"  # a step of L_id is a quarter faster than with the LoRA beside the base
    lightning.load_few_step(out).pipe.unet.half().save_pretrained(merged)
    file = write_start(
        out / "base" / "pipeline",
        out / "clip" / "model",
        out / "identity",
        out / "shards",
        folder,
        merged,
        SETTINGS | CHANGES,
    )
    settings = json.loads(file.read_text(encoding="utf-8")) | ABLATION | {"stages": str(out.resolve())}
    _write(folder / "ablation.yaml", {name: value for name, value in settings.items() if name != "out"})
    return file


def _write_shard(argument: tuple[Path, int, slice]) -> None:
    """Write the shard of some rows of the training split, unless it exists."""
    out, number, rows = argument
    file = out / "shards" / f"shard-{number:06d}.tar"
    if file.exists():
        return
    world = dataset.load(out / "data" / "train")
    people = [f"{p:06d}-{look}" for p, look in zip(world.people[rows].tolist(), world.looks[rows].tolist())]
    captions = captions_of("train", range(rows.start, rows.stop))
    parts = (values[rows] for values in (world.pictures, world.masks, world.points, world.boxes))
    write_shard(file, samples(Source(*parts, captions, people), out / "identity", seed=number))


def train(out: Path, *, minutes: float, compute: Compute = CPU) -> tuple[int, int]:
    """Train or resume FaceSnap with `out/facesnap/train.yaml`, and copy its weights to `out/facesnap/FILE`.

    With `compute.anneal`, the first call measures the speed and lowers the number of steps in `train.yaml` to what
    fits the minutes, so that the learning rate reaches its end. It also applies the factor of the batch.

    Returns:
        The number of steps, and the number of planned steps.
    """
    end = time.monotonic() + 60 * minutes
    file = out / "facesnap" / "train.yaml"
    if compute.anneal and not list_checkpoints(read_config(file).out):
        _plan(file, end, compute)
    config = read_config(file)
    checkpoint = trainer.train(config, resume=True, minutes=(end - time.monotonic()) / 60)
    with atomic_write(out / "facesnap" / FILE) as part:
        shutil.copyfile(checkpoint / WEIGHTS, part)
    return list_checkpoints(config.out)[-1][0], config.steps


def _plan(file: Path, end: float, compute: Compute) -> None:
    """Change the settings in `train.yaml` for a run that ends before a time of the monotonic clock."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    recommended = SETTINGS | CHANGES  # not those of the file, which an interrupted call may have changed
    settings |= {name: compute.batch * recommended[name] for name in ("batch_size", "id_rows")}
    settings |= {"workers": compute.threads, "steps": recommended["steps"]}
    _write(file, settings)
    seconds = seconds_per_step(read_config(file))
    steps = max(1, min(settings["steps"], int(MARGIN * (end - time.monotonic()) / seconds)))
    every = max(1, steps // CHECKPOINTS)
    settings |= {"steps": steps, "save_every": every, "sample_every": steps, "warmup": min(100, steps // 10)}
    settings["id_start"] = recommended["id_start"] * steps // recommended["steps"]
    _write(file, settings)


def seconds_per_step(config: TrainConfig) -> float:
    """Measure a few steps."""
    found = estimate.estimate(replace(config, sample_every=0, save_every=config.steps))
    return float(found["rates"]["step"])


def _write(file: Path, settings: dict[str, Any]) -> None:
    with atomic_write(file) as part:
        part.write_text(json.dumps(settings, indent=2), encoding="utf-8")
