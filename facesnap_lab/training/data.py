"""Batches of training images, read from shards.

The images of a batch depend only on the seed and on the batch's position in the run.
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
from facesnap_ext.landmarks.hints import HINTS, POINTS72
from facesnap_ext.landmarks.points72 import Landmarks, five_points
from facesnap_lab.training.shards import Sample, ShardIndex, read_sample

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ImageSizes:
    """The sizes to which images are resized: sides in pixels, but `latent_side` in latent cells."""

    resolution: int
    latent_side: int
    landmark_side: int  # FFRNet's pixels_per_latent × latent_side
    clip_side: int


@dataclass(frozen=True, eq=False)
class Batch:
    """The inputs of one training step.

    rows: [N] row numbers in the run, counted over all steps and processes; they seed everything random.
    images: [N,3,H,W] in −1…1. masks: [N,1,h,w] in 0…1, the fraction of each latent cell covered by the face.
    captions: N. landmark_images: [N,3,sH,sW] in 0…1, FFRNet's control images.
    keypoints: [N,5,2] in pixels of the image with the centre of the first pixel at 0, 0, for `arcface.align`.
    embeddings: [N,E] and clip_pixels: [N,3,S,S], of the references.
    points: the 72 landmarks [N,72,2] in pixels of the image, without jitter.
    references: the reference images [N,H,W,3] uint8. reference_points: their 72 landmarks [N,72,2] in pixels.
    """

    rows: Tensor
    images: Tensor
    masks: Tensor
    captions: list[str]
    landmark_images: Tensor
    keypoints: Tensor
    embeddings: Tensor
    clip_pixels: Tensor
    points: Tensor
    references: Tensor
    reference_points: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return on_device(self, device)


def on_device(record: T, device: torch.device | str) -> T:
    """Return a dataclass with its tensors moved to a device."""
    moved = {name: value.to(device) for name, value in vars(record).items() if isinstance(value, Tensor)}
    return replace(record, **moved)


class TrainingImages(Dataset):
    """The training images by their row number in the run. The content of a row depends only on the seed.

    Each epoch contains every image once, in a different order.
    """

    def __init__(
        self,
        index: ShardIndex,
        sizes: ImageSizes,
        seed: int,
        reference: str,
        landmarks: str,
        jitter: float,
        hint: str = POINTS72,
    ):
        self.index = index
        self.sizes = sizes
        self.seed = seed
        self.reference = reference
        self.landmarks = landmarks
        self.jitter = jitter
        self.hint = hint

    def __getitem__(self, row: int) -> dict[str, Any]:
        epoch, position = divmod(row, len(self.index))
        number = int(_order(self.seed, epoch, len(self.index))[position])
        rng = np.random.default_rng((self.seed, 1, row))
        other = self._reference(number, rng)
        sample = self.read(number)
        reference = sample if other == number else self.read(other)
        side = self.sizes.resolution
        scale = side / sample.image.shape[0]
        points = (sample.points * scale).astype(np.float32)
        mask = torch.from_numpy(sample.mask.astype(np.float32) / 255)[None, None]
        return {
            "rows": torch.tensor(row),
            "images": torch.from_numpy(resized(sample.image, side)).permute(2, 0, 1).float() / 127.5 - 1,
            "masks": F.interpolate(mask, (self.sizes.latent_side,) * 2, mode="area")[0],
            "captions": sample.caption,
            "landmark_images": self._landmark_image(points, rng),
            "keypoints": torch.from_numpy(five_points(points) - 0.5),  # points are measured from the image's corner
            "embeddings": torch.from_numpy(reference.embedding),
            "clip_pixels": clip.preprocess([square_crop(reference.image, reference.box)], self.sizes.clip_side)[0],
            "points": torch.from_numpy(points),
            "references": torch.from_numpy(resized(reference.image, side)),
            "reference_points": torch.from_numpy(
                (reference.points * side / reference.image.shape[0]).astype(np.float32)
            ),
        }

    def __getitems__(self, rows: Sequence[int]) -> Batch | FaceSnapError:
        """Return a batch, or the error: if a worker raised it, the message would include the worker's traceback."""
        try:
            return collate([self[row] for row in rows])
        except FaceSnapError as error:
            return error

    def _reference(self, number: int, rng: np.random.Generator) -> int:
        """Return another image of the person, or the same image if there is no other one or the settings require it."""
        first, end = int(self.index.person_start[number]), int(self.index.person_end[number])
        if self.reference == "same" or end - first == 1:
            return number
        return first + (number - first + int(rng.integers(1, end - first))) % (end - first)

    def _landmark_image(self, points: np.ndarray, rng: np.random.Generator) -> Tensor:
        side = self.sizes.landmark_side
        if self.landmarks == "none":
            return torch.zeros(3, side, side)
        moved = points + self.jitter * rng.standard_normal(points.shape, dtype=np.float32)
        landmarks = Landmarks(moved.astype(np.float32), self.sizes.resolution, self.sizes.resolution)
        return torch.from_numpy(HINTS[self.hint](landmarks, side, side)).permute(2, 0, 1).float() / 255

    def read(self, number: int) -> Sample:
        """Read an image by its position in the shards; see `read_sample`."""
        return read_sample(self.index, number)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """Resize a square image [S,S,3] uint8 to [side,side,3]."""
    if image.shape[0] == side:
        return np.array(image)
    return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    columns = {name: [item[name] for item in items] for name in items[0]}
    return Batch(
        **{name: torch.stack(column) if isinstance(column[0], Tensor) else column for name, column in columns.items()}
    )


def batch_rows(batch_size: int, process: int, processes: int, first: int, end: int) -> Iterator[list[int]]:
    """Yield the rows of a process's batches, from number `first` up to, but not including, `end`.

    Two processes together get the same rows as one process with twice the batch size.
    """
    for batch in range(first, end):
        start = (batch * processes + process) * batch_size
        yield list(range(start, start + batch_size))


def read_batches(images: TrainingImages, rows: Iterable[list[int]], workers: int) -> Iterator[Batch]:
    """Read the batches of these rows ahead of time in worker processes.

    Raises:
        FaceSnapError: an image is damaged, or a worker process died.
    """
    # the loader draws a seed for its workers; without its own generator it would advance the global one
    loader = DataLoader(
        images, batch_sampler=rows, num_workers=workers, collate_fn=_unchanged, generator=torch.Generator()
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
            f"A process that reads images died ({str(error).splitlines()[0]}); free some memory (including /dev/shm) "
            "or set 'workers' to 0, and resume."
        ) from error


def _unchanged(batch: Batch | FaceSnapError) -> Batch | FaceSnapError:
    return batch
