"""Build the shards that `facesnap train` reads from folders of photos.

    plan.jsonl           the shard of each photo; written first, and compared when a build is continued
    work/scans-*.jsonl   the results of the first scan of a shard's photos
    work/captions-*.json BLIP-2's captions of a shard's photos, for those without a caption file
    shard-*.tar          always complete
    work/shard-*.json    marks a shard as finished, and lists the skipped photos
    report.jsonl         all skipped photos, with reasons

Each shard is built by one process, using only the plan and the shard's photos. Neither the number of processes nor
interruptions change a byte of the shards.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from facesnap_ext.convert import convert_originals
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.face_pack import file_hash, pack_files
from facesnap_ext.weights.search import find_models
from facesnap_lab.dataset import plan
from facesnap_lab.dataset.captions import check_blip2, load_blip2, read_caption
from facesnap_lab.dataset.images import NetworkFiles, Settings, load_networks, network_hashes, training_images
from facesnap_lab.dataset.layouts import Listing, Person, PhotoFile, list_people
from facesnap_lab.dataset.manifest import add_origins
from facesnap_lab.dataset.plan import PlannedShard, write_text
from facesnap_lab.dataset.pool import RunJobs, worker_processes
from facesnap_lab.dataset.scan import (
    LEFT_OUT,
    PhotoScan,
    ScannedPhoto,
    SkippedPhoto,
    find_duplicates,
    reread,
    scan_photo,
)
from facesnap_lab.training.exclusions import Exclusions, read_exclusions
from facesnap_lab.training.shards import Sample, write_shard

PER_SHARD = 200  # default number of photos; with five images of 1024² each, a shard is about 1 GB of PNG
CAPTION_BATCH = 8  # photos per batch of BLIP-2

Tick = Callable[[], None]


@dataclass(frozen=True)
class Paths:
    """The folders of photos, and the files of the build."""

    folders: tuple[Path, ...]
    out: Path

    def photo(self, person: Person, photo: PhotoFile) -> Path:
        return self.folders[person.folder] / photo.path

    def scans(self, planned: PlannedShard) -> Path:
        return self.out / "work" / f"scans-{planned.number:06d}.jsonl"

    def captions(self, planned: PlannedShard) -> Path:
        return self.out / "work" / f"captions-{planned.number:06d}.json"

    def finished(self, planned: PlannedShard) -> Path:
        return self.out / "work" / f"shard-{planned.number:06d}.json"

    def shard(self, planned: PlannedShard) -> Path:
        return self.out / f"shard-{planned.number:06d}.tar"


@dataclass(frozen=True)
class ShardJob:
    """Everything that a process needs to build one shard. `rejected`: see `find_duplicates`."""

    planned: PlannedShard
    paths: Paths
    files: NetworkFiles
    settings: Settings
    rejected: dict[Path, SkippedPhoto]


def build(
    folders: Sequence[Path],
    out: Path,
    models: Path,
    settings: Settings,
    per_shard: int = PER_SHARD,
    layout: str = "auto",
    identities: Path | None = None,
    manifest: Path | None = None,
    exclude: Path | None = None,
    blip2: Path | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Build shards, or continue an interrupted build.

    Args:
        folders, layout, identities: as for `layouts.list_people`.
        per_shard: minimum number of photos per shard. A person's photos are never split between shards.
        manifest: file with the origin of every photo, see `manifest.read_manifest`.
        exclude: file with people and photos to leave out, see `exclusions.read_exclusions`.
        blip2: folder with BLIP-2, for photos without a caption file.
        workers: number of single-threaded processes. With 0, everything runs in the current process.

    Returns:
        The numbers of photos, people, images and shards, and of skipped photos by reason.

    Raises:
        FaceSnapError: photos or models are missing, the disk is full, a process died, or photos or settings differ
            from those with which the build was started.
    """
    from filelock import FileLock, Timeout

    files = _network_files(models)
    listing = list_people(folders, layout, identities)
    if manifest:
        listing = add_origins(listing, folders, manifest)
    exclusions = read_exclusions(exclude) if exclude else None
    _check_captions(listing, folders, blip2)
    shards = plan.divide_into_shards(listing.people, per_shard)
    all_settings = {**asdict(settings), "per_shard": per_shard, **_fingerprints(files, blip2)}
    if exclusions:
        all_settings["exclude"] = exclusions.digest
    paths = Paths(tuple(folders), out)
    try:
        (out / "work").mkdir(parents=True, exist_ok=True)
        with FileLock(out / "work" / "lock", timeout=0):
            _remove_partial_files(out)
            plan.write_or_compare(out, all_settings, folders, shards)
            with worker_processes(workers, len(shards)) as run_jobs:
                _scan_all(paths, shards, run_jobs)
                rejected = _rejected(paths, shards, exclusions)
                if blip2:
                    _caption_all(paths, shards, rejected, blip2)
                _build_all(paths, shards, files, settings, rejected, run_jobs)
            return _write_report(paths, shards, listing)
    except Timeout:
        raise FaceSnapError(f"Another build is writing to {out}; wait for it, or choose another folder.") from None
    except OSError as error:
        raise plan.write_error(out, error) from error


