"""Writing WebDataset shards in the format of `shards.py`, and an index for each."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image

from facesnap_lab.storage import Location, Url, write
from facesnap_lab.training.shard_positions import Label, read_headers, write_index
from facesnap_lab.training.shards import Sample, person_key

PathOrUrl = TypeVar("PathOrUrl", Path, Url)


def write_shards(
    folder: PathOrUrl, samples: Iterable[Sample], per_shard: int, jpeg: int | None = None
) -> list[PathOrUrl]:
    """Write samples to `shard-000000.tar` and so on. Equal samples produce identical files.

    Args:
        samples: ordered by person. The key's part before the last "-" identifies the person.
        per_shard: minimum number of samples per shard. A person's samples are never split between shards.
        jpeg: see `write_shard`.

    Returns:
        The paths of the shards.
    """
    people = groupby(samples, lambda sample: person_key(sample.key))
    shards: list[PathOrUrl] = []

    def next_samples() -> Iterator[Sample]:
        written = 0
        for _, own in people:
            for sample in own:
                yield sample
                written += 1
            if written >= per_shard:
                return

    while write_shard(path := folder / f"shard-{len(shards):06d}.tar", next_samples(), jpeg):
        shards.append(path)
    return shards


def write_shard(path: Location, samples: Iterable[Sample], jpeg: int | None = None) -> int:
    """Write one shard in the format of `write_shards`, and then its index, each completely or not at all.

    Args:
        jpeg: JPEG quality of the images, without chroma subsampling; None for PNG.

    Returns:
        The number of samples. If it is 0, no file is written.

    Raises:
        OSError: the disk is full or not writable.
        FaceSnapError: the object store fails.
    """
    remaining = iter(samples)
    first = next(remaining, None)
    if first is None:
        return 0
    labels: list[Label] = []
    with write(path) as file:
        writer = _tar(file)
        try:
            for sample in chain((first,), remaining):
                _add(writer, sample, jpeg)
                labels.append((sample.person, dict(sample.provenance)))
        finally:
            writer.close()
        file.flush()
        size, positions = file.tell(), list(read_headers(Path(file.name)))
    write_index(path, size, positions, labels)
    return len(labels)


def _tar(target: str | BinaryIO) -> Any:
    from webdataset import TarWriter

    # without user, group and time, the file depends only on the samples
    return TarWriter(target, user="", group="", mode=0o644, mtime=0, encoder=False)


def _add(writer: Any, sample: Sample, jpeg: int | None = None) -> None:
    writer.write({"__key__": sample.key, **_members(sample, jpeg)})


def _members(sample: Sample, jpeg: int | None = None) -> dict[str, bytes]:
    array = io.BytesIO()
    np.save(array, np.asarray(sample.embedding, np.float32))
    metadata = {
        "caption": sample.caption,
        "person": sample.person,
        "points": np.asarray(sample.points, np.float64).round(4).tolist(),
        "box": np.asarray(sample.box, np.float64).round(4).tolist(),
        "networks": dict(sample.networks),
        "digest": hashlib.sha256(array.getvalue()).hexdigest(),
        **({"provenance": dict(sample.provenance)} if sample.provenance else {}),
    }
    image = {"png": _png(sample.image)} if jpeg is None else {"jpg": _jpeg(sample.image, jpeg)}
    return {
        **image,
        "mask.png": _png(sample.mask),
        "npy": array.getvalue(),
        "json": json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode(),
    }


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=quality, subsampling=0)
    return buffer.getvalue()
