"""The on-disk format of training images: writing, indexing and reading WebDataset shards.

A shard is a tar file. The members of a sample share the key `PERSON-IMAGE` (`000123-04`) and have these extensions:

    png, jpg or jpeg  the image, square
    mask.png          the face mask, of the image's size, white inside
    npy               ArcFace embedding of the face [E] float32
    json              {"caption": str, "person": str, "points": [[x, y] * 72], "box": [left, top, right, bottom],
                      "networks": {"face_pack": hash, "deca": hash, "flame": hash}, "digest": str,
                      "provenance": {"source": str, "license": str, "consent": str, "photo": hash}},
                      points and box in pixels of the image; networks: the content hashes of the networks that computed
                      the embedding and the points (facesnap_ext.weights.networks); digest: the SHA-256 of the npy
                      member; provenance: only if the shard was built with a manifest; photo: the SHA-256 of the file
                      that the image was cropped from

The images of one person are consecutive and in the same shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.network_names import TITLES, parse_networks

IMAGES = ("png", "jpg", "jpeg")
REQUIRED = ("mask.png", "npy", "json")
PROVENANCE = ("source", "license", "consent", "photo")
BLOCK = 512  # block size of tar files in bytes
_DAMAGE = (
    *(OSError, tarfile.TarError, EOFError, AttributeError, KeyError, TypeError, ValueError, SyntaxError),
    *(StopIteration, RecursionError),
)
"""What damaged samples raise."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One training image of a person.

    key: `PERSON-IMAGE`. image: [S,S,3] uint8 RGB. mask: [S,S] uint8, 255 on the face. embedding: [E] float32.
    points: [72,2] float32 and box: [4] float32 (left, top, right, bottom) in pixels of the image. networks: the content
    hashes of the networks that computed embedding and points, by the keys of `network_names.TITLES`.
    provenance: the texts named in `PROVENANCE`, or empty.
    """

    key: str
    image: np.ndarray
    mask: np.ndarray
    embedding: np.ndarray
    caption: str
    person: str
    points: np.ndarray
    box: np.ndarray
    networks: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)


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
    """Write one shard in the format of `write_shards`, under a temporary name until it is complete and synced to disk.

    Args:
        jpeg: JPEG quality of the images, without chroma subsampling; None for PNG.

    Returns:
        The number of samples. If it is 0, no file is written.

    Raises:
        OSError: the disk is full or not writable.
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