def _network_files(models: Path) -> NetworkFiles:
    files = find_models(models)
    convert_originals(files, lambda message: print(message, file=sys.stderr))
    return NetworkFiles(*(files.require(part) for part in ("face_pack", "deca", "flame")))


def _check_captions(listing: Listing, folders: Sequence[Path], blip2: Path | None) -> None:
    if blip2:
        check_blip2(blip2)
        return
    missing = [(person, photo) for person in listing.people for photo in person.photos if photo.caption is None]
    if missing:
        person, photo = missing[0]
        path = folders[person.folder] / photo.path
        raise FaceSnapError(
            f"{len(missing)} photos, such as {path}, have no caption; add one next to each photo as {path.stem}.txt or "
            f"{path.stem}.caption, or pass a folder with BLIP-2 as --blip2."
        )


def _fingerprints(files: NetworkFiles, blip2: Path | None) -> dict[str, Any]:
    """Identify the networks by their content, but BLIP-2, which is large, by file names and sizes."""
    fingerprints: dict[str, Any] = network_hashes(files)
    detector = pack_files(files.face_pack).detector
    fingerprints["detector"] = "" if detector is None else file_hash(detector)
    if blip2:
        fingerprints["blip2"] = {file.name: file.stat().st_size for file in sorted(blip2.glob("*")) if file.is_file()}
    return fingerprints


def _remove_partial_files(out: Path) -> None:
    """Remove the incomplete files of a killed build.

    Raises:
        FaceSnapError: the folder is not empty and contains no plan.
    """
    for part in (*out.glob(".*.part"), *out.glob("work/.*.part")):
        part.unlink(missing_ok=True)
    if not (out / plan.FILE_NAME).exists():
        foreign = [path for path in (*out.iterdir(), *out.glob("work/*")) if path.name not in ("work", "lock")]
        if foreign:
            raise FaceSnapError(f"{out} contains {foreign[0].name}, but no build plan; choose an empty folder.")


def _scan_all(paths: Paths, shards: Sequence[PlannedShard], run_jobs: RunJobs) -> None:
    remaining = [planned for planned in shards if not paths.scans(planned).exists()]
    with _progress_bar("reading", shards, remaining) as bar:
        run_jobs(scan_shard, [(paths, planned) for planned in remaining], bar.update)


def scan_shard(job: tuple[Paths, PlannedShard], tick: Tick) -> None:
    """Scan the photos of a shard for the first time."""
    paths, planned = job
    lines = []
    for person, photo in planned.photos:
        lines.append(json.dumps(asdict(scan_photo(paths.photo(person, photo)))))
        tick()
    write_text(paths.scans(planned), "\n".join(lines) + "\n")


def _read_scans(paths: Paths, planned: PlannedShard) -> list[PhotoScan]:
    lines = paths.scans(planned).read_text(encoding="utf-8").splitlines()
    return [PhotoScan(**json.loads(line)) for line in lines]


def _rejected(paths: Paths, shards: Sequence[PlannedShard], exclusions: Exclusions | None) -> dict[Path, SkippedPhoto]:
    """Return the photos to skip as left out or as duplicates."""
    photos: list[ScannedPhoto] = []
    left_out: dict[Path, SkippedPhoto] = {}
    matched: set[str] = set()
    for planned in shards:
        scans = iter(_read_scans(paths, planned))
        for number, person in enumerate(planned.people, planned.first):
            for photo in person.photos:
                path, scan = paths.photo(person, photo), next(scans)
                photos.append(ScannedPhoto(number, path, scan, photo.origin.source if photo.origin else ""))
                if exclusions and (entries := exclusions.matches(person.name, scan.content)):
                    matched |= entries
                    left_out[path] = SkippedPhoto(LEFT_OUT, f"{exclusions.path} lists {min(entries)}.")
    if exclusions and (unmatched := exclusions.describe_unmatched(matched)):
        print(unmatched, file=sys.stderr)
    return find_duplicates(photos, left_out)


