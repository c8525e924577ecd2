"""How long a build takes and how large its shards are, from a sample of the photos."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.dataset.build import check_captions, find_networks
from facesnap_lab.dataset.captions import load_blip2
from facesnap_lab.dataset.images import Settings, load_networks
from facesnap_lab.dataset.jobs import Job, Paths, build_shard, caption_shard, fingerprints, scan_shard
from facesnap_lab.dataset.layouts import Person, list_people
from facesnap_lab.dataset.plan import PlannedShard
from facesnap_lab.markdown import markdown_table
from facesnap_lab.storage import Location, size

SIZES = (10**5, 10**6, 10**7, 10**8)  # photos


@dataclass(frozen=True)
class Rates:
    """What was measured on this machine, per photo.

    Attributes:
        reading: seconds of one process for the first scan.
        building: seconds of one process for finding the face, cutting the crops and writing them.
        captioning: seconds of BLIP-2 on this machine's GPU or, without one, CPU; 0 if all photos have captions.
        images: training images.
        shard_bytes: size of the shards.
        photo_bytes: size of the photo, which is read twice, and three times if BLIP-2 captions it.
    """

    reading: float
    captioning: float
    building: float
    images: float
    shard_bytes: float
    photo_bytes: float


def estimate(
    folders: Sequence[Location],
    models: Path,
    settings: Settings,
    *,
    layout: str = "auto",
    identities: Location | None = None,
    blip2: Path | None = None,
    workers: int = 1,
    sample: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """Build a sample of the photos into a temporary folder, and extrapolate.

    Args:
        folders, layout, identities, blip2: as for `build.build`.
        workers: number of processes of the planned build, each on a core of its own.
        sample: minimum number of photos in the sample, which consists of whole people.

    Returns:
        The rates, and for the photos in the folders and for each of `SIZES` core-hours, hours and GB.

    Raises:
        FaceSnapError: photos or models are missing, or none of the sample's photos can be used.
    """
    files = find_networks(models)
    listing = list_people(folders, layout, identities)
    check_captions(listing, folders, blip2)
    load_networks(files, settings.device)  # not measured: once per process
    people = choose(listing.people, sample, np.random.default_rng(seed))
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "work").mkdir()
        planned = PlannedShard(0, 0, people)
        job = Job(planned, Paths(tuple(folders), Path(temporary)), files, settings, blip2, fingerprints(files, blip2))
        rates = _measure(job)
    photos = sum(len(person.photos) for person in listing.people)
    found = {"sample": len(planned.photos), "workers": workers, "rates": asdict(rates)}
    return {**found, "builds": rows(rates, photos, workers)}


def choose(people: Sequence[Person], photos: int, random: np.random.Generator) -> tuple[Person, ...]:
    """Choose people at random until they have so many photos, or all people."""
    chosen: list[Person] = []
    count = 0
    for index in random.permutation(len(people)):
        if count >= photos:
            break
        chosen.append(people[index])
        count += len(people[index].photos)
    return tuple(chosen)


def _measure(job: Job) -> Rates:
    photos = [photo for _, photo in job.planned.photos]
    uncaptioned = any(photo.caption is None for photo in photos)
    if uncaptioned:
        load_blip2(job.blip2)  # not measured: once per process
    seconds = []
    for work in (scan_shard, caption_shard, build_shard) if uncaptioned else (scan_shard, build_shard):
        began = time.perf_counter()
        work(job)
        seconds.append(time.perf_counter() - began)
    summary = json.loads(job.paths.finished(job.planned).read_text(encoding="utf-8"))
    if not summary["images"]:
        raise FaceSnapError(
            f"None of the {len(photos)} photos in the sample can be used ({summary['skipped'][0]['message']}); choose "
            "other photos."
        )
    return Rates(
        reading=seconds[0] / len(photos),
        captioning=seconds[1] / len(photos) if uncaptioned else 0.0,
        building=seconds[-1] / len(photos),
        images=summary["images"] / len(photos),
        shard_bytes=size(job.paths.shard(job.planned)) / len(photos),
        photo_bytes=sum(photo.size for photo in photos) / len(photos),
    )


def rows(rates: Rates, photos: int, workers: int) -> list[dict[str, Any]]:
    """Return what a build of the folders' photos, and of each of `SIZES`, costs. Processes do not slow each other down
    in this calculation; captions are made by one BLIP-2, one after another."""
    found = []
    for count in (photos, *SIZES):
        core = count * (rates.reading + rates.building) / 3600
        captions = count * rates.captioning / 3600
        found.append(
            {
                "photos": count,
                "images": round(count * rates.images),
                "core_hours": core,
                "caption_hours": captions,
                "hours": core / workers + captions,
                "photos_GB": count * rates.photo_bytes / 1e9,
                "shards_GB": count * rates.shard_bytes / 1e9,
            }
        )
    return found


def as_text(found: Mapping[str, Any]) -> str:
    """Format an estimate as sentences and a table."""
    rates = Rates(**found["rates"])
    captions = f", captioning {1000 * rates.captioning:.0f} ms" if rates.captioning else ""
    head = ["images", "core-hours", "hours of captioning", "hours", "photos, GB", "shards, GB"]
    names = ("core_hours", "caption_hours", "hours", "photos_GB", "shards_GB")
    processes = f"{found['workers']} process{'es' if found['workers'] > 1 else ''}"
    reading, building = (f"{1000 * value:.0f} ms" for value in (rates.reading, rates.building))
    lines = [
        f"Measured with {found['sample']} photos: reading {reading}{captions}, building {building} per photo.",
        f"Hours are those of {processes}, each on a core of its own.",
        "",
    ]
    table = [
        (f"{row['photos']:,} photos", [f"{row['images']:,}", *[f"{row[name]:,.3g}" for name in names]])
        for row in found["builds"]
    ]
    return "\n".join([*lines, *markdown_table(head, table)])
