"""The format in which training pictures lie on the disk: WebDataset shards, written, looked through and read.

A shard is a tar file. A sample's members have the key `PERSON-PICTURE` (`000123-04`) in common and these extensions:

    png, jpg or jpeg  the picture, square
    mask.png          the face's mask, as large as the picture, white inside
    npy               ArcFace embedding of the face [E] float32
    json              {"caption": str, "person": str, "points": [[x, y] * 72], "box": [left, top, right, bottom]},
                      in the picture's pixels

The pictures of one person stand one after another in one shard.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from facesnap_ext.errors import FaceSnapError

PICTURES = ("png", "jpg", "jpeg")
REQUIRED = ("mask.png", "npy", "json")
BLOCK = 512  # tar's unit


@dataclass(frozen=True, eq=False)
class Sample:
    """One training picture of a person.

    key: `PERSON-PICTURE`. picture: [S,S,3] uint8 RGB. mask: [S,S] uint8, 255 on the face. embedding: [E] float32.
    points: [72,2] float32 and box: [4] float32 (left, top, right, bottom) in pixels of the picture.
    """

    key: str
    picture: np.ndarray
    mask: np.ndarray
    embedding: np.ndarray
    caption: str
    person: str
    points: np.ndarray
    box: np.ndarray


def write_shards(folder: Path, samples: Iterable[Sample], per_shard: int) -> list[Path]:
    """Write samples as `shard-000000.tar` and so on; equal samples give equal bytes.

    Args:
        samples: those of one person one after another, their key's part before the last "-" in common.
        per_shard: samples after which a new shard begins, but not before the person's last.

    Returns:
        The shards' paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    writer, written, person = None, 0, None
    try:
        for sample in samples:
            if writer is None or (written >= per_shard and _person(sample.key) != person):
                if writer is not None:
                    writer.close()
                shards.append(folder / f"shard-{len(shards):06d}.tar")
                writer, written = _tar(str(shards[-1])), 0
            _add(writer, sample)
            written, person = written + 1, _person(sample.key)
    finally:
        if writer is not None:
            writer.close()
    return shards


def write_shard(path: Path, samples: Iterable[Sample], jpeg: int | None = None) -> int:
    """Write one shard, as `write_shards` does, under another name until it is whole and on the disk.

    Args:
        jpeg: quality of the pictures as JPEG with all of the colours' resolution; None writes PNG.

    Returns:
        The number of samples. Where there is none, no file is written.

    Raises:
        OSError: the disk is full, or refuses.
    """
    part, written = path.with_name(f".{path.name}.{os.getpid()}.part"), 0
    try:
        with part.open("wb") as file:
            writer = _tar(file)
            try:
                for sample in samples:
                    _add(writer, sample, jpeg)
                    written += 1
            finally:
                writer.close()
            file.flush()
            os.fsync(file.fileno())
        if written:
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return written


def _tar(target: str | BinaryIO) -> Any:
    from webdataset import TarWriter

    # without user, group and time of its own a file depends on nothing but the samples
    return TarWriter(target, user="", group="", mode=0o644, mtime=0, encoder=False)


def _add(writer: Any, sample: Sample, jpeg: int | None = None) -> None:
    writer.write({"__key__": sample.key, **_members(sample, jpeg)})


def _members(sample: Sample, jpeg: int | None = None) -> dict[str, bytes]:
    about = {
        "caption": sample.caption,
        "person": sample.person,
        "points": np.asarray(sample.points, np.float64).round(4).tolist(),
        "box": np.asarray(sample.box, np.float64).round(4).tolist(),
    }
    array = io.BytesIO()
    np.save(array, np.asarray(sample.embedding, np.float32))
    picture = {"png": _png(sample.picture)} if jpeg is None else {"jpg": _jpeg(sample.picture, jpeg)}
    return {
        **picture,
        "mask.png": _png(sample.mask),
        "npy": array.getvalue(),
        "json": json.dumps(about, ensure_ascii=False, sort_keys=True).encode(),
    }


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=quality, subsampling=0)
    return buffer.getvalue()


def _person(key: str) -> str:
    return key.rpartition("-")[0]


