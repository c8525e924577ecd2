"""Measure a method: from a folder of images to its row of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from facesnap_ext import photos
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.faces import NoFaceError
from facesnap_ext.photos import Photo
from facesnap_lab import statistics
from facesnap_lab.evaluation import metrics
from facesnap_lab.evaluation.judges import Judges, find_face
from facesnap_lab.evaluation.protocol import IMAGE_SUFFIXES, Identity, Protocol, find_images
from facesnap_lab.statistics import Interval
from facesnap_lab.workers import RunTasks, Task, run_here

LoadJudges = Callable[[], Judges]
BATCH = 16
METRICS = ("clip_t", "clip_face", "face_sim")  # the metrics with one value per image


@dataclass(frozen=True, eq=False)
class RealPhotos:
    """Features of the people's real photos, computed once for all methods.

    clip_faces, embeddings: one list per person. features: of all photos [M,D], for FID.
    """

    clip_faces: list[list[np.ndarray]]
    embeddings: list[list[np.ndarray]]
    features: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Scores:
    """A method's scores.

    values: [N] by metric of `METRICS`, one value per case, −1…1. by_person: each person's mean [P] by metric.
    fid: None if it is not measured. without_face: files in which no face was found; None if faces were not detected.
    """

    name: str
    folder: Path
    values: dict[str, np.ndarray]
    by_person: dict[str, np.ndarray]
    fid: float | None
    without_face: tuple[str, ...] | None
    extra_images: int  # images in the folder that are not in the list
    intervals: dict[str, Interval] = field(default_factory=dict)


def embed_real_photos(
    protocol: Protocol,
    judges: Judges,
    progress: Callable[[], None] = lambda: None,
    run_tasks: RunTasks = run_here,
    load_judges: LoadJudges | None = None,
) -> RealPhotos:
    """Embed the faces of all real photos; `progress` is called after each person.

    Args:
        run_tasks: where to embed them; see `open_workers`.
        load_judges: returns `judges` in other processes. It must pickle, and load them only once.

    Raises:
        FaceSnapError: a photo cannot be read or has no face.
    """
    load = load_judges or (lambda: judges)
    tasks = [Task(f"'{identity.name}'", 1, (load, identity)) for identity in protocol.identities]
    found = run_tasks(_embed_person, tasks, lambda _: progress())
    features = [row for person in found for row in person.features]
    return RealPhotos(
        [person.clip_faces for person in found],
        [person.embeddings for person in found],
        np.stack(features) if features else None,
    )


@dataclass(frozen=True, eq=False)
class _PersonFeatures:
    clip_faces: list[np.ndarray]
    embeddings: list[np.ndarray]
    features: list[np.ndarray]


def _embed_person(argument: tuple[LoadJudges, Identity]) -> _PersonFeatures:
    load_judges, identity = argument
    judges = load_judges()
    loaded = [photos.from_path(path) for path in identity.real]
    found = [_FaceFeatures.of(judges, photo) for photo in loaded]
    if judges.pack and (bad := [photo.name for photo, one in zip(loaded, found) if one.box is None]):
        raise NoFaceError(f"No face was found in {bad[0]} of '{identity.name}'; replace this photo in the list.")
    return _PersonFeatures(
        [one.clip_face for one in found if one.clip_face is not None],
        [one.embedding for one in found if one.embedding is not None],
        _extract(judges, loaded) if judges.extractor else [],
    )


@dataclass(frozen=True, eq=False)
class _Batch:
    """Images to measure, and what they are compared with.

    files: names in the list. texts: embeddings of their prompts [N,D], or None. clip_faces, embeddings: features of
    the real photos of the person in each image.
    """

    files: list[str]
    paths: list[Path]
    texts: np.ndarray | None
    clip_faces: list[list[np.ndarray]]
    embeddings: list[list[np.ndarray]]


@dataclass(frozen=True, eq=False)
class _BatchScores:
    """values: one per image, by metric of `METRICS`. features: one per image, or empty. without_face: files."""

    values: dict[str, list[float]]
    features: list[np.ndarray]
    without_face: list[str]


def _measure_batch(argument: tuple[LoadJudges, _Batch]) -> _BatchScores:
    load_judges, batch = argument
    judges = load_judges()
    loaded = [_read(path, file) for path, file in zip(batch.paths, batch.files)]
    scores = _BatchScores({metric: [] for metric in METRICS}, [], [])
    if judges.clip:
        embedded = judges.clip.embed_images([photo.pixels for photo in loaded])
        scores.values["clip_t"].extend(metrics.clip_t(embedded, batch.texts))
    if judges.extractor:
        scores.features.extend(_extract(judges, loaded))
    for i, (file, photo) in enumerate(zip(batch.files, loaded)):
        found = _FaceFeatures.of(judges, photo)
        if judges.pack and found.box is None:
            scores.without_face.append(file)
        if judges.pack and (judges.clip or judges.embed_look):
            scores.values["clip_face"].append(metrics.likeness(found.clip_face, batch.clip_faces[i]))
        if judges.embed:
            scores.values["face_sim"].append(metrics.likeness(found.embedding, batch.embeddings[i]))
    return scores


def measure(
    name: str,
    folder: Path,
    protocol: Protocol,
    judges: Judges,
    real: RealPhotos,
    progress: Callable[[int], object] = lambda _: None,
    run_tasks: RunTasks = run_here,
    load_judges: LoadJudges | None = None,
) -> Scores:
    """Measure a method's images in batches; `progress` is called with the size of each.

    Args:
        run_tasks, load_judges: as for `embed_real_photos`. The batches are the same everywhere.

    Raises:
        FaceSnapError: an image is missing or cannot be read.
    """
    cases = protocol.cases()
    images = find_images(cases, folder)
    place = {identity.name: i for i, identity in enumerate(protocol.identities)}
    people = np.array([place[case.identity.name] for case in cases])
    texts = judges.clip.embed_texts([prompt.text for prompt in protocol.prompts]) if judges.clip else None
    text_of = {prompt.name: i for i, prompt in enumerate(protocol.prompts)}

    tasks = []
    for start in range(0, len(cases), BATCH):
        own, who = cases[start : start + BATCH], people[start : start + BATCH]
        batch = _Batch(
            [case.file for case in own],
            [images[case.file].absolute() for case in own],
            None if texts is None else texts[[text_of[case.prompt.name] for case in own]],
            [real.clip_faces[person] for person in who],
            [real.embeddings[person] for person in who],
        )
        tasks.append(Task(f"The batch of {own[0].file}", len(own), (load_judges or (lambda: judges), batch)))
    found = run_tasks(_measure_batch, tasks, progress)
    values = {metric: [value for scores in found for value in scores.values[metric]] for metric in METRICS}
    features = [row for scores in found for row in scores.features]
    without_face = [file for scores in found for file in scores.without_face]
    weights = np.array([case.prompt.weight for case in cases])
    measured = {metric: np.array(column) for metric, column in values.items() if column}
    by_person = {metric: statistics.by_person(column, people, weights) for metric, column in measured.items()}
    enough = judges.extractor and min(len(real.features), len(features)) >= 2
    return Scores(
        name,
        folder,
        measured,
        by_person,
        metrics.fid(real.features, np.stack(features)) if enough else None,
        tuple(without_face) if judges.pack else None,
        _extra_images(folder, set(images.values())),
        {metric: statistics.bootstrap(column) for metric, column in by_person.items()},
    )


@dataclass(frozen=True, eq=False)
class _FaceFeatures:
    """The judges' features of the largest face in a photo; None if there is no face or no judge."""

    box: np.ndarray | None = None
    clip_face: np.ndarray | None = None
    embedding: np.ndarray | None = None

    @classmethod
    def of(cls, judges: Judges, photo: Photo) -> _FaceFeatures:
        if judges.pack is None:
            return cls()
        face = find_face(judges.pack, photo)
        if face is None:
            return cls()
        return cls(
            face.box,
            judges.clip_face(face),
            judges.embed(face) if judges.embed else None,
        )


def _extract(judges: Judges, loaded: Sequence[Photo]) -> list[np.ndarray]:
    return list(judges.extractor.features([photo.pixels for photo in loaded]))


def _read(path: Path, name: str) -> Photo:
    """Read an image, named by its path in the list, since its file name is the same for all people."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FaceSnapError(f"{path} cannot be read ({error.strerror}); check that all machines have it.") from error
    return photos.from_bytes(data, name)


def _extra_images(folder: Path, known: set[Path]) -> int:
    return sum(path.suffix.lower() in IMAGE_SUFFIXES and path not in known for path in folder.glob("*/*"))
