"""Train all methods with the same budget, generate and measure their images, and write the report.

A rerun skips what is already finished, and the report is rewritten after each seed.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from facesnap_ext.cache import Cache
from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import atomic_write
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.weights.initialise import with_mixer
from facesnap_lab.evaluation.draw import EvaluationPipeline, Generator, draw_cases
from facesnap_lab.evaluation.measure import RealPhotos, embed_real_photos, measure
from facesnap_lab.evaluation.protocol import Case
from facesnap_lab.rivals.methods import METHODS as RIVALS
from facesnap_lab.table1.generators import Copies, NoPerson, TrainedRival
from facesnap_lab.table1.report import write_report
from facesnap_lab.table1.scores import FACESNAP, weights_of
from facesnap_lab.table1.world import World
from facesnap_lab.training import trainer
from facesnap_lab.training.checkpoints import list_checkpoints
from facesnap_lab.training.config import TrainConfig
from facesnap_lab.training.result_settings import check_settings, result_settings

METHODS = (*RIVALS, FACESNAP)
MIXER = "facial attributes"
TIMED = 8  # images of each method


def run(
    world: World, out: Path, seeds: Sequence[int], minutes: float = math.inf, methods: Sequence[str] = METHODS
) -> Path | None:
    """Run everything that is missing in `out`, and return the path of the table, or None if time runs out first.

    `out` receives `seed-S/METHOD/` (see `trainer.train`), `pictures/` and `scores/`, and the report's files.

    Args:
        minutes: time after which training stops. The images of a seed are generated once all methods are trained with
            it, however long that takes.
        methods: names in `METHODS`.

    Raises:
        FaceSnapError: there are fewer than two people, a seed is not valid, `out` contains a table with different
            settings, or training fails (see `trainer.train`).
    """
    end = time.monotonic() + 60 * minutes
    _check(world, out, seeds)
    real = _real_photos(world)
    _score_all(world, out / "limits", _limits(world), real)
    path = None
    for number, seed in enumerate(seeds, 1):
        folder = out / f"seed-{seed}"
        for method in methods:
            if not _train(world.train, folder, method, seed, end):
                return None
        with tempfile.TemporaryDirectory() as models:
            generators = {method: _generator(world, folder, method, Path(models) / method) for method in methods}
            _score_all(world, folder, generators, real)
            if number == 1 and not (out / "seconds.json").exists():
                seconds = time_in_turns({"no-person": NoPerson(world.base), **generators}, world.protocol.cases())
                _write_json(out / "seconds.json", seconds)
        path = write_report(world, out, seeds[:number], methods)
    return path


def time_in_turns(generators: Mapping[str, Generator], cases: Sequence[Case]) -> dict[str, list[float]]:
    """Let the methods take turns generating the same images, and return the seconds of each.

    Photos are encoded beforehand. Taking turns is fair on a machine whose speed varies.
    """
    seconds: dict[str, list[float]] = {name: [] for name in generators}
    for case in cases[:TIMED]:
        for name, generator in generators.items():
            with generator.installed() as ready:
                ready.draw(case)  # encodes the photos
                began = time.perf_counter()
                ready.draw(case)
                seconds[name].append(round(time.perf_counter() - began, 4))
    return seconds


def _train(config: TrainConfig, folder: Path, method: str, seed: int, end: float) -> bool:
    """Train or resume a method, and return whether its steps are complete."""
    start = folder / "start.safetensors"
    if not start.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with_mixer(config.start, start, MIXER, seed)
    own = replace(config, method=method, seed=seed, start=start, out=folder / method)
    if _steps(own.out) < config.steps:
        minutes = (end - time.monotonic()) / 60
        if minutes <= 0:
            return False
        print(f"seed {seed}: training {method}", flush=True)
        trainer.train(own, resume=True, minutes=minutes)
    return _steps(own.out) >= config.steps


def _steps(folder: Path) -> int:
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1][0] if checkpoints else 0


def _generator(world: World, folder: Path, method: str, models: Path) -> Generator:
    path = weights_of(folder, method)
    if method == FACESNAP:
        files = world.files(path, models)
        return EvaluationPipeline(world.base, Engine(lambda: files), files)
    files = world.files(folder / "start.safetensors", models)
    return TrainedRival(world.base, RIVALS[method].load(path).float(), path, Encoders(Cache(), files))


def _limits(world: World) -> dict[str, Generator]:
    people = world.protocol.identities
    following = {one.name: other for one, other in zip(people, (*people[1:], people[0]))}
    return {
        "copy": Copies(lambda case: case.identity.references[0]),
        "stranger": Copies(lambda case: following[case.identity.name].references[0]),
        "no-person": NoPerson(world.base),
    }


def _real_photos(world: World) -> RealPhotos:
    """Return the features of photos in the reference's look for CLIP-face, and in other looks for the rest."""
    real = embed_real_photos(world.protocol, world.judges)
    return replace(real, clip_faces=embed_real_photos(world.same_look, world.judges).clip_faces)


def _score_all(world: World, folder: Path, generators: Mapping[str, Generator], real: RealPhotos) -> None:
    cases = world.protocol.cases()
    for name, generator in generators.items():
        scores = folder / "scores" / f"{name}.json"
        if scores.exists():
            continue
        generator.check(cases)
        with generator.installed() as ready:
            draw_cases(ready, cases, folder / "pictures" / name)
        found = measure(name, folder / "pictures" / name, world.protocol, world.judges, real)
        content = {
            "by_person": {metric: values.tolist() for metric, values in found.by_person.items()},
            "fid": found.fid,
            "faceless": len(found.without_face or ()),
        }
        _write_json(scores, content)


def _check(world: World, out: Path, seeds: Sequence[int]) -> None:
    """Check the seeds and the number of people, and that `out` contains no table with different settings."""
    if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise FaceSnapError(f"The seeds {seeds} must be different whole numbers from 0 to {2**32 - 1}; correct them.")
    protocol = world.protocol
    if len(protocol.identities) < 2:
        raise FaceSnapError("Table 1 compares images with photos of other people; choose at least two people.")
    settings = result_settings(world.train, ("out", "seed", "method"))
    settings |= {"people": len(protocol.identities), "images": len(protocol.cases()), "base_name": world.base.name}
    settings |= {"poses": [pose.name for pose in protocol.poses], "prompts": [one.text for one in protocol.prompts]}
    check_settings(out, settings, "a table")


def _write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
