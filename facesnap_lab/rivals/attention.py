"""How a rival changes the attention of diffusers' SDXL UNet: decoupled cross-attention and LoRA.

The UNet's attention processors are replaced by `InjectedAttention`. A UNet call passes the changes as
`cross_attention_kwargs={"injection": …}`. They are arguments, not state, so gradient checkpointing recomputes a block
with the same ones. A call without an injection is computed exactly as with diffusers' `AttnProcessor2_0`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.networks.adapter import Adapter, AdapterConfig
from facesnap_ext.networks.ffrnet import KeysValues

CROSS = ".attn2"  # how diffusers' names of cross-attentions end
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")

LoRA = tuple[Tensor, Tensor]  # down [rank, inputs] and up [outputs, rank]; their product is added to the weight


@dataclass(frozen=True, eq=False)
class Attended:
    """What one cross-attention computed, each [N, heads, tokens, head_dim]: the queries of the image, the keys of the
    text, and the keys of the identity tokens, if there are any."""

    queries: Tensor
    text_keys: Tensor
    identity_keys: Tensor | None


@dataclass(frozen=True, eq=False)
class Injection:
    """What a rival adds to one UNet call of N rows.

    Attributes:
        context: the text that the UNet attends to [N, T, C].
        keys_values: keys and values of identity tokens for each cross-attention, in the order of
            `facesnap_ext.hosts.attention.cross_attentions`. Each cross-attention attends to them separately.
        lora: low-rank changes of projections, by the names that `lora_layers` returns.
        residuals: a ControlNet's residuals, from shallow to deep, with the middle block's residual last.
        attended: if not None, the cross-attentions store what they computed in it, by their index.
    """

    context: Tensor
    keys_values: tuple[KeysValues, ...] = ()
    lora: Mapping[str, LoRA] = field(default_factory=dict)
    residuals: tuple[Tensor, ...] = ()
    attended: dict[int, Attended] | None = None

    def rows(self, rows: Sequence[int]) -> Injection:
        """Select rows. A residual injection cannot be selected, because its rows belong to one UNet call."""
        pairs = tuple([(keys[list(rows)], values[list(rows)]) for keys, values in self.keys_values])
        return replace(self, context=self.context[list(rows)], keys_values=pairs)

    def to(self, like: Tensor) -> Injection:
        """Move keys, values and LoRAs to a tensor's device and type."""
        pairs = tuple([(keys.to(like), values.to(like)) for keys, values in self.keys_values])
        lora = {name: (down.to(like), up.to(like)) for name, (down, up) in self.lora.items()}
        return replace(self, context=self.context.to(like), keys_values=pairs, lora=lora)


class InjectedAttention:
    """An attention processor of diffusers, for the attention layers of SDXL's transformer blocks.

    Decoupled cross-attention is that of IP-Adapter (Ye et al. 2023, eq. 5):
    softmax(Q Kᵀ / √d) V + softmax(Q K'ᵀ / √d) V', with K' and V' of the identity tokens.
    """

    def __init__(self, name: str, index: int | None):
        """
        Args:
            name: diffusers' name of the layer. index: position among the cross-attentions, or None for self-attention.
        """
        self.name, self.index = name, index

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        injection: Injection | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        lora = {} if injection is None else injection.lora

        def project(part: str, layer: nn.Module, x: Tensor) -> Tensor:
            change = lora.get(lora_name(self.name, part))
            if change is None:
                return layer(x)
            down, up = (matrix.to(x.dtype) for matrix in change)
            return layer(x) + F.linear(F.linear(x, down), up)

        def split(x: Tensor) -> Tensor:
            return x.to(hidden_states.dtype).unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        queries = split(project("to_q", attn.to_q, hidden_states))
        keys = split(project("to_k", attn.to_k, context))
        values = split(project("to_v", attn.to_v, context))
        out = F.scaled_dot_product_attention(queries, keys, values)
        if injection is not None and self.index is not None:
            own = None
            if injection.keys_values:
                own, own_values = map(split, injection.keys_values[self.index])
                out = out + F.scaled_dot_product_attention(queries, own, own_values)
            if injection.attended is not None:  # a recomputation must not replace what the loss was computed from
                injection.attended.setdefault(self.index, Attended(queries, keys, own))
        return project("to_out.0", attn.to_out[0], out.transpose(1, 2).flatten(2))


