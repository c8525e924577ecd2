"""InstantID's second half: keys and values for attention to the identity tokens in the checkpoint's own UNet.

IP-Adapter's decoupled cross-attention (Ye et al. 2023, github.com/tencent-ailab/IP-Adapter): beside each
cross-attention to the text, with the same queries, one to the identity tokens, added before the output projection:

    h = softmax(Q Kᵀ / √d) V + weight · softmax(Q K'ᵀ / √d) V',   K' = tokens · W_k, V' = tokens · W_v

Keys and values depend on the tokens alone, so they are computed once a job, and hosts get those few numbers.
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

    widths: tuple[int, ...]  # of each cross-attention of the UNet, in `cross_attentions`' order
    context_dim: int  # width of an identity token

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> AdapterConfig:
        """Read the sizes from the shapes of the tensors in `ip_adapter`, named as in `Adapter`.

        Raises:
            KeyError: a tensor is missing.
        """
        count = sum(key.endswith(".to_k_ip.weight") for key in shapes)
        widths = [shapes[f"{2 * i + 1}.to_k_ip.weight"] for i in range(count)]
        return cls(tuple(width for width, _ in widths), widths[0][1])


class Adapter(nn.Module):
    """The projections, under the names that they have in `ip-adapter.bin`: numbered through all attentions of
    diffusers' UNet, of which every second is a cross-attention."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        for i, width in enumerate(config.widths):
            self.add_module(str(2 * i + 1), _Projections(config.context_dim, width))

    @torch.no_grad()
    def forward(self, tokens: Tensor, uncond_tokens: Tensor) -> tuple[KeysValues, ...]:
        """Keys and values [2, T, width] for each cross-attention, float32, of identity tokens [1, T, context_dim]:
        those of the conditional side, and of the unconditional one."""
        both = torch.cat([tokens, uncond_tokens]).float()
        return tuple(
            (both @ layer.to_k_ip.weight.float().T, both @ layer.to_v_ip.weight.float().T) for layer in self.children()
        )


class _Projections(nn.Module):
    def __init__(self, context_dim: int, width: int):
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, width, bias=False)
        self.to_v_ip = nn.Linear(context_dim, width, bias=False)
