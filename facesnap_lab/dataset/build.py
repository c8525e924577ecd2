"""Build the shards that `facesnap train` reads from folders of photos.

    plan.jsonl           which photo is in which shard: written first, compared when a build goes on
    work/looks-*.jsonl   what the first look at each photo of a shard found
    work/captions-*.json BLIP-2's captions of a shard's photos, where they have none beside them
    shard-*.tar          whole, or not there
    work/shard-*.json    that a shard is done, with the photos that gave no picture
    report.jsonl         all photos that gave no picture, and why

A shard is made by one process from the plan and its photos alone: the number of processes, and how often the build was
killed, change no byte of it.
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
from facesnap_ext.files import sha256
from facesnap_ext.weights.search import find_models
from facesnap_lab.dataset import plan
from facesnap_lab.dataset.captions import check_blip2, load_blip2, read_caption
from facesnap_lab.dataset.layouts import Listing, Person, PhotoFile, list_people
from facesnap_lab.dataset.pictures import NetworkFiles, Settings, load_networks, pictures_of
from facesnap_lab.dataset.plan import Unit, write_whole
from facesnap_lab.dataset.pool import Run, processes
from facesnap_lab.dataset.scan import Drop, Look, find_duplicates, look, read_again
from facesnap_lab.training.shards import Sample, write_shard

PER_SHARD = 200  # photos, by default: with five pictures of 1024² each about a gigabyte of PNG
CAPTIONED = 8  # photos that BLIP-2 sees at once

Tick = Callable[[], None]


@dataclass(frozen=True)
class Source:
    """Where everything lies. `folders` are those of the photos."""

    folders: tuple[Path, ...]
    out: Path

    def photo(self, person: Person, photo: PhotoFile) -> Path:
        return self.folders[person.folder] / photo.path

    def looks(self, unit: Unit) -> Path:
        return self.out / "work" / f"looks-{unit.number:06d}.jsonl"

    def captions(self, unit: Unit) -> Path:
        return self.out / "work" / f"captions-{unit.number:06d}.json"

    def done(self, unit: Unit) -> Path:
        return self.out / "work" / f"shard-{unit.number:06d}.json"

    def shard(self, unit: Unit) -> Path:
        return self.out / f"shard-{unit.number:06d}.tar"


@dataclass(frozen=True)
class Job:
    """What a process needs to make a shard; `drops` are the photos that are there already."""

    unit: Unit
    source: Source
    files: NetworkFiles
    settings: Settings
    drops: dict[Path, Drop]


def build(
    folders: Sequence[Path],
    out: Path,
    models: Path,
    settings: Settings,
    per_shard: int = PER_SHARD,
    layout: str = "auto",
    identities: Path | None = None,
    blip2: Path | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Build shards, or go on where a build was left.

    Args:
        folders, layout, identities: as for `layouts.list_people`.
        per_shard: photos after which a new shard begins, but not before the person's last.
        blip2: a folder with BLIP-2, for photos that have no caption beside them.
        workers: processes, of one thread each; with 0 everything is done in this one.

    Returns:
        Counts of photos, people and pictures, and of the photos that gave none, by reason.

    Raises:
        FaceSnapError: there is nothing to build from or with, the disk is full, a process died, or photos or settings
            are others than those that the build was begun with.
    """
    from filelock import FileLock, Timeout

    files = _network_files(models)
    listing = list_people(folders, layout, identities)
    _check_captions(listing, folders, blip2)
    units = plan.divide(listing.people, per_shard)
    fixed = {**asdict(settings), "per_shard": per_shard, **_fingerprints(files, blip2)}
    source = Source(tuple(folders), out)
    try:
        (out / "work").mkdir(parents=True, exist_ok=True)
        with FileLock(out / "work" / "lock", timeout=0):
            _clear(out)
            plan.fix(out, fixed, folders, units)
            with processes(workers, len(units)) as run:
                _look_at_all(source, units, run)
                drops = _duplicates(source, units)
                if blip2:
                    _caption_all(source, units, drops, blip2)
                _make_all(source, units, files, settings, drops, run)
            return _report(source, units, listing)
    except Timeout:
        raise FaceSnapError(f"Another build is writing to {out}; wait for it, or name another folder.") from None
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
    bare = [(person, photo) for person in listing.people for photo in person.photos if photo.caption is None]
    if bare:
        person, photo = bare[0]
        path = folders[person.folder] / photo.path
        raise FaceSnapError(
            f"{len(bare)} photos, such as {path}, have no caption; put it beside the photo as {path.stem}.txt or "
            f"{path.stem}.caption, or name a folder with BLIP-2 by --blip2."
        )


