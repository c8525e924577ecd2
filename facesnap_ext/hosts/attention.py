"""InstantID's adapter half in a UNet: attention to the identity tokens is added to each cross-attention's output.

The hooks are on `to_q` and on the output projection, which every host's attention calls with any kernel. They work
with LoRAs and other adapters and replace nothing. They are reset for each UNet call: queries are only kept
during the call, and outside an announced call the hooks do nothing.

Extensions for regional prompts call an attention layer once for each region with some of the rows (Regional Prompter),
or repeat rows for the regions and pad them with zeros (Forge Couple). They then mix the outputs with weights that add
up to 1, so each of their rows is conditioned like the row that it was copied from. For this, further hooks record the
original rows (on the norm before each cross-attention) and the size of the features (on the transformer around it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.networks.ffrnet import KeysValues
from facesnap_ext.residuals import Residuals

ROWS_SPLIT = (
    "Another extension splits the rows of the UNet calls in a way that FaceSnap does not know, so it cannot tell the "
    "positive from the negative prompt; disable that extension or FaceSnap."
)
LEVELS = (("input_blocks.", "down_blocks."), ("output_blocks.", "up_blocks."), ("middle_block.", "mid_block."))

RowLabel = tuple[bool, int]  # whether a row is conditional, and the index of its image in the batch


@dataclass(frozen=True)
class Call:
    """The rows of one UNet call.

    Attributes:
        is_cond: whether each row is conditional.
        acting: whether each person is active.
        images: the index in the batch of each row's image.
    """

    is_cond: tuple[bool, ...]
    acting: tuple[bool, ...]
    images: tuple[int, ...]


class AdapterHooks:
    """The adapters of all people in an image, on one UNet.

    Args:
        shown_errors: returns a context manager for code that may raise a `FaceSnapError` during sampling.

    Attributes:
        call: the running UNet call. The host sets it before each of its own calls and clears it for other calls.
    """

    def __init__(self, residuals: Residuals, shown_errors: Callable[[], AbstractContextManager[None]] = nullcontext):
        self.residuals = residuals
        self._shown_errors = shown_errors
        self.call: Call | None = None
        self._handles: list[Any] = []
        self._rows: Tensor | None = None  # inputs of the running attention for all rows of the call, [R, N, width]
        self._size: tuple[int, ...] = ()  # height and width of the running attention's features
        self._queries: dict[int, tuple[Tensor, Tensor]] = {}  # queries of each layer, with their inputs
        self._keys_values: dict[int, tuple[KeysValues, ...]] = {}  # one pair for each layer, by person
        self._on_device: dict[tuple[int, int], KeysValues] = {}  # copies on the UNet's device, by person and layer

    def hook(self, unet: nn.Module) -> None:
        """Install the hooks on a UNet, and remove them from the previous one. Without adapters there are no hooks.

        Raises:
            FaceSnapError: the UNet's cross-attentions do not match an adapter.
        """
        self.remove()
        people = self.residuals.people
        self._keys_values = {i: one.adapter() for i, one in enumerate(people) if one.adapter and one.has_adapter}
        if not self._keys_values:
            return
        layers = cross_attentions(unet)
        expected = tuple([_width(layer) for layer in layers])
        for i, keys_values in self._keys_values.items():
            actual = tuple([keys.shape[-1] for keys, _ in keys_values])
            if actual != expected:
                raise FaceSnapError(
                    f"The adapter of {people[i].name} was made for {len(actual)} cross-attentions, but this "
                    f"checkpoint's UNet has {len(expected)}, or they have different widths; set the adapter weight to "
                    "0 or choose a different checkpoint."
                )
        transformers, norms = surroundings(unet)
        self._handles += [module.register_forward_pre_hook(self._keep_size) for module in transformers]
        self._handles += [module.register_forward_hook(self._keep_rows) for module in norms]
        for i, layer in enumerate(layers):
            self._handles.append(layer.to_q.register_forward_hook(self._keep_queries(i)))
            self._handles.append(layer.to_out[0].register_forward_pre_hook(self._add_attention(i, layer.heads)))

    def remove(self) -> None:
        """Remove all hooks; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._rows, self._size = None, ()
        self._queries.clear()
        self._keys_values.clear()
        self._on_device.clear()
        self.call = None

    def _keep_size(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._size = tuple(args[0].shape[2:])

    def _keep_rows(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._rows = None if self.call is None else output

    def _keep_queries(self, layer: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self.call is not None:
                self._queries[layer] = args[0], output

        return keep

    def _add_attention(self, layer: int, heads: int) -> Callable[..., tuple[Any, ...] | None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            kept = self._queries.pop(layer, None)
            if self.call is None or kept is None:
                return None
            with self._shown_errors():
                extra = self._attend(self.call, layer, *kept, heads)
            return None if extra is None else (args[0] + extra.to(args[0].dtype), *args[1:])

        return add

    def _attend(self, call: Call, layer: int, inputs: Tensor, queries: Tensor, heads: int) -> Tensor | None:
        """The contribution of all people's tokens to the attention's output [R, N, width]; None if no one is active."""
        who = tuple([i for i, acts in enumerate(call.acting) if acts])
        labels = tuple(zip(call.is_cond, call.images if self.residuals.per_image(who) else [0] * len(call.images)))
        rows: list[RowLabel] = []
        total = None
        for position, i in enumerate(who):
            person = self.residuals.people[i]
            if not person.has_adapter:
                continue
            rows = rows or labels_of(inputs, self._rows, labels)
            sides = [0 if is_cond else 1 for is_cond, _ in rows]
            select = self.residuals.constants.select
            keys, values = (select(part, sides) for part in self._moved(i, layer, queries))
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (queries, keys, values))
            attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            part = person.strength.adapter_weight * attention
            if len(who) > 1 or person.region is not None or person.placements:
                part = part * self._blend_weight(who, position, part, [image for _, image in rows])
            if person.strength.cond_only:
                cond = self.residuals.constants.tensor([is_cond for is_cond, _ in rows], part.device, part.dtype)
                part = part * cond[:, None, None]
            total = part if total is None else total + part
        return total

    def _moved(self, person: int, layer: int, like: Tensor) -> KeysValues:
        """A layer's keys and values, moved to the device and type of its queries."""
        moved = self._on_device.get((person, layer))
        if moved is None or moved[0].device != like.device or moved[0].dtype != like.dtype:
            keys, values = self._keys_values[person][layer]
            moved = self._on_device[person, layer] = keys.to(like), values.to(like)
        return moved

    def _blend_weight(self, who: tuple[int, ...], position: int, part: Tensor, images: Sequence[int]) -> Tensor:
        """A person's weight for each token, [R, N, 1]; R is 1 if it is the same in all rows, and N is 1 if no one has a
        region."""
        height, width = self._size
        if height * width != part.shape[1]:
            raise FaceSnapError(
                "Another extension merges the UNet's tokens, so regions cannot be applied to InstantID's adapter; "
                "disable that extension or set the adapter weight to 0."
            )
        return self.residuals.row_weights(who, height, width, images, part)[position].flatten(1)[:, :, None]


def cross_attentions(unet: nn.Module) -> list[Any]:
    """The cross-attentions of a UNet with LDM's or diffusers' names, in the order of diffusers' attention processors:
    down, up, middle."""
    modules = [(name, module) for name, module in unet.named_modules() if name.endswith(".attn2")]
    return [module for level in LEVELS for name, module in modules if name.startswith(level)]


def surroundings(unet: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The transformers around a UNet's cross-attentions, which get features [R, C, h, w], and the norms before them."""
    modules = dict(unet.named_modules())
    blocks = [name.removesuffix(".attn2") for name in modules if name.endswith(".attn2")]
    transformers = dict.fromkeys(name.rpartition(".transformer_blocks.")[0] for name in blocks)
    norms = (modules.get(f"{name}.norm2") for name in blocks)
    return [modules[name] for name in transformers], [norm for norm in norms if norm is not None]


def labels_of(part: Tensor, whole: Tensor | None, labels: Sequence[RowLabel]) -> list[RowLabel]:
    """The labels of the rows that an attention layer is called with.

    Args:
        part: the rows that the attention layer is called with.
        whole: all rows of the UNet call before the attention layer, if they are known.
        labels: the label of each row of the UNet call.

    Raises:
        FaceSnapError: a row of `part` is not in `whole`, or occurs there with different labels.
    """
    if whole is not None and len(whole) == len(labels) and whole.shape[1:] == part.shape[1:]:
        places = {row.data_ptr(): label for row, label in zip(whole, labels)}
        known = [places.get(row.data_ptr()) or _label_of(row, whole, labels) for row in part]
        if None not in known:
            return [label for label in known if label is not None]
    if len(part) != len(labels):
        raise FaceSnapError(ROWS_SPLIT)
    return list(labels)


def _label_of(row: Tensor, whole: Tensor, labels: Sequence[RowLabel]) -> RowLabel | None:
    """The label of the rows of `whole` that are equal to a row; None if there are several labels or no such rows.

    A row of zeros is only padding, and its output is not used.
    """
    equal = (whole == row).flatten(1).all(1).tolist()
    found = {label for label, same in zip(labels, equal) if same}
    if len(found) == 1:
        return found.pop()
    return None if found or bool(row.any()) else (True, 0)


def _width(attention: Any) -> int:
    """The width of the queries; Forge's quantised projections do not have `out_features`."""
    return getattr(attention.to_q, "out_features", None) or attention.heads * attention.dim_head
