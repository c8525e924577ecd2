"""Measure a method: from a folder of images to its row of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from facesnap_ext import photos
from facesnap_ext.identity.faces import NoFaceError
from facesnap_ext.photos import Photo
from facesnap_lab import statistics
from facesnap_lab.evaluation import metrics
from facesnap_lab.evaluation.judges import Judges, find_face
from facesnap_lab.evaluation.protocol import IMAGE_SUFFIXES, Protocol, find_images
from facesnap_lab.statistics import Interval

T = TypeVar("T")
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


def embed_real_photos(protocol: Protocol, judges: Judges, progress: Callable[[], None] = lambda: None) -> RealPhotos:
    """Embed the faces of all real photos; `progress` is called after each person.

    Raises:
        FaceSnapError: a photo cannot be read or has no face.
    """
    clip_faces, embeddings, features = [], [], []
    for identity in protocol.identities:
        loaded = [photos.from_path(path) for path in identity.real]
        found = [_FaceFeatures.of(judges, photo) for photo in loaded]
        if judges.pack and (bad := [photo.name for photo, one in zip(loaded, found) if one.box is None]):
            raise NoFaceError(f"No face was found in {bad[0]} of '{identity.name}'; replace this photo in the list.")
        clip_faces.append([one.clip_face for one in found if one.clip_face is not None])
        embeddings.append([one.embedding for one in found if one.embedding is not None])
        if judges.extractor:
            features += _extract(judges, loaded)
        progress()
    return RealPhotos(clip_faces, embeddings, np.stack(features) if features else None)


def measure(
    name: str,
    folder: Path,
    protocol: Protocol,
    judges: Judges,
    real: RealPhotos,
    progress: Callable[[], None] = lambda: None,
) -> Scores:
    """Measure a method's images; `progress` is called after each.

    Raises:
        FaceSnapError: an image is missing or cannot be read.
    """
    cases = protocol.cases()
    images = find_images(cases, folder)
    place = {identity.name: i for i, identity in enumerate(protocol.identities)}
    people = np.array([place[case.identity.name] for case in cases])
    texts = judges.clip.embed_texts([prompt.text for prompt in protocol.prompts]) if judges.clip else None
    text_of = {prompt.name: i for i, prompt in enumerate(protocol.prompts)}

    values: dict[str, list[float]] = {metric: [] for metric in METRICS}
    features: list[np.ndarray] = []
    without_face = []
    for batch in _batches(cases):
        loaded = [_read(images[case.file], case.file) for case in batch]
        if judges.clip:
            own = texts[[text_of[case.prompt.name] for case in batch]]
            values["clip_t"] += list(metrics.clip_t(judges.clip.embed_images([photo.pixels for photo in loaded]), own))
        if judges.extractor:
            features += _extract(judges, loaded)
        for case, photo in zip(batch, loaded):
            who, found = place[case.identity.name], _FaceFeatures.of(judges, photo)
            if judges.pack and found.box is None:
                without_face.append(case.file)
            if judges.pack and judges.clip:
                values["clip_face"].append(metrics.likeness(found.clip_face, real.clip_faces[who]))
            if judges.embed:
                values["face_sim"].append(metrics.likeness(found.embedding, real.embeddings[who]))
            progress()
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
            judges.clip.embed_images([face.crop])[0] if judges.clip else None,
            judges.embed(face) if judges.embed else None,
        )


def _extract(judges: Judges, loaded: Sequence[Photo]) -> list[np.ndarray]:
    return list(judges.extractor.features([photo.pixels for photo in loaded]))


def _read(path: Path, name: str) -> Photo:
    """Read an image, named by its path in the list, since its file name is the same for all people."""
    return photos.from_bytes(path.read_bytes(), name)


def _extra_images(folder: Path, known: set[Path]) -> int:
    return sum(path.suffix.lower() in IMAGE_SUFFIXES and path not in known for path in folder.glob("*/*"))


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]