def _fingerprints(files: NetworkFiles, blip2: Path | None) -> dict[str, Any]:
    """What tells the networks' files from others: their contents, but BLIP-2's names and sizes, which is large."""
    found: dict[str, Any] = {}
    for part, path in vars(files).items():
        found[part] = sha256(*(sorted(path.rglob("*.onnx")) if path.is_dir() else [path]))
    if blip2:
        found["blip2"] = {file.name: file.stat().st_size for file in sorted(blip2.glob("*")) if file.is_file()}
    return found


def _clear(out: Path) -> None:
    """Remove what a killed build left half-written.

    Raises:
        FaceSnapError: there is something in the folder, and no plan of it.
    """
    for part in (*out.glob(".*.part"), *out.glob("work/.*.part")):
        part.unlink(missing_ok=True)
    if not (out / plan.NAME).exists():
        foreign = [path for path in (*out.iterdir(), *out.glob("work/*")) if path.name not in ("work", "lock")]
        if foreign:
            raise FaceSnapError(f"{out} has {foreign[0].name} in it, but no plan of a build; name an empty folder.")


def _look_at_all(source: Source, units: Sequence[Unit], run: Run) -> None:
    left = [unit for unit in units if not source.looks(unit).exists()]
    with _bar("reading", units, left) as bar:
        run(look_at, [(source, unit) for unit in left], bar.update)


def look_at(job: tuple[Source, Unit], tick: Tick) -> None:
    """The first look at the photos of a shard."""
    source, unit = job
    lines = []
    for person, photo in unit.photos:
        lines.append(json.dumps(asdict(look(source.photo(person, photo)))))
        tick()
    write_whole(source.looks(unit), "\n".join(lines) + "\n")


def _looks(source: Source, unit: Unit) -> list[Look]:
    lines = source.looks(unit).read_text(encoding="utf-8").splitlines()
    return [Look(**json.loads(line)) for line in lines]


def _duplicates(source: Source, units: Sequence[Unit]) -> dict[Path, Drop]:
    def photos() -> Iterator[tuple[int, Path, Look]]:
        for unit in units:
            looks = iter(_looks(source, unit))
            for number, person in enumerate(unit.people, unit.first):
                for photo in person.photos:
                    yield number, source.photo(person, photo), next(looks)

    return find_duplicates(photos())


def _caption_all(source: Source, units: Sequence[Unit], drops: dict[Path, Drop], blip2: Path) -> None:
    """One process serves BLIP-2, which fills a GPU by itself."""
    left = [unit for unit in units if not source.captions(unit).exists()]
    if not any(photo.caption is None for unit in left for _, photo in unit.photos):
        return
    captioner = load_blip2(blip2)
    with _bar("captions", units, left) as bar:
        for unit in left:
            paths = [source.photo(person, photo) for person, photo in unit.photos]
            looks = _looks(source, unit)
            texts: list[str | None] = [None] * len(paths)
            wanted = [
                i
                for i, (_, photo) in enumerate(unit.photos)
                if photo.caption is None and not looks[i].problem and paths[i] not in drops
            ]
            bar.update(len(paths) - len(wanted))
            for start in range(0, len(wanted), CAPTIONED):
                batch = wanted[start : start + CAPTIONED]
                found = captioner([read_again(paths[i], looks[i]).pixels for i in batch])
                for i, text in zip(batch, found):
                    texts[i] = text
                bar.update(len(batch))
            write_whole(source.captions(unit), json.dumps(texts, ensure_ascii=False, indent=0))


