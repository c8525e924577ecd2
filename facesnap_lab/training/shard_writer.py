"""Writing WebDataset shards in the format of `shards.py`, and an index for each."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from facesnap_lab.storage import Location, write
from facesnap_lab.training.shard_positions import Label, read_headers, write_index
from facesnap_lab.training.shards import Sample, person_key


def write_shards(folder: Path, samples: Iterable[Sample], per_shard: int) -> list[Path]:
    """Write samples to `shard-000000.tar` and so on. Equal samples produce identical files.

    Args:
        samples: ordered by person. The key's part before the last "-" identifies the person.
        per_shard: minimum number of samples per shard. A person's samples are never split between shards.

    Returns:
        The paths of the shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    writer, written, person = None, 0, None
    try:
        for sample in samples:
            if writer is None or (written >= per_shard and person_key(sample.key) != person):
                if writer is not None:
                    writer.close()
                shards.append(folder / f"shard-{len(shards):06d}.tar")
                writer, written = _tar(str(shards[-1])), 0
            _add(writer, sample)
            written, person = written + 1, person_key(sample.key)
    finally:
        if writer is not None:
            writer.close()
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
