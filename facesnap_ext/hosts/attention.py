"""InstantID's adapter half in a UNet: attention to the identity tokens is added to each cross-attention's output.

Hooks on `to_q` and on the output projection, modules that every host's attention calls whichever kernel computes it,
compose with LoRAs and other adapters and replace nothing. They are reset for each UNet call: no query outlives its
call, and outside an announced call the hooks do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.networks.ffrnet import KeysValues
from facesnap_ext.residuals import Residuals

LEVELS = (("input_blocks.", "down_blocks."), ("output_blocks.", "up_blocks."), ("middle_block.", "mid_block."))


@dataclass(frozen=True)
class Call:
    """The rows of one UNet call.

    Attributes:
        size: height and width of the latents.
        is_cond: whether each row is conditional.
        acting: whether each person acts.
    """

    size: tuple[int, int]
    is_cond: tuple[bool, ...]
    acting: tuple[bool, ...]


class AdapterHooks:
    """The adapters of all people in an image, on one UNet.

    Attributes:
        call: the running UNet call. The host sets it before each of its own calls and clears it for others.
    """

    def __init__(self, residuals: Residuals):
        self.residuals = residuals
        self.call: Call | None = None
        self._handles: list[Any] = []
        self._queries: dict[int, Tensor] = {}
        self._keys_values: dict[int, tuple[KeysValues, ...]] = {}  # for each layer, by person
        self._on_device: dict[tuple[int, int], KeysValues] = {}  # by person and layer, on the UNet's device

    def hook(self, unet: nn.Module) -> None:
        """Install the hooks on a UNet, and remove them from the previous one. Without adapters there are no hooks.

        Raises:
            FaceSnapError: the UNet's cross-attentions are not those that an adapter was made for.
        """
        self.remove()
        people = self.residuals.people
        self._keys_values = {i: one.adapter() for i, one in enumerate(people) if one.adapter and one.has_adapter}
        if not self._keys_values:
            return
        layers = cross_attentions(unet)
        expected = tuple(map(_width, layers))
        for i, keys_values in self._keys_values.items():
            actual = tuple(keys.shape[-1] for keys, _ in keys_values)
            if actual != expected:
                raise FaceSnapError(
                    f"The adapter of {people[i].name} was made for {len(actual)} cross-attentions, but this "
                    f"checkpoint's UNet has {len(expected)}, or they have other widths; set the adapter weight to 0 or "
                    "choose another checkpoint."
                )
        for i, layer in enumerate(layers):
            self._handles.append(layer.to_q.register_forward_hook(self._keep_queries(i)))
            self._handles.append(layer.to_out[0].register_forward_pre_hook(self._add_attention(i, layer.heads)))

    def remove(self) -> None:
        """Remove all hooks; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._queries.clear()
        self._keys_values.clear()
        self._on_device.clear()
        self.call = None

    def _keep_queries(self, layer: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self.call is not None:
                self._queries[layer] = output

        return keep

    def _add_attention(self, layer: int, heads: int) -> Callable[..., tuple[Any, ...] | None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            queries = self._queries.pop(layer, None)
            if self.call is None or queries is None:
                return None
            extra = self._attend(self.call, layer, queries, heads)
            return None if extra is None else (args[0] + extra.to(args[0].dtype), *args[1:])

        return add

    def _attend(self, call: Call, layer: int, queries: Tensor, heads: int) -> Tensor | None:
        """The contribution of everyone's tokens to the attention's output [R, N, width]; None if no one acts."""
        who = tuple(i for i, acts in enumerate(call.acting) if acts)
        total = None
        for position, i in enumerate(who):
            person = self.residuals.people[i]
            if not person.has_adapter:
                continue
            if len(queries) != len(call.is_cond):
                raise FaceSnapError(
                    "Another extension splits the rows of the UNet call, so InstantID's adapter cannot tell "
                    "conditional from unconditional rows; disable that extension or set the adapter weight to 0."
                )
            sides = [0 if cond else 1 for cond in call.is_cond]
            keys, values = (part[sides] for part in self._moved(i, layer, queries))
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (queries, keys, values))
            attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            part = person.strength.adapter_weight * attention
            if len(who) > 1 or person.region is not None:
                part = part * self._blend_weight(call, who, position, part)
            if person.strength.cond_only:
                part = part * torch.tensor(call.is_cond, dtype=part.dtype, device=part.device)[:, None, None]
            total = part if total is None else total + part
        return total

    def _moved(self, person: int, layer: int, like: Tensor) -> KeysValues:
        """A layer's keys and values, moved to the device and type of its queries."""
        moved = self._on_device.get((person, layer))
        if moved is None or moved[0].device != like.device or moved[0].dtype != like.dtype:
            keys, values = self._keys_values[person][layer]
            moved = self._on_device[person, layer] = keys.to(like), values.to(like)
        return moved

    def _blend_weight(self, call: Call, who: tuple[int, ...], position: int, part: Tensor) -> Tensor:
        """A person's weight for each token, [N, 1] or [1, 1]."""
        height, width = call.size
        while height * width > part.shape[1]:  # each level halves the sides, rounding up
            height, width = (height + 1) // 2, (width + 1) // 2
        if height * width != part.shape[1]:
            raise FaceSnapError(
                "Another extension merges the UNet's tokens, so regions cannot be applied to InstantID's adapter; "
                "disable that extension or set the adapter weight to 0."
            )
        return self.residuals.blend_weights(who, height, width)[position].flatten()[:, None].to(part)


def cross_attentions(unet: nn.Module) -> list[Any]:
    """The cross-attentions of a UNet with LDM's or diffusers' names, in the order of diffusers' attention processors:
    down, up, middle."""
    modules = [(name, module) for name, module in unet.named_modules() if name.endswith(".attn2")]
    return [module for level in LEVELS for name, module in modules if name.startswith(level)]


def _width(attention: Any) -> int:
    """The width of the queries; Forge's quantised projections do not have `out_features`."""
    return getattr(attention.to_q, "out_features", None) or attention.heads * attention.dim_head


def call_of(x: Tensor, is_cond: Sequence[bool], acting: Sequence[bool]) -> Call:
    """The call of a UNet with latents [R, C, h, w]."""
    return Call((x.shape[2], x.shape[3]), tuple(is_cond), tuple(acting))
