"""Batches of training pictures, read from shards.

Which pictures a batch has depends on the seed and on the batch's place in the run alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity import clip
from facesnap_ext.identity.faces import square_crop
from facesnap_ext.landmarks.points72 import Landmarks, draw, five_points
from facesnap_lab.training.shards import Index, Sample, read_sample

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Shapes:
    """The sizes in which pictures are read. All are sides in pixels, but for `latent_side`."""

    resolution: int
    latent_side: int
    drawing_side: int  # FFRNet's pixels_per_latent × latent_side
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
        """A picture by its place in the shards; see `read_sample`."""
        return read_sample(self.index, number)


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