def install(unet: Any) -> dict[str, Any]:
    """Replace all attention processors of a UNet by `InjectedAttention`, and return the previous ones."""
    previous = dict(unet.attn_processors)
    names = [name.removesuffix(".processor") for name in previous]
    order = {name: i for i, name in enumerate(name for name in names if name.endswith(CROSS))}
    unet.set_attn_processor({f"{name}.processor": InjectedAttention(name, order.get(name)) for name in names})
    return previous


def lora_name(layer: str, part: str) -> str:
    """Name a projection of an attention layer, like kohya's LoRAs: with underscores instead of dots."""
    return f"{layer}.{part}".replace(".", "_")


def lora_layers(unet: Any) -> tuple[tuple[str, int, int], ...]:
    """Return name, inputs and outputs of the projections in all attention layers of a UNet."""
    modules = dict(unet.named_modules())
    layers = [name.removesuffix(".processor") for name in unet.attn_processors]
    found = [(lora_name(layer, part), modules[f"{layer}.{part}"]) for layer in layers for part in PROJECTIONS]
    return tuple([(name, module.in_features, module.out_features) for name, module in found])


@contextmanager
def injected(pipe: Any, null: Injection, conditional: Injection) -> Iterator[None]:
    """Change every UNet call of a diffusers pipeline inside the `with` block.

    Args:
        null, conditional: the injections of a row with the negative prompt and of a row with the prompt. Their LoRAs
            are the same. The pipeline receives their contexts as embeddings of the prompts.
    """
    unet = pipe.unet
    like = torch.empty(0, device=unet.device, dtype=unet.dtype)
    pairs = zip(null.keys_values, conditional.keys_values)
    both = Injection(
        torch.cat([null.context, conditional.context]),
        tuple([(torch.cat([k0, k1]), torch.cat([v0, v1])) for (k0, v0), (k1, v1) in pairs]),
        conditional.lora,
    ).to(like)

    def inject(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        rows = len(kwargs["sample"] if "sample" in kwargs else args[0])
        uncond = rows // 2 if pipe.do_classifier_free_guidance else 0  # unconditional rows come first
        injection = both.rows([0] * uncond + [1] * (rows - uncond))
        return args, kwargs | {
            "cross_attention_kwargs": {**(kwargs.get("cross_attention_kwargs") or {}), "injection": injection}
        }

    previous = install(unet)
    handle = unet.register_forward_pre_hook(inject, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        unet.set_attn_processor(previous)


def adapter_for(unet: Any) -> Adapter:
    """Return key and value projections for identity tokens, initialised with the UNet's own projections of the text, as
    in IP-Adapter's training (`tutorial_train_sdxl.py`)."""
    layers = [module for name, module in unet.named_modules() if name.endswith(CROSS)]
    adapter = Adapter(AdapterConfig(tuple([layer.to_k.out_features for layer in layers]), layers[0].to_k.in_features))
    with torch.no_grad():
        for own, layer in zip(adapter.children(), layers, strict=True):
            own.to_k_ip.weight.copy_(layer.to_k.weight)
            own.to_v_ip.weight.copy_(layer.to_v.weight)
    return adapter


def keys_values(adapter: Adapter, tokens: Tensor) -> tuple[KeysValues, ...]:
    """Return keys and values [N, T, width] of all cross-attentions for identity tokens [N, T, C], with gradients."""
    return tuple([(layer.to_k_ip(tokens), layer.to_v_ip(tokens)) for layer in adapter.children()])
