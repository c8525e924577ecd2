"""What is done with the photos of one shard: read them for the first time, caption them, and write the shard."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.face_pack import file_hash, pack_files
from facesnap_lab.dataset import plan
from facesnap_lab.dataset.captions import load_blip2, read_caption
from facesnap_lab.dataset.images import NetworkFiles, Settings, load_networks, network_hashes, training_images
from facesnap_lab.dataset.layouts import Person, PhotoFile
from facesnap_lab.dataset.plan import PlannedShard, write_text
from facesnap_lab.dataset.scan import PhotoScan, SkippedPhoto, reread, scan_photo
from facesnap_lab.storage import Location
from facesnap_lab.training.shard_writer import write_shard
from facesnap_lab.training.shards import Sample

CAPTION_BATCH = 8  # photos per batch of BLIP-2


@dataclass(frozen=True)
class Paths:
    """The folders of photos, and the files of the build."""

    folders: tuple[Location, ...]
    out: Location

    def photo(self, person: Person, photo: PhotoFile) -> Location:
        return self.folders[person.folder] / photo.path

    def scans(self, planned: PlannedShard) -> Location:
        return self.out / "work" / f"scans-{planned.number:06d}.jsonl"

    def captions(self, planned: PlannedShard) -> Location:
        return self.out / "work" / f"captions-{planned.number:06d}.json"

    def finished(self, planned: PlannedShard) -> Location:
        return self.out / "work" / f"shard-{planned.number:06d}.json"

    def shard(self, planned: PlannedShard) -> Location:
        return self.out / f"shard-{planned.number:06d}.tar"


@dataclass(frozen=True)
class Job:
    """Everything that a process needs to read, caption and build the photos of one shard.

    fingerprints: see `fingerprints`. rejected: the shard's photos to skip as left out or as duplicates.
    """

    planned: PlannedShard
    paths: Paths
    files: NetworkFiles
    settings: Settings
    blip2: Path | None
    fingerprints: dict[str, Any]
    rejected: dict[Location, SkippedPhoto] = field(default_factory=dict)


def fingerprints(files: NetworkFiles, blip2: Path | None) -> dict[str, Any]:
    """Identify the networks by their content, but BLIP-2, which is large, by file names and sizes."""
    fingerprints: dict[str, Any] = network_hashes(files)
    detector = pack_files(files.face_pack).detector
    fingerprints["detector"] = "" if detector is None else file_hash(detector)
    if blip2:
        fingerprints["blip2"] = {file.name: file.stat().st_size for file in sorted(blip2.glob("*")) if file.is_file()}
    return fingerprints


def _check_networks(job: Job) -> None:
    """Check that this machine has the same networks as the one that planned the build."""
    found = fingerprints(job.files, job.blip2)
    for network, expected in job.fingerprints.items():
        if found.get(network) != expected:
            raise FaceSnapError(
                f"The network '{network}' on {socket.gethostname()} is not the one that the build was started "
                "with; copy the same model files to all machines."
            )


def scan_shard(job: Job) -> None:
    """Scan the photos of a shard for the first time."""
    scans = [scan_photo(job.paths.photo(person, photo)) for person, photo in job.planned.photos]
    write_text(job.paths.scans(job.planned), "".join(json.dumps(asdict(scan)) + "\n" for scan in scans))


def read_scans(paths: Paths, planned: PlannedShard) -> list[PhotoScan]:
    lines = paths.scans(planned).read_text(encoding="utf-8").splitlines()
    return [PhotoScan(**json.loads(line)) for line in lines]


def caption_shard(job: Job) -> None:
    """Caption the photos of a shard that have no caption file."""
    planned = job.planned
    photos = [job.paths.photo(person, photo) for person, photo in planned.photos]
    scans = read_scans(job.paths, planned)
    captions: list[str | None] = [None] * len(photos)
    uncaptioned = [
        i
        for i, (_, photo) in enumerate(planned.photos)
        if photo.caption is None and not scans[i].problem and photos[i] not in job.rejected
    ]
    if uncaptioned:
        _check_networks(job)
    for start in range(0, len(uncaptioned), CAPTION_BATCH):
        batch = uncaptioned[start : start + CAPTION_BATCH]
        for i, text in zip(batch, load_blip2(job.blip2)([reread(photos[i], scans[i]).pixels for i in batch])):
            captions[i] = text
    write_text(job.paths.captions(planned), json.dumps(captions, ensure_ascii=False, indent=0))


def build_shard(job: Job) -> None:
    """Build a shard and, once it is complete, mark it as finished."""
    _check_networks(job)
    skipped: list[dict[str, str]] = []
    people: set[str] = set()

    def samples() -> Iterator[Sample]:
        for person, path, images in _images_by_photo(job):
            if isinstance(images, SkippedPhoto):
                skipped.append({"file": str(path), **asdict(images)})
            else:
                people.add(person.name)
                yield from images

    shard = job.paths.shard(job.planned)
    try:
        count = write_shard(shard, samples(), job.settings.jpeg)
    except OSError as error:
        raise plan.write_error(shard, error) from error
    summary = {"images": count, "people": len(people), "skipped": skipped}
    write_text(job.paths.finished(job.planned), json.dumps(summary, ensure_ascii=False))


def _images_by_photo(job: Job) -> Iterator[tuple[Person, Location, Iterator[Sample] | SkippedPhoto]]:
    """Yield each photo of a shard with its training images, or with the reason for skipping it."""
    scans = read_scans(job.paths, job.planned)
    captions = [None] * len(scans)
    if any(photo.caption is None for _, photo in job.planned.photos):
        captions = json.loads(job.paths.captions(job.planned).read_text(encoding="utf-8"))
    scanned = zip(scans, captions)
    for number, person in enumerate(job.planned.people, job.planned.first):
        for position, photo in enumerate(person.photos):
            scan, caption = next(scanned)
            yield person, job.paths.photo(person, photo), _images_of(job, number, person, position, scan, caption)


def _images_of(
    job: Job, number: int, person: Person, position: int, scan: PhotoScan, caption: str | None
) -> Iterator[Sample] | SkippedPhoto:
    photo, count = person.photos[position], job.settings.crops
    path = job.paths.photo(person, photo)
    if scan.problem:
        return SkippedPhoto("unreadable", scan.problem)
    if path in job.rejected:
        return job.rejected[path]
    if photo.caption is not None:
        try:
            caption = read_caption(job.paths.folders[person.folder] / photo.caption)
        except ValueError as error:
            return SkippedPhoto("no caption", str(error))
    if not caption:
        return SkippedPhoto("no caption", "BLIP-2 returned an empty caption.")
    keys = [f"{number:06d}-{position * count + crop:05d}" for crop in range(count)]
    networks = load_networks(job.files, job.settings.device)
    provenance = {} if photo.origin is None else {**asdict(photo.origin), "photo": scan.content}
    return training_images(networks, job.settings, reread(path, scan), caption, person.name, keys, provenance)