def _caption_all(paths: Paths, shards: Sequence[PlannedShard], rejected: dict[Path, SkippedPhoto], blip2: Path) -> None:
    """Caption photos in the current process only, because BLIP-2 fills a GPU."""
    remaining = [planned for planned in shards if not paths.captions(planned).exists()]
    if not any(photo.caption is None for planned in remaining for _, photo in planned.photos):
        return
    captioner = load_blip2(blip2)
    with _progress_bar("captions", shards, remaining) as bar:
        for planned in remaining:
            photos = [paths.photo(person, photo) for person, photo in planned.photos]
            scans = _read_scans(paths, planned)
            captions: list[str | None] = [None] * len(photos)
            uncaptioned = [
                i
                for i, (_, photo) in enumerate(planned.photos)
                if photo.caption is None and not scans[i].problem and photos[i] not in rejected
            ]
            bar.update(len(photos) - len(uncaptioned))
            for start in range(0, len(uncaptioned), CAPTION_BATCH):
                batch = uncaptioned[start : start + CAPTION_BATCH]
                texts = captioner([reread(photos[i], scans[i]).pixels for i in batch])
                for i, text in zip(batch, texts):
                    captions[i] = text
                bar.update(len(batch))
            write_text(paths.captions(planned), json.dumps(captions, ensure_ascii=False, indent=0))


def _build_all(
    paths: Paths,
    shards: Sequence[PlannedShard],
    files: NetworkFiles,
    settings: Settings,
    rejected: dict[Path, SkippedPhoto],
    run_jobs: RunJobs,
) -> None:
    remaining = [planned for planned in shards if not paths.finished(planned).exists()]
    jobs = []
    for planned in remaining:
        photos = [paths.photo(person, photo) for person, photo in planned.photos]
        own = {path: rejected[path] for path in photos if path in rejected}
        jobs.append(ShardJob(planned, paths, files, settings, own))
    with _progress_bar("shards", shards, remaining) as bar:
        run_jobs(build_shard, jobs, bar.update)


def build_shard(job: ShardJob, tick: Tick) -> None:
    """Build a shard and, once it is complete, mark it as finished."""
    skipped: list[dict[str, str]] = []
    people: set[str] = set()

    def samples() -> Iterator[Sample]:
        for person, path, images in _images_by_photo(job):
            if isinstance(images, SkippedPhoto):
                skipped.append({"file": str(path), **asdict(images)})
            else:
                people.add(person.name)
                yield from images
            tick()

    shard = job.paths.shard(job.planned)
    try:
        count = write_shard(shard, samples(), job.settings.jpeg)
    except OSError as error:
        raise plan.write_error(shard, error) from error
    summary = {"images": count, "people": len(people), "skipped": skipped}
    write_text(job.paths.finished(job.planned), json.dumps(summary, ensure_ascii=False))


def _images_by_photo(job: ShardJob) -> Iterator[tuple[Person, Path, Iterator[Sample] | SkippedPhoto]]:
    """Yield each photo of a shard with its training images, or with the reason for skipping it."""
    scans = _read_scans(job.paths, job.planned)
    file = job.paths.captions(job.planned)
    captions = json.loads(file.read_text(encoding="utf-8")) if file.exists() else [None] * len(scans)
    scanned = zip(scans, captions)
    for number, person in enumerate(job.planned.people, job.planned.first):
        for position, photo in enumerate(person.photos):
            scan, caption = next(scanned)
            yield person, job.paths.photo(person, photo), _images_of(job, number, person, position, scan, caption)


def _images_of(
    job: ShardJob, number: int, person: Person, position: int, scan: PhotoScan, caption: str | None
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


def _write_report(paths: Paths, shards: Sequence[PlannedShard], listing: Listing) -> dict[str, Any]:
    finished = [json.loads(paths.finished(planned).read_text(encoding="utf-8")) for planned in shards]
    skipped = [line for shard in finished for line in shard["skipped"]]
    skipped += [
        {"file": str(path), "reason": "not a photo", "message": "It is neither a photo nor a photo's caption."}
        for path in listing.others
    ]
    report = paths.out / "report.jsonl"
    write_text(report, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped))
    summary = {
        "photos": sum(len(planned.photos) for planned in shards),
        "people": sum(shard["people"] for shard in finished),
        "images": sum(shard["images"] for shard in finished),
        "shards": sum(shard["images"] > 0 for shard in finished),
        "skipped": dict(sorted(Counter(line["reason"] for line in skipped).items())),
        "report": str(report),
    }
    if not summary["images"]:
        raise FaceSnapError(
            f"None of the {summary['photos']} photos can be used; see {report} for the reasons, and choose other "
            "photos."
        )
    return summary


def _progress_bar(what: str, shards: Sequence[PlannedShard], remaining: Sequence[PlannedShard]) -> Any:
    from tqdm import tqdm

    total = sum(len(planned.photos) for planned in shards)
    done = total - sum(len(planned.photos) for planned in remaining)
    return tqdm(desc=what, unit="photo", total=total, initial=done)
