"""The paper's ablations, trained, drawn and judged in the miniature world.

Every training of a seed has the same budget, the same pictures and noise in the same order, and starts from the same
numbers. Every picture of a person is drawn from the same reference, driving photo, prompt and noise. What is finished
is not done again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import atomic_write
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.initialise import with_mixer
from facesnap_lab.ablation.pictures import METRICS, REFERENCE_SHOTS, Studio, compare, draw, limits
from facesnap_lab.ablation.report import Scores, people_sheet, results, write_report
from facesnap_lab.ablation.rows import Row, Training, all_rows, trainings
from facesnap_lab.evaluation import metrics
from facesnap_lab.evaluation.draw import processes
from facesnap_lab.training import checkpoints, trainer
from facesnap_lab.training.config import TrainConfig, from_fields, read_fields

OWN = ("out", "seed", "landmarks", "tokens")  # fields of training that the ablation sets
WITHOUT_EFFECT = (  # on the results
    *("log_every", "save_every", "keep", "sample_every", "sample_count", "sample_steps", "sample_scale"),
    *("workers", "gradient_checkpointing", "license", "trained_on", *OWN),
)


@dataclass(frozen=True)
class AblationConfig:
    """An ablation's settings: in its YAML file they stand beside those of training, but for `OWN`."""

    train: TrainConfig
    seeds: tuple[int, ...] = (0, 1, 2)
    people: int = 200  # held-out identities, each drawn once by every row
    references: tuple[int, ...] = (1, 2, 4, 8)  # how many photos of a person are given, averaged and fused
    only: tuple[str, ...] = ()  # names of rows, where not all are wanted: some of them with a longer budget, say

    @property
    def rows(self) -> list[Row]:
        return [row for row in all_rows(self.references) if not self.only or row.name in self.only]


def read_ablation(path: Path) -> AblationConfig:
    """Read an ablation's YAML file: the fields of `TrainConfig`, of which `steps` is the budget of one training, with
    `seeds`, `people` and `references`.

    Raises:
        FaceSnapError: see `read_config`.
    """
    content = read_fields(path)
    if own := [name for name in OWN if name in content]:
        raise FaceSnapError(f"'{own[0]}' in {path} is for the ablation to set; remove it.")
    given = {name: content.pop(name) for name in ("seeds", "people", "references", "only") if name in content}
    train = from_fields(path, {**content, "out": "."})
    config = AblationConfig(train, **{n: tuple(v) if isinstance(v, list) else v for n, v in given.items()})
    _check_numbers(path, "seeds", config.seeds, 0, 2**32 - 1)
    _check_numbers(path, "references", config.references, 1, len(REFERENCE_SHOTS))
    if type(config.people) is not int or config.people < 2:
        raise FaceSnapError(f"'people' in {path} is {config.people!r} and must be a whole number from 2; correct it.")
    names = [row.name for row in all_rows(config.references)]
    if not isinstance(config.only, tuple) or not set(config.only) <= set(names):
        raise FaceSnapError(f"'only' in {path} must be a list of rows, which are {', '.join(names)}; correct it.")
    return config


def _check_numbers(path: Path, name: str, values: Any, low: int, high: int) -> None:
    good = isinstance(values, tuple) and values and all(type(v) is int and low <= v <= high for v in values)
    if not good or len(set(values)) < len(values):
        raise FaceSnapError(f"'{name}' in {path} must be a list of different whole numbers from {low} to {high}.")


def ablate(config: AblationConfig, out: Path, studio: Studio | None = None) -> Path:
    """Do what is missing in `out` and write the report anew after each seed; return the tables' file.

    `out` gets, for each seed, `train-TRAINING/` (see `trainer.train`), `pictures/ROW/`, `scores/ROW.npz`; and
    `results.json`, `ablation.md`, `sheet.png`. Processes that accelerate started together share all work.

    Args:
        studio: who is drawn and by whom they are judged; by default the miniature world's test split.

    Raises:
        FaceSnapError: `out` has an ablation of other settings, or see `trainer.train`.
    """
    state = processes()
    _check_settings(config, out, state)
    with tempfile.TemporaryDirectory() as models:
        studio = studio or Studio(config.train, config.people, max(config.references), Path(models), state.device)
        for number, seed in enumerate(config.seeds, 1):
            for training in trainings(config.rows):
                if not is_trained(config, out, seed, training):
                    _say(state, f"seed {seed}: training '{training.name}'")
                    _train(config, out, seed, training, state)
            _draw_missing(config, out, seed, studio, state)
            _judge_missing(config, out, seed, studio, state)
            if state.is_main_process:
                _report(config, out, config.seeds[:number], studio)
            state.wait_for_everyone()
    return out / "ablation.md"


def is_trained(config: AblationConfig, out: Path, seed: int, training: Training) -> bool:
    found = checkpoints.list_checkpoints(training_folder(out, seed, training))
    return bool(found) and found[-1][0] >= config.train.steps


def training_folder(out: Path, seed: int, training: Training) -> Path:
    return out / f"seed-{seed}" / f"train-{training.name}"


def picture_path(out: Path, seed: int, row: Row, index: int) -> Path:
    return out / f"seed-{seed}" / "pictures" / row.name / f"{index:04d}.png"


def scores_path(out: Path, seed: int, row: Row) -> Path:
    return out / f"seed-{seed}" / "scores" / f"{row.name}.npz"


def _train(config: AblationConfig, out: Path, seed: int, training: Training, state: Any) -> None:
    start = out / f"seed-{seed}" / f"start-{training.mixer.replace(' ', '-')}.safetensors"
    if state.is_main_process and not start.is_file():
        with_mixer(config.train.start, start, training.mixer, seed)
    state.wait_for_everyone()
    own = {"landmarks": training.landmarks, "tokens": training.tokens}
    folder = training_folder(out, seed, training)
    trainer.train(replace(config.train, start=start, out=folder, seed=seed, **own), resume=True)


