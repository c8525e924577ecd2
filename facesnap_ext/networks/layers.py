"""Layers that compute on the device of their input, wherever their weights are.

WebUIs with little GPU memory load a network only in part and leave the other weights on the CPU. These layers copy such
weights for the duration of one call. A copy has the same values, so the results do not depend on where the weights are.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Movable:
    """A layer whose weights may be on a different device than its input.

    Attributes:
        casts: whether weights are also cast to the dtype of the input, so that they can be stored in 8 bits.
    """

    casts = False

    def near(self, weight: Tensor | None, x: Tensor) -> Any:
        """A weight on the device of an input; None without a weight."""
        if weight is None:
            return None
        # hosts pin the weights that they leave on the CPU, so that a copy to the GPU need not be waited for
        return weight.to(x.device, x.dtype if self.casts else weight.dtype, non_blocking=x.is_cuda)


class Linear(Movable, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.near(self.weight, x), self.near(self.bias, x))


class Conv2d(Movable, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.near(self.weight, x), self.near(self.bias, x))


class GroupNorm(Movable, nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.near(self.weight, x), self.near(self.bias, x), self.eps)


class LayerNorm(Movable, nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.near(self.weight, x), self.near(self.bias, x), self.eps)


class CastingLinear(Linear):
    """Compute in the dtype of the input, whatever the dtype of the weight."""

    casts = True


class CastingConv2d(Conv2d):
    """Compute in the dtype of the input, whatever the dtype of the weight."""

    casts = True
