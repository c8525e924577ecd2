"""InstantID's IP-Adapter half: keys and values for attending to the identity tokens in the checkpoint's UNet.

This is IP-Adapter's decoupled cross-attention (Ye et al. 2023, github.com/tencent-ailab/IP-Adapter). Each
cross-attention to the text gets a second attention to the identity tokens, with the same queries. Its output is added
before the output projection:

    h = softmax(Q Kᵀ / √d) V + weight · softmax(Q K'ᵀ / √d) V',   K' = tokens · W_k, V' = tokens · W_v

Keys and values depend only on the tokens. They are therefore computed once per job, and hosts only handle these small
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from facesnap_ext.networks.ffrnet import KeysValues


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes of an `Adapter`."""

    widths: tuple[int, ...]  # width of each cross-attention in the UNet, in the order of `cross_attentions`
    context_dim: int  # width of an identity token

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> AdapterConfig:
        """Derive the sizes from tensor shapes.

        Args:
            shapes: shapes of the tensors in `ip_adapter`, named as in `Adapter`.

        Raises:
            KeyError: a tensor is missing.
        """
        count = sum(key.endswith(".to_k_ip.weight") for key in shapes)
        widths = [shapes[f"{2 * i + 1}.to_k_ip.weight"] for i in range(count)]
        return cls(tuple([width for width, _ in widths]), widths[0][1])


class Adapter(nn.Module):
    """The key and value projections, with the tensor names of `ip-adapter.bin`.

    The numbers in these names count all attention layers of diffusers' UNet; every second one is cross-attention.
    """

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        for i, width in enumerate(config.widths):
            self.add_module(str(2 * i + 1), _Projections(config.context_dim, width))

    @torch.no_grad()
    def forward(self, tokens: Tensor, uncond_tokens: Tensor) -> tuple[KeysValues, ...]:
        """Compute the keys and values of all cross-attentions.

        Args:
            tokens: identity tokens [1, T, context_dim] of the conditional rows.
            uncond_tokens: identity tokens [1, T, context_dim] of the unconditional rows.

        Returns:
            Keys and values for each cross-attention, each [2, T, width] float32: the conditional row, then the
            unconditional one.
        """
        both = torch.cat([tokens, uncond_tokens]).float()
        layers = [layer for layer in self.children() if isinstance(layer, _Projections)]
        return tuple(
            [(both @ layer.to_k_ip.weight.float().T, both @ layer.to_v_ip.weight.float().T) for layer in layers]
        )


class _Projections(nn.Module):
    def __init__(self, context_dim: int, width: int):
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, width, bias=False)
        self.to_v_ip = nn.Linear(context_dim, width, bias=False)
