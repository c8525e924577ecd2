"""Controls in Forge and its forks: residuals by part of the UNet, merged with other controls and added to features."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts.attention import ROWS_SPLIT
from facesnap_ext.hosts.unet import fitted

Control = dict[str, list[Tensor | None]]
"""Residuals for the UNet's "input", "middle" and "output" blocks."""


class Parts:
    """The rows of a call that another extension's wrapper of the UNet sends in parts, one after the other.

    Regional Prompter's latent mode does so after the control was computed for all rows.
    """

    def __init__(self, rows: int, shown_errors: Callable[[], AbstractContextManager[None]]):
        self.rows = rows
        self._shown_errors = shown_errors
        self._start = 0

    def next(self, count: int) -> slice:
        """The rows of the next part, which has this number of them.

        Raises:
            FaceSnapError: more rows arrive than the call has.
        """
        if count == self.rows:
            return slice(count)
        part = slice(self._start, self._start + count)
        self._start += count
        if self._start > self.rows:
            with self._shown_errors():
                raise FaceSnapError(ROWS_SPLIT)
        return part


def adding(control: Control, parts: Parts) -> Callable[[Tensor, Tensor, dict[str, Any]], tuple[Tensor, Tensor]]:
    """A patch for the output blocks that adds a control's residuals before any other patch runs, as the host would.

    The host itself drops residuals whose size differs from the features' size, and only prints a line.
    """
    (middle,), skips = control["middle"], control["output"]
    rows = slice(None)

    def add(h: Tensor, skip: Tensor, transformer_options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        nonlocal rows
        block = transformer_options["block"][1]
        if block == 0:
            rows = parts.next(len(h))
            _add(middle, h, rows)
        _add(skips[-1 - block], skip, rows)  # the decoder takes the skips from deep to shallow
        return h, skip

    return add


def _add(residual: Tensor | None, features: Tensor, rows: slice) -> None:
    if residual is not None:
        features += fitted(residual if len(residual) == 1 else residual[rows], features)


def merge(own: Control, previous: Control | None) -> Control:
    """Add two controls, either of which may have gaps. The lists are new, because the UNet empties the lists that it
    receives."""
    merged: Control = {}
    for part, residuals in own.items():
        others: list[Tensor | None] = list(previous.get(part, [])) if previous is not None else []
        length = max(len(residuals), len(others))
        pairs = zip(
            residuals + [None] * (length - len(residuals)),
            others + [None] * (length - len(others)),
        )
        merged[part] = [b if a is None else a if b is None else a + b for a, b in pairs]
    return merged
