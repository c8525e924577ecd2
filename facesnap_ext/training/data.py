"""Training pictures in WebDataset shards: writing them, and reading batches of them.

Which pictures a batch has depends on the seed and on the batch's place in the run alone.

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
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from facesnap_ext import clip
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.faces import square_crop
from facesnap_ext.landmarks.points72 import Landmarks, draw, five_points

T = TypeVar("T")
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


@dataclass(frozen=True, eq=False)
class Shapes:
    """The sizes in which pictures are read. All are sides in pixels, but for `latent_side`."""

    resolution: int
    latent_side: int
    drawing_side: int  # FFRNet's picture_scale × latent_side
    clip_side: int


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step is trained on.

    rows: [N] numbers of the pictures in the run, counted over all steps and processes: they seed all that is random.
    pictures: [N,3,H,W] in −1…1. masks: [N,1,h,w] in 0…1, the part of each latent cell that is face.
    captions: N. drawings: [N,3,sH,sW] in 0…1, landmarks as FFRNet sees them.
    keypoints: [N,5,2] in pixels of the picture with the centre of the first at 0, 0, for `arcface.align`.
    embeddings: [N,E] and clip_pixels: [N,3,S,S], of the references.
    references: [N,H,W,3] uint8, for people to see.
    """

    rows: Tensor
    pictures: Tensor
    masks: Tensor
    captions: list[str]
    drawings: Tensor
    keypoints: Tensor
    embeddings: Tensor
    clip_pixels: Tensor
    points: Tensor
    references: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return on_device(self, device)


def on_device(record: T, device: torch.device | str) -> T:
    """A dataclass with its tensors on a device."""
    moved = {name: value.to(device) for name, value in vars(record).items() if isinstance(value, Tensor)}
    return replace(record, **moved)


def write_shards(folder: Path, samples: Iterable[Sample], per_shard: int) -> list[Path]:
    """Write samples as `shard-000000.tar` and so on; equal samples give equal bytes.

    Args:
        samples: those of one person one after another, their key's part before the last "-" in common.
        per_shard: samples after which a new shard begins, but not before the person's last.

    Returns:
        The shards' paths.
    """
    from webdataset import TarWriter

    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    writer, written, person = None, 0, None
    try:
        for sample in samples:
            if writer is None or (written >= per_shard and _person(sample.key) != person):
                if writer is not None:
                    writer.close()
                shards.append(folder / f"shard-{len(shards):06d}.tar")
                # without user, group and time of its own a file depends on nothing but the samples
                writer = TarWriter(str(shards[-1]), user="", group="", mode=0o644, mtime=0, encoder=False)
                written = 0
            writer.write({"__key__": sample.key, **_members(sample)})
            written, person = written + 1, _person(sample.key)
    finally:
        if writer is not None:
            writer.close()
    return shards


def _members(sample: Sample) -> dict[str, bytes]:
    about = {
        "caption": sample.caption,
        "person": sample.person,
        "points": np.asarray(sample.points, np.float64).round(4).tolist(),
        "box": np.asarray(sample.box, np.float64).round(4).tolist(),
    }
    array = io.BytesIO()
    np.save(array, np.asarray(sample.embedding, np.float32))
    return {
        "png": _png(sample.picture),
        "mask.png": _png(sample.mask),
        "npy": array.getvalue(),
        "json": json.dumps(about, ensure_ascii=False, sort_keys=True).encode(),
    }


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
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


