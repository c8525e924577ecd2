"""The on-disk format of training images, and how shards of them are indexed and read.

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
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.network_names import TITLES, parse_networks
from facesnap_lab.storage import Location, Url, read_range
from facesnap_lab.training.shard_positions import IMAGES, Label, parse_provenance, read_index, read_positions

REQUESTS = 16  # simultaneous requests for indexes in an object store

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


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The positions of N images in the shards.

    shard: [N] number of the shard. start, end: [N] byte range of the sample in the shard.
    json_start, json_end: [N] byte range of the content of its json member. person_start, person_end: [N] range of the
    images of the same person.
    """

    shards: tuple[Location, ...]
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


def person_key(key: str) -> str:
    """Return the part of a sample's key that identifies the person."""
    return key.rpartition("-")[0]


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


def read_shard_index(shards: Sequence[Location]) -> ShardIndex:
    """Index the images in shards by reading only the tar headers, or the shards' indexes in an object store.

    Raises:
        FaceSnapError: a shard is missing, truncated, empty or not a tar file, or a sample is incomplete.
    """
    positions: list[tuple[int, ...]] = []
    people: list[tuple[int, str]] = []
    with ThreadPoolExecutor(REQUESTS if any(isinstance(path, Url) for path in shards) else 1) as threads:
        found = list(threads.map(read_positions, shards))
    for number, (path, own) in enumerate(zip(shards, found)):
        for key, *ranges in own:
            positions.append((number, *ranges))
            people.append((number, person_key(key) or key))
        if not own:
            raise FaceSnapError(f"{path} contains no images; build the shard again, or remove it from 'shards'.")
    columns = np.array(positions, np.int64).T
    changes = [i for i in range(len(people)) if i == 0 or people[i] != people[i - 1]]
    lengths = np.diff([*changes, len(people)])
    person_start = np.repeat(changes, lengths)
    return ShardIndex(tuple(shards), *columns, person_start, person_start + np.repeat(lengths, lengths))


def read_sample(index: ShardIndex, number: int) -> Sample:
    """Read a sample by its position in the index; its `key` is empty.

    Raises:
        FaceSnapError: the sample is damaged.
    """
    path = index.shards[index.shard[number]]
    start, end = int(index.start[number]), int(index.end[number])
    try:
        members = _split(read_range(path, start, end))
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
            provenance=parse_provenance(metadata.get("provenance", {})),
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


def read_labels(index: ShardIndex) -> Iterator[Label]:
    """Yield the person and the provenance of each image, in the order of the index.

    Only the json members are read, or the shards' indexes in an object store.

    Raises:
        FaceSnapError: a json member or an index is damaged.
    """
    for shard, numbers in groupby(range(len(index)), lambda number: int(index.shard[number])):
        path = index.shards[shard]
        read = _labels_in_store if isinstance(path, Url) else _labels_in_file
        yield from read(index, path, list(numbers))


def _labels_in_store(index: ShardIndex, url: Url, numbers: Sequence[int]) -> Iterator[Label]:
    positions, labels = read_index(url)
    label_at = {position.start: label for position, label in zip(positions, labels)}
    for number in numbers:
        yield label_at[int(index.start[number])]


def _labels_in_file(index: ShardIndex, path: Path, numbers: Sequence[int]) -> Iterator[Label]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise _damaged(index, numbers[0], error) from error
    with file:
        for number in numbers:
            try:
                file.seek(int(index.json_start[number]))
                metadata = json.loads(file.read(int(index.json_end[number] - index.json_start[number])))
                person, provenance = metadata["person"], parse_provenance(metadata.get("provenance", {}))
                if not isinstance(person, str):
                    raise ValueError("its person is not text")
            except _DAMAGE as error:
                raise _damaged(index, number, error) from error
            yield person, provenance


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
