"""Build the shards that `facesnap train` reads from folders of photos.

    plan.jsonl           the shard of each photo; written first, and compared when a build is continued
    work/scans-*.jsonl   the results of the first scan of a shard's photos
    work/captions-*.json BLIP-2's captions of a shard's photos, for those without a caption file
    shard-*.tar          always complete
    shard-*.index.json   the positions of the images in a shard, see `training.shard_positions`
    work/shard-*.json    marks a shard as finished, and lists the skipped photos
    report.jsonl         all skipped photos, with reasons

Folders are local or in an object store. Each shard is built by one process, using only the plan and the shard's photos.
Neither the number of processes and machines nor interruptions change a byte of the shards.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from facesnap_ext.convert import convert_originals
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.search import find_models
from facesnap_lab.dataset import plan
from facesnap_lab.dataset.captions import check_blip2, load_blip2
from facesnap_lab.dataset.images import NetworkFiles, Settings
from facesnap_lab.dataset.jobs import Job, Paths, build_shard, caption_shard, fingerprints, read_scans, scan_shard
from facesnap_lab.dataset.layouts import Listing, list_people
from facesnap_lab.dataset.manifest import add_origins
from facesnap_lab.dataset.plan import PlannedShard, write_text
from facesnap_lab.dataset.scan import LEFT_OUT, ScannedPhoto, SkippedPhoto, find_duplicates
from facesnap_lab.storage import Location, Url, file_names
from facesnap_lab.training.exclusions import Exclusions, read_exclusions
from facesnap_lab.workers import RunTasks, Task, open_workers

PER_SHARD = 200  # default number of photos; with five images of 1024² each, a shard is about 1 GB of PNG


def build(
    folders: Sequence[Location],
    out: Location,
    models: Path,
    settings: Settings,
    per_shard: int = PER_SHARD,
    layout: str = "auto",
    identities: Location | None = None,
    manifest: Location | None = None,
    exclude: Location | None = None,
    blip2: Path | None = None,
    workers: int = 1,
    scheduler: str = "",
) -> dict[str, Any]:
    """Build shards, or continue an interrupted build.

    Args:
        folders, layout, identities: as for `layouts.list_people`.
        per_shard: minimum number of photos per shard. A person's photos are never split between shards.
        manifest: file with the origin of every photo, see `manifest.read_manifest`.
        exclude: file with people and photos to leave out, see `exclusions.read_exclusions`.
        blip2: folder with BLIP-2, for photos without a caption file.
        workers: number of single-threaded processes. With 0, everything runs in the current process.
        scheduler: address of a dask scheduler, whose workers are used instead. They must find all folders and models
            under the same names.

    Returns:
        The numbers of photos, people, images and shards, and of skipped photos by reason.

    Raises:
        FaceSnapError: photos or models are missing, the disk is full, processes died, an object store or the cluster
            cannot be used, or photos or settings differ from those with which the build was started.
    """
    files = find_networks(models)
    if scheduler:  # its workers have other working directories
        folders, out, blip2 = [_absolute(folder) for folder in folders], _absolute(out), blip2 and blip2.absolute()
    listing = list_people(folders, layout, identities)
    if manifest:
        listing = add_origins(listing, folders, manifest)
    exclusions = read_exclusions(exclude) if exclude else None
    check_captions(listing, folders, blip2)
    shards = plan.divide_into_shards(listing.people, per_shard)
    networks = fingerprints(files, blip2)
    all_settings = {**asdict(settings), "per_shard": per_shard, **networks}
    if exclusions:
        all_settings["exclude"] = exclusions.digest
    paths = Paths(tuple(folders), out)
    jobs = [Job(planned, paths, files, settings, blip2, networks) for planned in shards]
    try:
        with _locked(out):
            plan.write_or_compare(out, all_settings, folders, shards)
            with open_workers(min(workers, len(shards)), scheduler) as run_tasks:
                _run("reading", scan_shard, jobs, paths.scans, run_tasks)
                jobs = _reject(jobs, exclusions)
                if any(photo.caption is None for planned in shards for _, photo in planned.photos):
                    with open_workers(workers, scheduler, gpu=True) as run_on_gpus:
                        _run("captions", caption_shard, jobs, paths.captions, run_on_gpus)
                    load_blip2.cache_clear()  # frees the GPU
                _run("shards", build_shard, jobs, paths.finished, run_tasks)
            return _write_report(paths, shards, listing)
    except OSError as error:
        raise plan.write_error(out, error) from error


def _absolute(path: Location) -> Location:
    return path if isinstance(path, Url) else path.absolute()


def find_networks(models: Path) -> NetworkFiles:
    """Return the files of the face model pack, DECA and FLAME in a folder. Original files are converted.

    Raises:
        FaceSnapError: one is missing.
    """
    files = find_models(models.absolute())
    convert_originals(files, lambda message: print(message, file=sys.stderr))
    return NetworkFiles(*(files.require(part) for part in ("face_pack", "deca", "flame")))


def check_captions(listing: Listing, folders: Sequence[Location], blip2: Path | None) -> None:
    """Check that every photo has a caption file, or that BLIP-2 can be used.

    Raises:
        FaceSnapError: neither is the case.
    """
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


@contextmanager
def _locked(out: Location) -> Iterator[None]:
    """Create the output folder and lock it. An object store has no locks; two builds would write the same files.

    Raises:
        FaceSnapError: another build is using the folder, or it is not empty and contains no plan.
    """
    from filelock import FileLock, Timeout

    if isinstance(out, Url):
        _check_empty(out, out.list_files())
        yield
        return
    (out / "work").mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / "work" / "lock", timeout=0):
            _remove_partial_files(out)
            _check_empty(out, [path.name for path in (*out.iterdir(), *out.glob("work/*"))])
            try:
                yield
            finally:
                _remove_partial_files(out)
    except Timeout:
        raise FaceSnapError(f"Another build is writing to {out}; wait for it, or choose another folder.") from None


def _check_empty(out: Location, files: Iterable[str]) -> None:
    present = set(files) - {"work", "lock"}
    if present and plan.FILE_NAME not in present:
        raise FaceSnapError(f"{out} contains {min(present)}, but no build plan; choose an empty folder.")


def _remove_partial_files(out: Path) -> None:
    """Remove the incomplete files of killed processes."""
    for part in (*out.glob(".*.part"), *out.glob("work/.*.part")):
        part.unlink(missing_ok=True)


def _run(
    title: str,
    work: Callable[[Job], None],
    jobs: Sequence[Job],
    result: Callable[[PlannedShard], Location],
    run_tasks: RunTasks,
) -> None:
    """Run the jobs whose result does not exist yet."""
    from tqdm import tqdm

    present = file_names(jobs[0].paths.out / "work")
    tasks = [Task(job.paths.shard(job.planned).name, len(job.planned.photos), job) for job in jobs]
    remaining = [task for task, job in zip(tasks, jobs) if result(job.planned).name not in present]
    total = sum(task.size for task in tasks)
    done = total - sum(task.size for task in remaining)
    with tqdm(desc=title, unit="photo", total=total, initial=done) as bar:
        run_tasks(work, remaining, bar.update)


def _reject(jobs: Sequence[Job], exclusions: Exclusions | None) -> list[Job]:
    """Find the photos to skip as left out or as duplicates, and return each job with its own ones."""
    photos: list[ScannedPhoto] = []
    left_out: dict[Location, SkippedPhoto] = {}
    matched: set[str] = set()
    for job in jobs:
        scans = iter(read_scans(job.paths, job.planned))
        for number, person in enumerate(job.planned.people, job.planned.first):
            for photo in person.photos:
                path, scan = job.paths.photo(person, photo), next(scans)
                photos.append(ScannedPhoto(number, path, scan, photo.origin.source if photo.origin else ""))
                if exclusions and (entries := exclusions.matches(person.name, scan.content)):
                    matched |= entries
                    left_out[path] = SkippedPhoto(LEFT_OUT, f"{exclusions.path} lists {min(entries)}.")
    if exclusions and (unmatched := exclusions.describe_unmatched(matched)):
        print(unmatched, file=sys.stderr)
    rejected = find_duplicates(photos, left_out)
    own = [[job.paths.photo(person, photo) for person, photo in job.planned.photos] for job in jobs]
    return [
        replace(job, rejected={path: rejected[path] for path in paths if path in rejected})
        for job, paths in zip(jobs, own)
    ]


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