class Pictures(Dataset):
    """The pictures by their number in the run: `[row]` is the same whoever asks, and whenever.

    Each epoch goes through all pictures once in an order of its own.
    """

    def __init__(self, index: Index, shapes: Shapes, seed: int, reference: str, landmarks: str, jitter: float):
        self.index = index
        self.shapes = shapes
        self.seed = seed
        self.reference = reference
        self.landmarks = landmarks
        self.jitter = jitter

    def __getitem__(self, row: int) -> dict[str, Any]:
        epoch, place = divmod(row, len(self.index))
        number = int(_order(self.seed, epoch, len(self.index))[place])
        rng = np.random.default_rng((self.seed, 1, row))
        other = self._reference(number, rng)
        sample = self.read(number)
        reference = sample if other == number else self.read(other)
        side = self.shapes.resolution
        scale = side / sample.picture.shape[0]
        points = (sample.points * scale).astype(np.float32)
        mask = torch.from_numpy(sample.mask.astype(np.float32) / 255)[None, None]
        return {
            "rows": torch.tensor(row),
            "pictures": torch.from_numpy(_resized(sample.picture, side)).permute(2, 0, 1).float() / 127.5 - 1,
            "masks": F.interpolate(mask, (self.shapes.latent_side,) * 2, mode="area")[0],
            "captions": sample.caption,
            "drawings": self._drawing(points, rng),
            "keypoints": torch.from_numpy(five_points(points) - 0.5),  # points count from the picture's corner
            "embeddings": torch.from_numpy(reference.embedding),
            "clip_pixels": clip.preprocess([square_crop(reference.picture, reference.box)], self.shapes.clip_side)[0],
            "points": torch.from_numpy(points),
            "references": torch.from_numpy(_resized(reference.picture, side)),
        }

    def __getitems__(self, rows: Sequence[int]) -> Batch | FaceSnapError:
        """A batch. An error is returned: a worker that raises it would put its own traceback into the message."""
        try:
            return collate([self[row] for row in rows])
        except FaceSnapError as error:
            return error

    def _reference(self, number: int, rng: np.random.Generator) -> int:
        """Another picture of the same person, where there is one and it is wanted."""
        first, last = int(self.index.first[number]), int(self.index.last[number])
        if self.reference == "same" or last - first == 1:
            return number
        return first + (number - first + int(rng.integers(1, last - first))) % (last - first)

    def _drawing(self, points: np.ndarray, rng: np.random.Generator) -> Tensor:
        side = self.shapes.drawing_side
        if self.landmarks == "none":
            return torch.zeros(3, side, side)
        moved = points + self.jitter * rng.standard_normal(points.shape, dtype=np.float32)
        landmarks = Landmarks(moved.astype(np.float32), self.shapes.resolution, self.shapes.resolution)
        return torch.from_numpy(draw(landmarks, side, side)).permute(2, 0, 1).float() / 255

    def read(self, number: int) -> Sample:
        """Read a picture by its place in the shards.

        Raises:
            FaceSnapError: it is damaged.
        """
        path = self.index.shards[self.index.shard[number]]
        start, end = int(self.index.start[number]), int(self.index.end[number])
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


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def _resized(picture: np.ndarray, side: int) -> np.ndarray:
    if picture.shape[0] == side:
        return np.array(picture)
    return np.array(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS))


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    columns = {name: [item[name] for item in items] for name in items[0]}
    return Batch(
        **{name: torch.stack(column) if isinstance(column[0], Tensor) else column for name, column in columns.items()}
    )


def batch_rows(batch_size: int, process: int, processes: int, first: int, last: int) -> Iterator[list[int]]:
    """The rows of a process's batches number `first` up to `last`. Two processes together see what one with a batch
    twice as large would."""
    for batch in range(first, last):
        start = (batch * processes + process) * batch_size
        yield list(range(start, start + batch_size))


def read_batches(pictures: Pictures, rows: Iterable[list[int]], workers: int) -> Iterator[Batch]:
    """Read the batches of these rows, ahead in worker processes.

    Raises:
        FaceSnapError: a picture is damaged, or a worker process died.
    """
    # the loader draws a seed for its workers, which use none; without a generator of its own it takes the run's
    loader = DataLoader(
        pictures, batch_sampler=rows, num_workers=workers, collate_fn=_as_it_is, generator=torch.Generator()
    )
    try:
        for batch in loader:
            if isinstance(batch, FaceSnapError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise FaceSnapError(
            f"A process that reads pictures died ({str(error).splitlines()[0]}); free memory, in /dev/shm too, or set "
            "'workers' to 0, and resume."
        ) from error


def _as_it_is(batch: Batch | FaceSnapError) -> Batch | FaceSnapError:
    return batch