@dataclass(frozen=True, eq=False)
class Index:
    """Where each of P pictures lies in the shards.

    shard: [P] number of the shard. start, end: [P] the bytes of its members. first, last: [P] the range of pictures of
    the same person.
    """

    shards: tuple[Path, ...]
    shard: np.ndarray
    start: np.ndarray
    end: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def people(self) -> int:
        return len(np.unique(self.first))


def read_index(shards: Sequence[Path]) -> Index:
    """Find the pictures in shards by the tars' headers; the pictures stay on the disk.

    Raises:
        FaceSnapError: a shard is missing, cut short, empty, no tar, or lacks a part of a sample.
    """
    places: list[tuple[int, int, int]] = []
    people: list[tuple[int, str]] = []
    for number, path in enumerate(shards):
        before = len(places)
        for key, start, end in _read_headers(path):
            places.append((number, start, end))
            people.append((number, _person(key) or key))
        if len(places) == before:
            raise FaceSnapError(f"{path} has no pictures in it; make the shard again or leave it out.")
    shard, start, end = np.array(places, np.int64).T
    changes = [i for i in range(len(people)) if i == 0 or people[i] != people[i - 1]]
    lengths = np.diff([*changes, len(people)])
    first = np.repeat(changes, lengths)
    return Index(tuple(shards), shard, start, end, first, first + np.repeat(lengths, lengths))


def _read_headers(path: Path) -> Iterator[tuple[str, int, int]]:
    """Key, first and last byte of each sample."""
    from webdataset.tariterators import base_plus_ext

    key, extensions, start, end = None, set(), 0, 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                name, extension = base_plus_ext(member.name)
                if name != key:
                    if key is not None:
                        _check_whole(path, key, extensions)
                        yield key, start, end
                    key, extensions, start = name, set(), member.offset
                extensions.add(extension)
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
        cut = path.stat().st_size < end + BLOCK  # a whole tar ends with empty blocks
    except FileNotFoundError:
        raise FaceSnapError(f"There is no shard {path}; check the name and the folder.") from None
    except (OSError, tarfile.TarError, EOFError) as error:
        raise FaceSnapError(f"{path} is not a whole tar file ({error}); copy or make the shard again.") from error
    if cut:
        raise FaceSnapError(f"{path} is cut short; copy or make the shard again.")
    if key is not None:
        _check_whole(path, key, extensions)
        yield key, start, end


def _check_whole(path: Path, key: str, extensions: set[str]) -> None:
    missing = [extension for extension in REQUIRED if extension not in extensions]
    if not extensions.intersection(PICTURES):
        missing.append(PICTURES[0])
    if missing:
        raise FaceSnapError(f"The sample {key} in {path} has no {missing[0]}; make the shard again.")


def read_sample(index: Index, number: int) -> Sample:
    """Read a picture by its place in the shards.

    Raises:
        FaceSnapError: it is damaged.
    """
    path = index.shards[index.shard[number]]
    start, end = int(index.start[number]), int(index.end[number])
    try:
        with path.open("rb") as file:
            file.seek(start)
            members = _split(file.read(end - start))
        picture = next(members[extension] for extension in PICTURES if extension in members)
        about = json.loads(members["json"])
        sample = Sample(
            key="",
            picture=np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")),
            mask=np.asarray(Image.open(io.BytesIO(members["mask.png"])).convert("L")),
            embedding=np.load(io.BytesIO(members["npy"]), allow_pickle=False).astype(np.float32),
            caption=about["caption"],
            person=about["person"],
            points=np.asarray(about["points"], np.float32),
            box=np.asarray(about["box"], np.float32),
        )
    except (OSError, tarfile.TarError, EOFError, KeyError, ValueError, SyntaxError, StopIteration) as error:
        raise FaceSnapError(
            f"Picture {number} of the data, at byte {start} of {path}, is damaged ({error}); make the shard again."
        ) from error
    height, width = sample.picture.shape[:2]
    if height != width or sample.mask.shape != (height, width) or sample.points.shape != (72, 2):
        raise FaceSnapError(
            f"The picture at byte {start} of {path} is not square with a mask of its size and 72 points; make the "
            "shard again."
        )
    return sample


def _split(content: bytes) -> dict[str, bytes]:
    from webdataset.tariterators import base_plus_ext

    members = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            if member.isfile():
                members[base_plus_ext(member.name)[1]] = tar.extractfile(member).read()
    return members