def _draw_missing(config: AblationConfig, out: Path, seed: int, studio: Studio, state: Any) -> None:
    missing = {
        index: rows
        for index in range(config.people)
        if (rows := [row for row in config.rows if not picture_path(out, seed, row, index).is_file()])
    }
    state.wait_for_everyone()  # else one could find what another has begun to draw
    if not missing:
        return
    weights = {}
    for training in trainings(config.rows):
        _, folder = checkpoints.list_checkpoints(training_folder(out, seed, training))[-1]
        weights[training] = facesnap_file.load(folder / checkpoints.WEIGHTS)
    own = list(missing)[state.process_index :: state.num_processes]
    for index in _progress(state, own, f"seed {seed}: drawing"):
        sitter = studio.sitter(index)
        features = studio.features(index, sitter)
        for row in missing[index]:
            picture = draw(studio.sampler, row, weights[row.training], sitter, features)
            _write(
                picture_path(out, seed, row, index), lambda p, picture=picture: Image.fromarray(picture).save(p, "png")
            )
    state.wait_for_everyone()


def _judge_missing(config: AblationConfig, out: Path, seed: int, studio: Studio, state: Any) -> None:
    rows = [row for row in config.rows if not scores_path(out, seed, row).is_file()]
    state.wait_for_everyone()
    for row in _progress(state, rows[state.process_index :: state.num_processes], f"seed {seed}: judging"):
        seen = [
            studio.jury.look(np.asarray(Image.open(picture_path(out, seed, row, index)).convert("RGB")))
            for index in range(config.people)
        ]
        compared = [compare(one, studio.known(index)) for index, one in enumerate(seen)]
        columns = {metric: np.array([one[metric] for one in compared]) for metric in METRICS}
        columns |= {"features": np.stack([one.features for one in seen])}
        columns |= {"faceless": np.array([one.face is None for one in seen])}
        _write(scores_path(out, seed, row), lambda path, columns=columns: _save_arrays(path, columns))
    if state.is_main_process and not (out / "real.npz").is_file():
        known = [studio.known(index) for index in range(config.people)]
        columns = {f"{name}/{metric}": v for name, row in limits(known).items() for metric, v in row.items()}
        columns |= {"features": np.stack([one.features for person in known for one in person.unseen])}
        _write(out / "real.npz", lambda path: _save_arrays(path, columns))
    state.wait_for_everyone()


def _report(config: AblationConfig, out: Path, seeds: Sequence[int], studio: Studio) -> None:
    scores, known = _read_scores(config, out, seeds)
    about = {"seeds": list(seeds), "people": config.people, "steps": config.train.steps}
    about |= {"pictures a step": json.loads((out / "settings.json").read_text(encoding="utf-8"))["pictures a step"]}
    about |= studio.distances
    found = results(about, config.references, scores, known)

    def path(row: Row, index: int) -> Path:
        return picture_path(out, seeds[0], row, index)

    write_report(out, found, config.references, people_sheet(studio.sitter, path, scores, config.people))


def _read_scores(
    config: AblationConfig, out: Path, seeds: Sequence[int]
) -> tuple[Scores, dict[str, dict[str, np.ndarray]]]:
    """The scores of these seeds, and the limits."""
    real = np.load(out / "real.npz")
    known: dict[str, dict[str, np.ndarray]] = {}
    for key in real.files:
        if "/" in key:
            name, metric = key.split("/")
            known.setdefault(name, {})[metric] = real[key]
    values, fid, faceless = {}, {}, {}
    for row in config.rows:
        files = [np.load(scores_path(out, seed, row)) for seed in seeds]
        values[row.name] = {metric: np.stack([file[metric] for file in files]) for metric in METRICS}
        fid[row.name] = np.array([metrics.fid(real["features"], file["features"]) for file in files])
        faceless[row.name] = np.array([int(file["faceless"].sum()) for file in files])
    return Scores(values, fid, faceless), known


def _check_settings(config: AblationConfig, out: Path, state: Any) -> None:
    """Leave the settings in `out`, or see that they are those of what is there; seeds may be added."""
    names = [field.name for field in fields(TrainConfig) if field.name not in WITHOUT_EFFECT]
    settings = {name: getattr(config.train, name) for name in names}
    settings |= {"people": config.people, "references": config.references}
    settings |= {"pictures a step": state.num_processes * config.train.batch_size * config.train.gradient_accumulation}
    settings = json.loads(json.dumps(settings, default=str))
    path = out / "settings.json"
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        if all(is_trained(config, out, seed, training) for seed in config.seeds for training in trainings(config.rows)):
            there["pictures a step"] = settings["pictures a step"]  # no matter any more
        if other := [name for name in settings if settings[name] != there.get(name)]:
            raise FaceSnapError(
                f"{out} has an ablation whose '{other[0]}' is {there.get(other[0])} and not {settings[other[0]]}; name "
                "another --out, or give its own settings."
            )
    elif state.is_main_process:
        _write(path, lambda part: part.write_text(json.dumps(settings, indent=2), encoding="utf-8"))
    state.wait_for_everyone()


def _save_arrays(path: Path, columns: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **columns)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file that has its name only when it is whole."""
    try:
        with atomic_write(path) as part:
            write(part)
    except OSError as error:
        raise FaceSnapError(f"{path} cannot be written ({error}): make room and run this again.") from error


def _progress(state: Any, items: Sequence[Any], words: str) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc=words, disable=not state.is_main_process)


def _say(state: Any, words: str) -> None:
    if state.is_main_process:
        print(words, file=sys.stderr)
