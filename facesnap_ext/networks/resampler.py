"""InstantID's Resampler as a Mixer: identity tokens from ArcFace's embedding, and where it is to be trained further
from CLIP's features as well.

The Resampler is IP-Adapter's perceiver (github.com/tencent-ailab/IP-Adapter, `resampler.py`) in InstantID's sizes
(github.com/InstantID/InstantID, `image_proj` of `ip-adapter.bin`), and its tensors keep their names here. It takes the
place of the paper's Mixer (`mixer.py`) in FaceSnap files that were made from InstantID.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADDED = ("project_clip.", "clip_layers.")  # tensors that InstantID's Resampler does not have


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of a `ResamplerMixer`. The defaults are InstantID's, and CLIP-ViT-H's; a `clip_dim` of 0 is InstantID's
    own, which knows nothing of CLIP."""

    id_dim: int = 512
    clip_dim: int = 1280
    dim: int = 2048  # width of an identity token
    width: int = 1280  # of the latents between the layers
    queries: int = 16
    layers: int = 4
    feedforward: int = 5120
    heads: int = 20
    head_dim: int = 64

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, Sequence[int]], clip_dim: int = 1280, head_dim: int = 64
    ) -> ResamplerConfig:
        """Read the sizes from the shapes of InstantID's tensors, which know nothing of CLIP.

        Args:
            head_dim: channels of an attention head; leaves no trace in the tensors.

        Raises:
            KeyError: a tensor is missing.
        """
        _, queries, width = shapes["latents"]
        return cls(
            id_dim=shapes["proj_in.weight"][1],
            clip_dim=clip_dim,
            dim=shapes["proj_out.weight"][0],
            width=width,
            queries=queries,
            layers=sum(key.startswith("layers.") and key.endswith(".0.to_q.weight") for key in shapes),
            feedforward=shapes["layers.0.1.1.weight"][0],
            heads=shapes["layers.0.0.to_q.weight"][0] // head_dim,
            head_dim=head_dim,
        )


class ResamplerMixer(nn.Module):
    """Fuse the features of one person's references into identity tokens, as InstantID's Resampler as long as the
    output projections of `clip_layers` are zero; that is how they start.

    CLIP has cross-attentions of its own, one after each of the Resampler's. Had its tokens been put beside the
    Resampler's keys, the softmax would spread over them from the start, and keys or values of zero would still take
    their share of the weights and thin out the identity.
    """

    def __init__(self, config: ResamplerConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.latents = nn.Parameter(torch.randn(1, config.queries, width) / width**0.5)
        self.proj_in = nn.Linear(config.id_dim, width)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(config), feed_forward(width, config.feedforward)])
            for _ in range(config.layers)
        )
        self.proj_out = nn.Linear(width, config.dim)
        self.norm_out = nn.LayerNorm(config.dim)
        if config.clip_dim:
            self.project_clip = nn.Linear(config.clip_dim, width)
            self.clip_layers = nn.ModuleList(PerceiverAttention(config) for _ in range(config.layers))
            for attention in self.clip_layers:
                nn.init.zeros_(attention.to_out.weight)

    def forward(self, embeddings: Tensor, clip_tokens: Tensor | None = None) -> Tensor:
        """Mix R references of each of N people.

        Args:
            embeddings: ArcFace embeddings [N, R, id_dim] as the network gives them; their length counts, InstantID
                was trained on embeddings that were not normalised.
            clip_tokens: CLIP image tokens of the face crops [N, R, T, clip_dim]; of no use at a `clip_dim` of 0.

        Returns:
            Identity tokens [N, queries, dim]. The order of the references does not matter, and a reference given
            twice counts as one.
        """
        references = embeddings.shape[1]
        faces = self.proj_in(embeddings)
        pictures = self.project_clip(clip_tokens.flatten(1, 2)) if self.config.clip_dim else None
        latents = self.latents.expand(embeddings.shape[0], -1, -1)
        for i, (attention, feedforward) in enumerate(self.layers):
            latents = latents + attention(faces, latents, references)
            if pictures is not None:
                latents = latents + self.clip_layers[i](pictures, latents, references)
            latents = latents + feedforward(latents)
        return self.norm_out(self.proj_out(latents))

    def average(self, embeddings: Tensor, clip_tokens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """R references as one, for `forward`: their plain mean, as InstantID's users average; since embeddings of one
        person do not all point one way it is shorter than they are."""
        return embeddings.mean(1, keepdim=True), None if clip_tokens is None else clip_tokens.mean(1, keepdim=True)


class PerceiverAttention(nn.Module):
    """Attention of the latents to a face's features and to themselves."""

    def __init__(self, config: ResamplerConfig):
        super().__init__()
        self.heads = config.heads
        inner = config.heads * config.head_dim
        self.norm1 = nn.LayerNorm(config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.to_q = nn.Linear(config.width, inner, bias=False)
        self.to_kv = nn.Linear(config.width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.width, bias=False)

    def forward(self, x: Tensor, latents: Tensor, references: int) -> Tensor:
        """What to add to the latents [N, queries, width], from features [N, K, width] of so many references.

        The references stand side by side as keys, and share the weight that one has beside the latents: that of each
        key is divided by their number.
        """
        latents = self.norm2(latents)
        x = torch.cat([self.norm1(x), latents], dim=1)
        q, k, v = (self._split(t) for t in (self.to_q(latents), *self.to_kv(x).chunk(2, dim=-1)))
        bias = q.new_zeros(x.shape[1])
        bias[: -latents.shape[1]] = -math.log(references)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(q.shape[2], -1))
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def feed_forward(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False)
    )