def _person(key: str) -> str:
    return key.rpartition("-")[0]


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The positions of N images in the shards.

    shard: [N] number of the shard. start, end: [N] byte range of the sample in the shard.
    json_start, json_end: [N] byte range of the content of its json member. person_start, person_end: [N] range of the
    images of the same person.
    """

    shards: tuple[Path, ...]
    shard: np.ndarray
    start: np.ndarray
    end: np.ndarray
    json_start: np.ndarray
    json_end: np.ndarray
    person_start: np.ndarray
    person_end: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def people(self) -> int:
        return len(np.unique(self.person_start))


def select_images(index: ShardIndex, kept: np.ndarray) -> ShardIndex:
    """Return an index of only some images.

    Args:
        kept: [N] bool.
    """
    _, starts, person, lengths = np.unique(
        index.person_start[kept], return_index=True, return_inverse=True, return_counts=True
    )
    columns = (column[kept] for column in (index.shard, index.start, index.end, index.json_start, index.json_end))
    return ShardIndex(index.shards, *columns, starts[person], (starts + lengths)[person])


def read_shard_index(shards: Sequence[Path]) -> ShardIndex:
    """Index the images in shards by reading only the tar headers.

    Raises:
        FaceSnapError: a shard is missing, truncated, empty or not a tar file, or a sample is incomplete.
    """
    positions: list[tuple[int, ...]] = []
    people: list[tuple[int, str]] = []
    for number, path in enumerate(shards):
        before = len(positions)
        for key, *ranges in _read_headers(path):
            positions.append((number, *ranges))
            people.append((number, _person(key) or key))
        if len(positions) == before:
            raise FaceSnapError(f"{path} contains no images; build the shard again, or remove it from 'shards'.")
    columns = np.array(positions, np.int64).T
    changes = [i for i in range(len(people)) if i == 0 or people[i] != people[i - 1]]
    lengths = np.diff([*changes, len(people)])
    person_start = np.repeat(changes, lengths)
    return ShardIndex(tuple(shards), *columns, person_start, person_start + np.repeat(lengths, lengths))


def _read_headers(path: Path) -> Iterator[tuple[str, int, int, int, int]]:
    """Yield the key of each sample, and the byte ranges of the sample and of the content of its json member."""
    from webdataset.tariterators import base_plus_ext

    key, extensions, start, end, json_start, json_end = None, set(), 0, 0, 0, 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                name, extension = base_plus_ext(member.name)
                if name != key:
                    if key is not None:
                        _check_complete(path, key, extensions)
                        yield key, start, end, json_start, json_end
                    key, extensions, start = name, set(), member.offset
                extensions.add(extension)
                if extension == "json":
                    json_start, json_end = member.offset_data, member.offset_data + member.size
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
        truncated = path.stat().st_size < end + BLOCK  # a complete tar file ends with empty blocks
    except FileNotFoundError:
        raise FaceSnapError(f"The shard {path} does not exist; check its name and folder.") from None
    except (OSError, tarfile.TarError, EOFError) as error:
        raise FaceSnapError(f"{path} is not a complete tar file ({error}); copy or build the shard again.") from error
    if truncated:
        raise FaceSnapError(f"{path} is truncated; copy or build the shard again.")
    if key is not None:
        _check_complete(path, key, extensions)
        yield key, start, end, json_start, json_end


def _check_complete(path: Path, key: str, extensions: set[str]) -> None:
    missing = [extension for extension in REQUIRED if extension not in extensions]
    if not extensions.intersection(IMAGES):
        missing.append(IMAGES[0])
    if missing:
        raise FaceSnapError(f"The sample {key} in {path} has no {missing[0]}; build the shard again.")


def read_sample(index: ShardIndex, number: int) -> Sample:
    """Read a sample by its position in the index; its `key` is empty.

    Raises:
        FaceSnapError: the sample is damaged.
    """
    path = index.shards[index.shard[number]]
    start, end = int(index.start[number]), int(index.end[number])
    try:
        with path.open("rb") as file:
            file.seek(start)
            members = _split(file.read(end - start))
        image = next(members[extension] for extension in IMAGES if extension in members)
        metadata = json.loads(members["json"])
        if metadata.get("digest", digest := hashlib.sha256(members["npy"]).hexdigest()) != digest:
            raise ValueError("its embedding has changed since it was written")
        sample = Sample(
            key="",
            image=np.asarray(Image.open(io.BytesIO(image)).convert("RGB")),
            mask=np.asarray(Image.open(io.BytesIO(members["mask.png"])).convert("L")),
            embedding=np.load(io.BytesIO(members["npy"]), allow_pickle=False).astype(np.float32),
            caption=metadata["caption"],
            person=metadata["person"],
            points=np.asarray(metadata["points"], np.float32),
            box=np.asarray(metadata["box"], np.float32),
            networks=parse_networks(json.dumps(metadata.get("networks", {}))),
            provenance=_parse_provenance(metadata.get("provenance", {})),
        )
        if not all(np.isfinite(values).all() for values in (sample.embedding, sample.points, sample.box)):
            raise ValueError("its embedding, points or box are not finite")
    except _DAMAGE as error:
        raise _damaged(index, number, error) from error
    height, width = sample.image.shape[:2]
    if height != width or sample.mask.shape != (height, width) or sample.points.shape != (72, 2):
        raise FaceSnapError(
            f"The image at byte {start} of {path} is not square, or lacks a mask of its size or 72 points; build the "
            "shard again."
        )
    return sample


def read_labels(index: ShardIndex) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the person and the provenance of each image, in the order of the index, reading only the json members.

    Raises:
        FaceSnapError: a json member is damaged.
    """
    file: BinaryIO | None = None
    opened = -1
    try:
        for number, shard in enumerate(index.shard.tolist()):
            try:
                if shard != opened:
                    if file is not None:
                        file.close()
                    file, opened = index.shards[shard].open("rb"), shard
                file.seek(int(index.json_start[number]))
                metadata = json.loads(file.read(int(index.json_end[number] - index.json_start[number])))
                person, provenance = metadata["person"], _parse_provenance(metadata.get("provenance", {}))
                if not isinstance(person, str):
                    raise ValueError("its person is not text")
            except _DAMAGE as error:
                raise _damaged(index, number, error) from error
            yield person, provenance
    finally:
        if file is not None:
            file.close()


def _parse_provenance(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or (value and set(value) != set(PROVENANCE)):
        raise ValueError(f"its provenance does not consist of {', '.join(PROVENANCE)}")
    if not all(isinstance(text, str) for text in value.values()):
        raise ValueError("its provenance is not text")
    return value


def _damaged(index: ShardIndex, number: int, error: BaseException) -> FaceSnapError:
    return FaceSnapError(
        f"Image {number} of the training data, at byte {int(index.start[number])} of "
        f"{index.shards[index.shard[number]]}, is damaged ({error}); build the shard again."
    )


def read_networks(index: ShardIndex) -> dict[str, str]:
    """Return the networks that computed the features in the shards, from the first image of each shard.

    Raises:
        FaceSnapError: an image is damaged, or two shards were made with different networks.
    """
    _, firsts = np.unique(index.shard, return_index=True)
    networks: dict[str, str] = {}
    for i, first in enumerate(firsts.tolist()):
        named = dict(read_sample(index, first).networks)
        if i and named != networks:
            part = next(part for part in TITLES if named.get(part) != networks.get(part))
            raise FaceSnapError(
                f"{index.shards[index.shard[first]]} was made with a different {TITLES[part]} than {index.shards[0]}; "
                "build all shards with the same networks."
            )
        networks = named
    return networks


def _split(content: bytes) -> dict[str, bytes]:
    from webdataset.tariterators import base_plus_ext

    members = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            if member.isfile():
                members[base_plus_ext(member.name)[1]] = tar.extractfile(member).read()
    return members
