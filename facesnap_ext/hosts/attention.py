"""How InstantID's adapter half enters a UNet: what each cross-attention sees of the identity tokens is added to what
goes into its output projection.

Hooks on `to_q` and on the projection, modules that every host's attention calls whichever kernel computes it, compose
with LoRAs and with other adapters and replace nothing. What they do is decided anew for each UNet call, from its own
rows: no query outlives its call, and outside of a call that was announced they do nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.conditioning import Residuals
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.networks.ffrnet import KeysValues

LEVELS = (("input_blocks.", "down_blocks."), ("output_blocks.", "up_blocks."), ("middle_block.", "mid_block."))


@dataclass(frozen=True)
class Call:
    """The rows of one UNet call. size: height and width of its latents. acting: for each guidance, whether it does."""

    size: tuple[int, int]
    is_cond: tuple[bool, ...]
    acting: tuple[bool, ...]


class AdapterHooks:
    """The adapters of all people of a picture on one UNet.

    call: the UNet call under way, for the host to set before and to clear for a call that is not its own.
    """

    def __init__(self, residuals: Residuals):
        self.residuals = residuals
        self.call: Call | None = None
        self._handles: list[Any] = []
        self._queries: dict[int, Tensor] = {}
        self._made: dict[int, tuple[KeysValues, ...]] = {}  # keys and values of each layer, by person
        self._moved: dict[tuple[int, int], KeysValues] = {}  # by person and layer, where the UNet is

    def hook(self, unet: nn.Module) -> None:
        """Put the hooks on, taking them off the UNet before; none where nobody has an adapter.

        Raises:
            FaceSnapError: the UNet has other cross-attentions than an adapter was made for.
        """
        self.remove()
        self._made = {i: one.adapter() for i, one in enumerate(self.residuals.conditionings) if one.has_adapter}
        if not self._made:
            return
        layers = cross_attentions(unet)
        widths = tuple(map(_width, layers))
        for i, made in self._made.items():
            own = tuple(keys.shape[-1] for keys, _ in made)
            if own != widths:
                conditioning = self.residuals.conditionings[i]
                raise FaceSnapError(
                    f"The adapter of {conditioning.name} was made for {len(own)} cross-attentions and this "
                    f"checkpoint's UNet has {len(widths)}, or of other widths; set its weight to 0 or choose another checkpoint."
                )
        for i, layer in enumerate(layers):
            self._handles.append(layer.to_q.register_forward_hook(self._keep_queries(i)))
            self._handles.append(layer.to_out[0].register_forward_pre_hook(self._add(i, layer.heads)))

    def remove(self) -> None:
        """Take all hooks off; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._queries.clear()
        self._made.clear()
        self._moved.clear()
        self.call = None

    def _keep_queries(self, layer: int) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self.call is not None:
                self._queries[layer] = output

        return keep

    def _add(self, layer: int, heads: int) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            queries = self._queries.pop(layer, None)
            if self.call is None or queries is None:
                return None
            extra = self._attend(self.call, layer, queries, heads)
            return None if extra is None else (args[0] + extra.to(args[0].dtype), *args[1:])

        return add

    def _attend(self, call: Call, layer: int, queries: Tensor, heads: int) -> Tensor | None:
        """What all people's tokens add to the attention's output [R, N, width]; None where nobody acts."""
        who = tuple(i for i, acts in enumerate(call.acting) if acts)
        total = None
        for position, i in enumerate(who):
            conditioning = self.residuals.conditionings[i]
            if not conditioning.has_adapter:
                continue
            if len(queries) != len(call.is_cond):
                raise FaceSnapError(
                    "Something else in this picture splits the UNet's rows, so that InstantID's adapter cannot tell "
                    "them apart; switch that off, or set the adapter's weight to 0."
                )
            sides = [0 if cond else 1 for cond in call.is_cond]
            keys, values = (part[sides] for part in self._keys_values(i, layer, queries))
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (queries, keys, values))
            part = conditioning.adapter_weight * F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            if len(who) > 1 or conditioning.region is not None:
                part = part * self._share(call, who, position, part)
            if conditioning.cond_only:
                part = part * torch.tensor(call.is_cond, dtype=part.dtype, device=part.device)[:, None, None]
            total = part if total is None else total + part
        return total

    def _keys_values(self, person: int, layer: int, like: Tensor) -> KeysValues:
        moved = self._moved.get((person, layer))
        if moved is None or moved[0].device != like.device or moved[0].dtype != like.dtype:
            moved = tuple(part.to(like) for part in self._made[person][layer])
            self._moved[person, layer] = moved
        return moved

    def _share(self, call: Call, who: tuple[int, ...], position: int, part: Tensor) -> Tensor:
        """A person's share of each token, [N, 1] or [1, 1]."""
        height, width = call.size
        while height * width > part.shape[1]:  # each level halves the sides, upwards where they are odd
            height, width = (height + 1) // 2, (width + 1) // 2
        if height * width != part.shape[1]:
            raise FaceSnapError(
                "Something else in this picture merges the UNet's tokens, so that people have no places in it; switch "
                "that off, or set the adapter's weight to 0."
            )
        return self.residuals.blend_weights(who, height, width)[position].flatten()[:, None].to(part)


def cross_attentions(unet: nn.Module) -> list[nn.Module]:
    """The cross-attentions of a UNet of LDM's or diffusers' naming in the order of diffusers' attention processors:
    down, up, middle."""
    modules = [(name, module) for name, module in unet.named_modules() if name.endswith(".attn2")]
    return [module for level in LEVELS for name, module in modules if name.startswith(level)]


def _width(attention: nn.Module) -> int:
    """Forge's quantised projections do not say theirs."""
    return getattr(attention.to_q, "out_features", None) or attention.heads * attention.dim_head


def call_of(x: Tensor, is_cond: Sequence[bool], acting: Sequence[bool]) -> Call:
    """The call of a UNet with latents [R, C, h, w]."""
    return Call((x.shape[2], x.shape[3]), tuple(is_cond), tuple(acting))
