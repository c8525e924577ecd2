"""Train and measure the whole second edition with one command, which fits the time that is available.

    python -m facesnap_lab.miniature.second.everything --out DIR --device cuda --minutes 10

The stages run in the order of `STAGES`. Each one gets its share of the minutes that remain, a part of which is left for
loading and measuring. The learning rate of every training falls to its end within that time, so each stage ends with
usable networks, however many of its planned steps fit. What a stage leaves of its time benefits the later ones.

A call that was interrupted can be repeated: stages that have ended are skipped, and the one that was interrupted
resumes from its checkpoint. `DIR/everything.json` lists the ended stages. A stage that `train` has finished there, or
that passed its gate, is skipped too.

A missed gate is written to `DIR/quality.json`, and the next stage starts all the same. The gates are meant to save
hours of training on a CPU. Here, all stages together take minutes, and the figures of all of them tell more than
those of the first that fell short. With `--stop-at-gates`, the command ends at the first missed gate, and the next
call gives that stage more time.

Finally, `pack` writes what must be kept to `DIR/pack`, or another folder, in at most eight files of 16 MiB each.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from facesnap_ext.files import atomic_write
from facesnap_lab.miniature.second import dataset, train
from facesnap_lab.miniature.second.loop import Compute
from facesnap_lab.miniature.second.pack import pack

THREADS = 12  # at most, for preparing batches
TRAINING = 0.8  # share of a stage's time; the rest is for loading and measuring
SEEDS = 1  # of the measurement; more can be drawn later, from the packed files


@dataclass(frozen=True)
class Stage:
    name: str
    share: float  # of the time, relative to the other stages' shares
    batch: int = 1  # on a GPU: multiplies the images of a step, because small networks leave it idle


# the crops of recognition networks and DECA are prepared by the CPU, so larger batches would only make their steps
# fewer
STAGES = (
    Stage("data", 15),
    Stage("vae4", 5, 4),
    Stage("identity", 12),
    Stage("judge", 5),
    Stage("judge_inner", 4),
    Stage("details", 5),
    Stage("clip", 7, 2),
    Stage("detector", 2, 2),
    Stage("deca", 3),
    Stage("base", 16, 8),
    Stage("lightning", 4, 8),
    Stage("host_vae", 3, 4),
    Stage("inputs", 3),
    Stage("facesnap", 14, 8),
    Stage("measure", 6),
)
ALWAYS_FINISHED = ("vae4", "base")  # to be trained as long as possible, even after their gates are passed


def compute_for(stage: Stage, device: str) -> Compute:
    """Return how a stage is trained on a device."""
    cores = os.cpu_count() or 1
    if device == "cpu":
        return Compute(device, workers=cores, anneal=True)
    return Compute(device, stage.batch, threads=min(THREADS, cores), workers=cores, anneal=True)


def minutes_for(position: int, minutes: float) -> float:
    """Return the part of the remaining minutes that belongs to the stage at a position of `STAGES`."""
    return max(0.0, minutes) * STAGES[position].share / sum(stage.share for stage in STAGES[position:])


def has_ended(out: Path, name: str) -> bool:
    """Return whether a stage is skipped."""
    figures = _read(out / "quality.json").get(name, {})
    passed = figures.get("passed", False) and name not in ALWAYS_FINISHED
    return name in _read(out / "everything.json") or bool(figures.get("finished") or passed)


def run(
    out: Path,
    minutes: float,
    device: str,
    parts: Path,
    *,
    stop_at_gates: bool = False,
    functions: Mapping[str, train.RunStage] | None = None,
) -> list[str]:
    """Run all stages that have not ended, and pack the results.

    Args:
        parts: folder for the packed files.
        functions: what each stage does; by default the functions of `train`.

    Returns:
        The names of the stages whose gates were missed.
    """
    functions = functions or {**train.STAGES, "measure": partial(train.run_measure, seeds=SEEDS)}
    end, missed = time.monotonic() + 60 * minutes, []
    for position, stage in enumerate(STAGES):
        if not _is_needed(out, position):
            continue
        began = time.monotonic()
        given = minutes_for(position, (end - began) / 60)
        print(f"{stage.name}: {given:.1f} minutes", flush=True)
        functions[stage.name](out, TRAINING * given, compute_for(stage, device))
        failed = _read(out / "quality.json").get(stage.name, {}).get("passed") is False
        if failed:
            missed.append(stage.name)
            if stop_at_gates:
                print(f"{stage.name} missed its gate; see {out / 'quality.json'}", flush=True)
                break
        _end(out, stage.name, given, (time.monotonic() - began) / 60)
        if stage.name == "facesnap":
            pack(out, parts)  # the measurement may be interrupted
    pack(out, parts)
    return missed


def _is_needed(out: Path, position: int) -> bool:
    """Return whether a stage has to run. The images are needed by every training that has not ended."""
    name = STAGES[position].name
    if name != "data":
        return not has_ended(out, name)
    trainings = [stage.name for stage in STAGES if stage.name not in ("data", "facesnap", "measure")]
    if all(has_ended(out, training) for training in trainings):
        return False
    rendered = all((out / "data" / split / "progress.json").exists() for split in dataset.PEOPLE)
    return not (has_ended(out, name) and rendered)


def _end(out: Path, name: str, given: float, used: float) -> None:
    file = out / "everything.json"
    ended = _read(file) | {name: {"given": round(given, 2), "used": round(used, 2)}}
    with atomic_write(file) as part:
        part.write_text(json.dumps(ended, indent=2) + "\n", encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train and measure the whole second edition.")
    parser.add_argument("--out", type=Path, required=True, help="folder of all stages")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stop-at-gates", action="store_true", help="end at the first gate that is missed")
    parser.add_argument("--pack", type=Path, help="folder for the packed files (default: DIR/pack)")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.set_float32_matmul_precision("high")  # TF32
    gates_missed = run(
        options.out,
        options.minutes,
        options.device,
        options.pack or options.out / "pack",
        stop_at_gates=options.stop_at_gates,
    )
    print(f"gates missed: {', '.join(gates_missed) or 'none'}")