def _make_all(
    source: Source,
    units: Sequence[Unit],
    files: NetworkFiles,
    settings: Settings,
    drops: dict[Path, Drop],
    run: Run,
) -> None:
    left = [unit for unit in units if not source.done(unit).exists()]
    jobs = []
    for unit in left:
        paths = [source.photo(person, photo) for person, photo in unit.photos]
        jobs.append(Job(unit, source, files, settings, {path: drops[path] for path in paths if path in drops}))
    with _bar("shards", units, left) as bar:
        run(make_shard, jobs, bar.update)


def make_shard(job: Job, tick: Tick) -> None:
    """Make a shard and, when it is whole, note that it is done."""
    left_out: list[dict[str, str]] = []
    people: set[str] = set()

    def samples() -> Iterator[Sample]:
        for person, path, pictures in _pictures(job):
            if isinstance(pictures, Drop):
                left_out.append({"file": str(path), **asdict(pictures)})
            else:
                people.add(person.name)
                yield from pictures
            tick()

    shard = job.source.shard(job.unit)
    try:
        written = write_shard(shard, samples(), job.settings.jpeg)
    except OSError as error:
        raise plan.write_error(shard, error) from error
    done = {"pictures": written, "people": len(people), "left_out": left_out}
    write_whole(job.source.done(job.unit), json.dumps(done, ensure_ascii=False))


def _pictures(job: Job) -> Iterator[tuple[Person, Path, Iterator[Sample] | Drop]]:
    """Each photo of a shard with its pictures, or with why it has none."""
    looks = _looks(job.source, job.unit)
    captions = job.source.captions(job.unit)
    texts = json.loads(captions.read_text(encoding="utf-8")) if captions.exists() else [None] * len(looks)
    found = zip(looks, texts)
    for number, person in enumerate(job.unit.people, job.unit.first):
        for place, photo in enumerate(person.photos):
            yield person, job.source.photo(person, photo), _pictures_of(job, number, person, place, *next(found))


def _pictures_of(
    job: Job, number: int, person: Person, place: int, seen: Look, caption: str | None
) -> Iterator[Sample] | Drop:
    photo, count = person.photos[place], job.settings.crops
    path = job.source.photo(person, photo)
    if seen.problem:
        return Drop("unreadable", seen.problem)
    if path in job.drops:
        return job.drops[path]
    if photo.caption is not None:
        try:
            caption = read_caption(job.source.folders[person.folder] / photo.caption)
        except ValueError as error:
            return Drop("no caption", str(error))
    if not caption:
        return Drop("no caption", "BLIP-2 says nothing of it.")
    keys = [f"{number:06d}-{place * count + crop:05d}" for crop in range(count)]
    networks = load_networks(job.files, job.settings.device)
    return pictures_of(networks, job.settings, read_again(path, seen), caption, person.name, keys)


def _report(source: Source, units: Sequence[Unit], listing: Listing) -> dict[str, Any]:
    done = [json.loads(source.done(unit).read_text(encoding="utf-8")) for unit in units]
    left_out = [line for unit in done for line in unit["left_out"]]
    left_out += [
        {"file": str(path), "reason": "no photo", "message": "It is neither a photo nor the caption of one."}
        for path in listing.others
    ]
    report = source.out / "report.jsonl"
    write_whole(report, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in left_out))
    summary = {
        "photos": sum(len(unit.photos) for unit in units),
        "people": sum(unit["people"] for unit in done),
        "pictures": sum(unit["pictures"] for unit in done),
        "shards": sum(unit["pictures"] > 0 for unit in done),
        "left out": dict(sorted(Counter(line["reason"] for line in left_out).items())),
        "report": str(report),
    }
    if not summary["pictures"]:
        raise FaceSnapError(
            f"None of the {summary['photos']} photos gives a picture; {report} says why of each, so give other photos."
        )
    return summary


def _bar(what: str, units: Sequence[Unit], left: Sequence[Unit]) -> Any:
    from tqdm import tqdm

    total = sum(len(unit.photos) for unit in units)
    return tqdm(desc=what, unit="photo", total=total, initial=total - sum(len(unit.photos) for unit in left))
