"""The rows of UNet calls in which a person is active, and the residuals that FFRNet has computed for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ROWS = 8  # maximum number of rows kept if one evaluation arrives in many calls; each takes 60 MB at 1024²

Label = tuple[bool, int]
"""Whether a row counts as unconditional (if that makes a difference), and its index among the rows of this kind."""


class Constants:
    """Tensors of Python values, each of which is copied to its device only once.

    A copy of a Python value makes the CPU wait until the GPU has finished all earlier work.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Tensor] = {}

    def tensor(self, values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
        """A one-dimensional tensor of these values. It is shared, so it must not be changed."""
        key = (tuple(values), device, dtype)
        if key not in self._kept:
            self._kept[key] = torch.tensor(values, device=device, dtype=dtype)
        return self._kept[key]

    def select(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        """The rows of a tensor, in this order; consecutive rows are a view. A single row is returned as [1, …] if all
        indices are 0, because it is broadcast."""
        if len(tensor) == 1 or list(rows) == list(range(len(tensor))):
            return tensor
        start, end = rows[0], rows[-1] + 1
        if list(rows) == list(range(start, end)):
            return tensor[start:end]
        return tensor.index_select(0, self.tensor(rows, tensor.device))


@dataclass(frozen=True)
class Rows:
    """Rows of a UNet call in which a person is active.

    Attributes:
        x, timesteps, y: see `Residuals.rows`.
        sides: whether each row differs from the conditional rows, as an unconditional row.
        images: the image of each row, if the person's placements differ between images.
        keys: equal for rows that the host announced as copies; None if it did not announce any.
    """

    x: Tensor
    timesteps: Tensor
    sides: list[bool]
    images: list[int]
    y: Tensor | None
    keys: list[Hashable] | None

    def __len__(self) -> int:
        return len(self.sides)

    def take(self, rows: Sequence[int], constants: Constants) -> Rows:
        """Some of the rows, in this order."""
        return Rows(
            constants.select(self.x, rows),
            constants.select(self.timesteps, rows),
            [self.sides[row] for row in rows],
            [self.images[row] for row in rows],
            None if self.y is None else constants.select(self.y, rows),
            None if self.keys is None else [self.keys[row] for row in rows],
        )

    def inputs(self) -> Tensor:
        """All inputs of each row's residuals, concatenated: [R, F]."""
        side, image = (self.x.new_tensor(values, dtype=torch.float32)[:, None] for values in (self.sides, self.images))
        parts = [self.x.flatten(1).float(), self.timesteps.float()[:, None], side, image]
        return torch.cat([*parts, *([] if self.y is None else [self.y.float()])], 1)


class Evaluation:
    """The distinct rows of one UNet evaluation, which a host may send in several calls, and their residuals."""

    def __init__(self, name: float | None):
        self.name = name  # the number of an announced evaluation, otherwise its timestep
        self.labels: list[Label] = []
        self.outputs: list[Tensor] = []  # [K, …] each
        self._stored: list[Rows] = []  # K rows in total
        self._keys: list[Hashable] = []
        self._seen = Counter[bool]()  # how many unconditional and other rows have been stored

    def find(self, rows: Rows) -> list[int | None]:
        """The index of each row of a call among the stored rows."""
        if not self._stored:
            return [None] * len(rows)
        if rows.keys is None:
            return _find(rows.inputs(), torch.cat([stored.inputs() for stored in self._stored]))
        return [self._keys.index(key) if key in self._keys else None for key in rows.keys]

    def labels_for(self, sides: Sequence[bool]) -> list[Label]:
        """Labels for rows that follow the stored ones."""
        seen = self._seen.copy()
        labels = []
        for side in sides:
            labels.append((side, seen[side]))
            seen[side] += 1
        return labels

    def outputs_of(self, labels: list[Label], size: torch.Size, constants: Constants) -> list[Tensor] | None:
        """The residuals of rows by their labels; None if some are not stored or the latents had a different size."""
        if not set(labels) <= set(self.labels) or self.outputs[0].shape[2:] != size:
            return None
        rows = [self.labels.index(label) for label in labels]
        return [constants.select(output, rows) for output in self.outputs]

    def add(self, labels: list[Label], rows: Rows, outputs: list[Tensor]) -> None:
        self.outputs = [torch.cat(pair) for pair in zip(self.outputs, outputs)] if self._stored else outputs
        self.labels = self.labels + labels
        self._stored.append(rows)
        self._keys += [object() for _ in labels] if rows.keys is None else rows.keys
        self._seen.update(side for side, _ in labels)

    def has_room(self, x: Tensor) -> bool:
        """Whether rows can be added: the size must match and the number is limited, because tiles arrive in many
        calls."""
        return not self._stored or (x.shape[1:] == self._stored[0].x.shape[1:] and len(self.labels) < MAX_ROWS)

    def forget(self) -> None:
        """Drop the rows but keep their count, so that later rows get new labels."""
        self.labels, self.outputs, self._stored, self._keys = [], [], [], []


def first_copies(rows: Rows) -> list[int]:
    """For each row, the first row of the same call that it is a copy of, or itself."""
    if rows.keys is not None:
        return [rows.keys.index(key) for key in rows.keys]
    inputs = rows.inputs()
    # a row that contains NaN equals no row, not even itself
    return [row if place is None else place for row, place in enumerate(_find(inputs, inputs))]


def _find(rows: Tensor, known: Tensor) -> list[int | None]:
    """For each row [R, F] the index of the first equal row in `known` [K, F], or None."""
    if rows.shape[1] != known.shape[1] or rows.device != known.device:
        return [None] * len(rows)
    equal = torch.stack([(known == row).all(dim=1) for row in rows]).tolist()
    return [row.index(True) if True in row else None for row in equal]
