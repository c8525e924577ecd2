"""How many training images per second the loader delivers, from local shards and from an object store.

python -m facesnap_lab.benchmarks.loader OUT --url s3://bucket/folder --step 1.2 --images 8

The shards contain one photograph, turned and with new noise for each image, so that files have the size of real ones.
`--step` and `--images` are the seconds and images of a step, from `facesnap train --estimate` on the machine that
trains. The reading of a step's images must not take longer than the step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage.data import astronaut

from facesnap_lab.markdown import markdown_table
from facesnap_lab.storage import Location, location, size
from facesnap_lab.training.data import ImageSizes, TrainingImages, batch_rows, read_batches
from facesnap_lab.training.shard_writer import write_shards
from facesnap_lab.training.shards import Sample, read_shard_index

SHOTS = 4  # images of each person
PER_SHARD = 50
EMBEDDING = 512
NOISE = 2.0  # standard deviation, of 255: a camera's at a low sensitivity
FORMATS = {"PNG": None, "JPEG": 95}  # and their qualities


def samples(count: int, side: int) -> Iterator[Sample]:
    """Yield images of people with the file sizes of photographs."""
    photo = np.asarray(Image.fromarray(astronaut()).resize((side, side), Image.Resampling.LANCZOS), np.float32)
    mask = np.zeros((side, side), np.uint8)
    mask[side // 4 : side // 2, side // 4 : side // 2] = 255
    for number in range(count):
        rng = np.random.default_rng(number)
        noisy = np.rot90(photo, number % 4) + rng.normal(0, NOISE, photo.shape).astype(np.float32)
        yield Sample(
            key=f"{number // SHOTS:06d}-{number % SHOTS:02d}",
            image=np.clip(noisy, 0, 255).astype(np.uint8),
            mask=mask,
            embedding=rng.standard_normal(EMBEDDING).astype(np.float32),
            caption="a portrait",
            person=f"{number // SHOTS:06d}",
            points=rng.uniform(side / 4, side / 2, (72, 2)).astype(np.float32),
            box=np.float32([side / 4, side / 4, side / 2, side / 2]),
        )


def measure(shards: Sequence[Location], side: int, workers: int, batch: int, batches: int) -> float:
    """Return images per second, after a first batch, which also starts the workers."""
    sizes = ImageSizes(resolution=side, latent_side=side // 8, landmark_side=side, clip_side=224)
    images = TrainingImages(read_shard_index(shards), sizes, 0, "other", "drawn", 0.0)
    reading = read_batches(images, batch_rows(batch, 0, 1, 0, batches + max(workers, 1)), workers)
    for _ in range(max(workers, 1)):  # each worker's first
        next(reading)
    began = time.perf_counter()
    count = sum(len(one.captions) for one in reading)
    return count / (time.perf_counter() - began)


def compare(folders: Sequence[Location], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each storage, format and number of workers, in turn."""
    rows = []
    for folder in folders:
        for name, quality in FORMATS.items():
            images = samples(options.count, options.side)
            shards = write_shards(folder / name.lower(), images, PER_SHARD, quality)
            megabytes = sum(map(size, shards)) / 1e6 / options.count
            for workers in options.workers:
                speed = measure(shards, options.side, workers, options.batch, options.batches)
                rows.append(
                    {
                        "folder": str(folder),
                        "format": name,
                        "megabytes_per_image": megabytes,
                        "workers": workers,
                        "images_per_second": speed,
                    }
                )
                if options.step:
                    rows[-1]["of_the_need"] = speed / (options.images / options.step)
    return rows


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    needed = "of_the_need" in rows[0]
    head = ["MB per image", "workers", "images/s", *(["of what a step needs"] if needed else [])]
    lines = []
    for row in rows:
        cells = [f"{row['megabytes_per_image']:.2f}", str(row["workers"]), f"{row['images_per_second']:.1f}"]
        lines.append(
            (f"{row['folder']}, {row['format']}", [*cells, *([f"{row['of_the_need']:.1f} ×"] if needed else [])])
        )
    return "\n".join(markdown_table(head, lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast training images are read.")
    parser.add_argument("out", type=Path, help="folder for local shards")
    parser.add_argument("--url", help="also measure shards in this folder of an object store")
    parser.add_argument("--count", type=int, default=200, help="number of images in the shards")
    parser.add_argument("--side", type=int, default=1024, help="of an image, in pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--batches", type=int, default=20, help="number of batches that are measured")
    parser.add_argument("--step", type=float, help="seconds of a training step")
    parser.add_argument("--images", type=int, default=8, help="images of a training step in one process")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    folders = [options.out, *([location(options.url)] if options.url else [])]
    rows = compare(folders, options)
    print(json.dumps(rows, indent=2) if options.json else as_text(rows))


if __name__ == "__main__":
    main()
