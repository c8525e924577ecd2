"""The paper's ablations, run in the miniature world: train, generate, judge.

All training runs of a seed share the budget, the order of images and noise, and the initial weights where their tensors
match. All rows generate an image of a person from the same reference, driving photo, prompt and noise. A rerun skips
what is already finished.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import facesnap_lab.ablated_mixers  # noqa: F401 (registers the Mixers that the rows train)
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import atomic_write
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.initialise import with_mixer
from facesnap_lab.ablation.editions import FIRST, SECOND, Edition
from facesnap_lab.ablation.pictures import METRICS, REFERENCE_SHOTS, AblationSetup, compare, draw, limits
from facesnap_lab.ablation.report import Scores, people_sheet, results, write_report
from facesnap_lab.ablation.rows import Row, Training, trainings
from facesnap_lab.evaluation import metrics
from facesnap_lab.evaluation.draw import processes
from facesnap_lab.training import checkpoints, trainer
from facesnap_lab.training.config import TrainConfig, from_fields, read_fields
from facesnap_lab.training.result_settings import FILE as SETTINGS_FILE
from facesnap_lab.training.result_settings import check_settings, result_settings

RESERVED_FIELDS = ("out", "seed", "landmarks", "tokens", "method")  # training fields that the ablation itself sets


@dataclass(frozen=True)
class AblationConfig:
    """An ablation's settings. Its YAML file contains them together with the training fields, except
    `RESERVED_FIELDS`."""

    train: TrainConfig
    seeds: tuple[int, ...] = (0, 1, 2)
    people: int = 200  # held-out identities; every row generates one image of each
    references: tuple[int, ...] = (1, 2, 4, 8)  # numbers of reference photos, each averaged and fused
    only: tuple[str, ...] = ()  # names of the rows to run; empty: all rows
    stages: Path | None = None  # folder of all stages of the miniature's second edition, which is used then
    # steps of the full method before the seeds, with and without landmarks; its FFRNets start the rows
    warm_up: int = 0

    @property
    def edition(self) -> Edition:
        return FIRST if self.stages is None else SECOND

    @property
    def rows(self) -> list[Row]:
        return [row for row in self.edition.rows(self.references) if not self.only or row.name in self.only]


def read_ablation(path: Path) -> AblationConfig:
    """Read an ablation's YAML file.

    It contains the fields of `TrainConfig`, where `steps` is the budget of one training run, and the fields of
    `AblationConfig`.

    Raises:
        FaceSnapError: see `read_config`.
    """
    content = read_fields(path)
    if own := [name for name in RESERVED_FIELDS if name in content]:
        raise FaceSnapError(f"'{own[0]}' in {path} is set by the ablation itself; remove it.")
    names = ("seeds", "people", "references", "only", "stages", "warm_up")
    given = {name: content.pop(name) for name in names if name in content}
    train = from_fields(path, {**content, "out": "."})
    if "stages" in given:
        given["stages"] = _stages(path, given["stages"])
        given.setdefault("references", (1,))
    config = AblationConfig(train, **{n: tuple(v) if isinstance(v, list) else v for n, v in given.items()})
    _check_numbers(path, "seeds", config.seeds, 0, 2**32 - 1)
    _check_numbers(path, "references", config.references, 1, len(REFERENCE_SHOTS))
    if type(config.people) is not int or config.people < 2:
        raise FaceSnapError(f"'people' in {path} is {config.people!r}, but must be a whole number of at least 2.")
    if type(config.warm_up) is not int or config.warm_up < 0:
        raise FaceSnapError(f"'warm_up' in {path} is {config.warm_up!r}, but must be a whole number of at least 0.")
    if config.stages is not None and config.references != (1,):
        raise FaceSnapError(f"'references' in {path} must be [1] if 'stages' is set; remove one of them.")
    names = [row.name for row in config.edition.rows(config.references)]
    if not isinstance(config.only, tuple) or not set(config.only) <= set(names):
        raise FaceSnapError(f"'only' in {path} must be a list of row names; the rows are {', '.join(names)}.")
    return config


def _stages(path: Path, value: Any) -> Path:
    folder = path.parent / value if isinstance(value, str) else None
    if folder is None or not (folder / "quality.json").is_file():
        raise FaceSnapError(
            f"'stages' in {path} is {value!r}, which is not a folder of the second edition's stages; correct it."
        )
    return folder


def _check_numbers(path: Path, name: str, values: Any, low: int, high: int) -> None:
    good = isinstance(values, tuple) and values and all(type(v) is int and low <= v <= high for v in values)
    if not good or len(set(values)) < len(values):
        raise FaceSnapError(f"'{name}' in {path} must be a list of different whole numbers from {low} to {high}.")


def ablate(config: AblationConfig, out: Path, setup: AblationSetup | None = None) -> Path:
    """Run everything that is missing in `out`, rewrite the report after each seed, and return the path of the tables.

    `out` receives `train-TRAINING/` (see `trainer.train`), `pictures/ROW/` and `scores/ROW.npz` for each seed, and
    `results.json`, `ablation.md` and `sheet.png`. Processes that accelerate started together share the work.

    Args:
        setup: the subjects, sampler and judges; by default the test split of the edition's miniature world.

    Raises:
        FaceSnapError: `out` contains an ablation with different settings, or training fails (see `trainer.train`).
    """
    state = processes()
    _check_settings(config, out, state)
    with tempfile.TemporaryDirectory() as models:
        setup = setup or _new_setup(config, Path(models), state.device)
        for landmarks in dict.fromkeys(training.landmarks for training in trainings(config.rows)):
            _warm_up(config, out, landmarks, state)
        for number, seed in enumerate(config.seeds, 1):
            for training in trainings(config.rows):
                if not is_trained(config, out, seed, training):
                    _report_progress(state, f"seed {seed}: training '{training.name}'")
                    _train(config, out, seed, training, state)
            _draw_missing(config, out, seed, setup, state)
            _judge_missing(config, out, seed, setup, state)
            if state.is_main_process:
                _report(config, out, config.seeds[:number], setup)
            state.wait_for_everyone()
    return out / "ablation.md"


def _new_setup(config: AblationConfig, models: Path, device: Any) -> AblationSetup:
    if config.stages is None:
        return AblationSetup(config.train, config.people, max(config.references), models, device)
    from facesnap_lab.ablation.second import SecondSetup

    return SecondSetup(config.train, config.people, models, device, config.stages)


def is_trained(config: AblationConfig, out: Path, seed: int, training: Training) -> bool:
    found = checkpoints.list_checkpoints(training_folder(out, seed, training))
    return bool(found) and found[-1][0] >= config.train.steps


def training_folder(out: Path, seed: int, training: Training) -> Path:
    return out / f"seed-{seed}" / f"train-{training.name}"


def image_path(out: Path, seed: int, row: Row, index: int) -> Path:
    return out / f"seed-{seed}" / "pictures" / row.name / f"{index:04d}.png"


def scores_path(out: Path, seed: int, row: Row) -> Path:
    return out / f"seed-{seed}" / "scores" / f"{row.name}.npz"


def _warm_up(config: AblationConfig, out: Path, landmarks: str, state: Any) -> None:
    """Train the FFRNet that the rows with these landmarks start from, so that rows without landmarks start from one
    that has never seen any."""
    folder = out / f"warm-up-{landmarks}"
    found = checkpoints.list_checkpoints(folder)
    if config.warm_up and not (found and found[-1][0] >= config.warm_up):
        _report_progress(state, f"warm-up, landmarks: {landmarks}")
        trainer.train(replace(config.train, out=folder, steps=config.warm_up, landmarks=landmarks), resume=True)


def _start_of(config: AblationConfig, out: Path, landmarks: str) -> Path:
    if not config.warm_up:
        return config.train.start
    return checkpoints.list_checkpoints(out / f"warm-up-{landmarks}")[-1][1] / checkpoints.WEIGHTS


def _train(config: AblationConfig, out: Path, seed: int, training: Training, state: Any) -> None:
    kind = training.mixer.replace(" ", "-") + ("" if training.landmarks == "drawn" else f"-{training.landmarks}")
    start = out / f"seed-{seed}" / f"start-{kind}.safetensors"
    if state.is_main_process and not start.is_file():
        with_mixer(_start_of(config, out, training.landmarks), start, training.mixer, seed)
    state.wait_for_everyone()
    own: dict[str, Any] = {"landmarks": training.landmarks, "tokens": training.tokens, **dict(training.settings)}
    if config.warm_up:  # which has passed `id_start`
        own["id_start"] = 0
    folder = training_folder(out, seed, training)
    trainer.train(replace(config.train, start=start, out=folder, seed=seed, **own), resume=True)


def _draw_missing(config: AblationConfig, out: Path, seed: int, setup: AblationSetup, state: Any) -> None:
    missing = {
        index: rows
        for index in range(config.people)
        if (rows := [row for row in config.rows if not image_path(out, seed, row, index).is_file()])
    }
    state.wait_for_everyone()  # otherwise another process might see files that this one has only begun to write
    if not missing:
        return
    weights = {}
    for training in trainings(config.rows):
        _, folder = checkpoints.list_checkpoints(training_folder(out, seed, training))[-1]
        weights[training] = facesnap_file.load(folder / checkpoints.WEIGHTS)
    own = list(missing)[state.process_index :: state.num_processes]
    for index in _progress_bar(state, own, f"seed {seed}: generating"):
        subject = setup.subject(index)
        features = setup.features(index, subject)
        for row in missing[index]:
            picture = draw(setup.sampler, row, weights[row.training], subject, features)
            _write(
                image_path(out, seed, row, index), lambda p, picture=picture: Image.fromarray(picture).save(p, "png")
            )
    state.wait_for_everyone()


def _judge_missing(config: AblationConfig, out: Path, seed: int, setup: AblationSetup, state: Any) -> None:
    rows = [row for row in config.rows if not scores_path(out, seed, row).is_file()]
    state.wait_for_everyone()
    for row in _progress_bar(state, rows[state.process_index :: state.num_processes], f"seed {seed}: judging"):
        features = [
            setup.judges.features_of(np.asarray(Image.open(image_path(out, seed, row, index)).convert("RGB")))
            for index in range(config.people)
        ]
        compared = [compare(one, setup.real_photos(index)) for index, one in enumerate(features)]
        columns = {metric: np.array([one[metric] for one in compared]) for metric in METRICS}
        columns |= {"features": np.stack([one.features for one in features])}
        columns |= {"faceless": np.array([one.face is None for one in features])}
        _write(scores_path(out, seed, row), lambda path, columns=columns: _save_arrays(path, columns))
    if state.is_main_process and not (out / "real.npz").is_file():
        real = [setup.real_photos(index) for index in range(config.people)]
        columns = {f"{name}/{metric}": v for name, row in limits(real).items() for metric, v in row.items()}
        columns |= {"features": np.stack([one.features for person in real for one in person.unseen])}
        _write(out / "real.npz", lambda path: _save_arrays(path, columns))
    state.wait_for_everyone()


def _report(config: AblationConfig, out: Path, seeds: Sequence[int], setup: AblationSetup) -> None:
    scores, metric_limits = _read_scores(config, out, seeds)
    about = {"seeds": list(seeds), "people": config.people, "steps": config.train.steps}
    about |= {"images_per_step": json.loads((out / SETTINGS_FILE).read_text(encoding="utf-8"))["images_per_step"]}
    about |= setup.distances
    report = results(about, config.references, scores, metric_limits, config.edition)

    def path(row: Row, index: int) -> Path:
        return image_path(out, seeds[0], row, index)

    sheet = people_sheet(setup.subject, path, scores, config.people, config.edition)
    write_report(out, report, config.references, sheet, config.edition)


def _read_scores(
    config: AblationConfig, out: Path, seeds: Sequence[int]
) -> tuple[Scores, dict[str, dict[str, np.ndarray]]]:
    """Read the scores of these seeds, and the limits by name and metric."""
    real = np.load(out / "real.npz")
    metric_limits: dict[str, dict[str, np.ndarray]] = {}
    for key in real.files:
        if "/" in key:
            name, metric = key.split("/")
            metric_limits.setdefault(name, {})[metric] = real[key]
    values, fid, faceless = {}, {}, {}
    for row in config.rows:
        files = [np.load(scores_path(out, seed, row)) for seed in seeds]
        values[row.name] = {metric: np.stack([file[metric] for file in files]) for metric in METRICS}
        fid[row.name] = np.array([metrics.fid(real["features"], file["features"]) for file in files])
        faceless[row.name] = np.array([int(file["faceless"].sum()) for file in files])
    return Scores(values, fid, faceless), metric_limits


def _check_settings(config: AblationConfig, out: Path, state: Any) -> None:
    """Write the settings to `out`, or check that the existing ones are the same; seeds may be added."""
    settings = result_settings(config.train, RESERVED_FIELDS)
    settings |= {"people": config.people, "references": config.references}
    if config.stages is not None or config.warm_up:
        settings |= {"stages": config.stages, "warm_up": config.warm_up}
    settings |= {"images_per_step": state.num_processes * config.train.batch_size * config.train.gradient_accumulation}
    every = (is_trained(config, out, seed, training) for seed in config.seeds for training in trainings(config.rows))
    may_differ = ("images_per_step",) if all(every) else ()  # it affects only training
    check_settings(out, settings, "an ablation", may_differ, write=state.is_main_process)
    state.wait_for_everyone()


def _save_arrays(path: Path, columns: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **columns)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically."""
    try:
        with atomic_write(path) as part:
            write(part)
    except OSError as error:
        raise FaceSnapError(f"{path} could not be written ({error}); free some disk space and try again.") from error


def _progress_bar(state: Any, items: Sequence[Any], title: str) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc=title, disable=not state.is_main_process)


def _report_progress(state: Any, message: str) -> None:
    if state.is_main_process:
        print(message, file=sys.stderr)
