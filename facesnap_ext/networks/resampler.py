"""InstantID's Resampler as a Mixer: map ArcFace embeddings, and optionally CLIP features, to identity tokens.

The Resampler is IP-Adapter's perceiver (github.com/tencent-ailab/IP-Adapter, `resampler.py`) with InstantID's sizes
(github.com/InstantID/InstantID, `image_proj` of `ip-adapter.bin`). Its tensors keep their names. It replaces the
paper's Mixer (`mixer.py`) in FaceSnap files made from InstantID. The CLIP layers are an addition for further training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLIP_PREFIXES = ("project_clip.", "clip_layers.")  # key prefixes of the tensors that InstantID's Resampler lacks


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of a `ResamplerMixer`. The defaults match InstantID and CLIP-ViT-H."""

    id_dim: int = 512  # width of an ArcFace embedding
    clip_dim: int = 1280  # width of a CLIP image token; 0: InstantID's original Resampler, without CLIP
    dim: int = 2048  # width of an identity token
    width: int = 1280  # width of the latents between the layers
    queries: int = 16  # learned queries, hence identity tokens
    layers: int = 4
    feedforward: int = 5120  # hidden width of the feed-forward layers
    heads: int = 20  # attention heads
    head_dim: int = 64  # channels of an attention head

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, Sequence[int]], clip_dim: int = 1280, head_dim: int = 64
    ) -> ResamplerConfig:
        """Derive the sizes from the shapes of InstantID's tensors.

        Args:
            shapes: tensor shapes by InstantID's key names; none of these tensors are for CLIP.
            clip_dim: width of a CLIP image token, or 0 for no CLIP.
            head_dim: channels of an attention head; cannot be derived from tensor shapes.

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
    """Fuse the features of one person's references into identity tokens.

    The output projections of `clip_layers` are initialised to zero. As long as they are zero, the result equals that of
    InstantID's Resampler.

    CLIP has separate cross-attentions, one after each attention of the Resampler. If its tokens were concatenated with
    the Resampler's keys instead, they would receive part of the softmax weights from the start, even with keys or
    values of zero, and weaken the identity.
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
            clip_layers = [PerceiverAttention(config) for _ in range(config.layers)]
            for attention in clip_layers:
                nn.init.zeros_(attention.to_out.weight)
            self.clip_layers = nn.ModuleList(clip_layers)

    def forward(self, embeddings: Tensor, clip_tokens: Tensor | None = None) -> Tensor:
        """Fuse R references for each of N people.

        Args:
            embeddings: ArcFace embeddings [N, R, id_dim], not normalised. Their norm matters, because InstantID was
                trained on embeddings that were not normalised.
            clip_tokens: CLIP image tokens of the face crops [N, R, T, clip_dim]; unused if `clip_dim` is 0.

        Returns:
            Identity tokens [N, queries, dim]. The order of the references does not matter, and giving all of them twice
            changes nothing.

        Raises:
            ValueError: `clip_tokens` are required but missing.
        """
        clip_features = None
        if self.config.clip_dim:
            if clip_tokens is None:
                raise ValueError("this Resampler was extended with CLIP and requires clip_tokens")
            clip_features = self.project_clip(clip_tokens.flatten(1, 2))
        latents = self.latents.expand(embeddings.shape[0], -1, -1)
        return self.resample(self.proj_in(embeddings), latents, embeddings.shape[1], clip_features)

    def resample(
        self, features: Tensor, latents: Tensor, references: int, clip_features: Tensor | None = None
    ) -> Tensor:
        """Let latents attend to features, and return tokens [N, queries, dim].

        Args:
            features, clip_features: after their input projections [N, K, width]; `clip_features` only with CLIP layers.
            latents: [N, queries, width]. references: see `PerceiverAttention.forward`.
        """
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, nn.ModuleList)
            attention, feedforward = layer
            latents = latents + attention(features, latents, references)
            if clip_features is not None:
                latents = latents + self.clip_layers[i](clip_features, latents, references)
            latents = latents + feedforward(latents)
        return self.norm_out(self.proj_out(latents))

    def average(self, embeddings: Tensor, clip_tokens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Average R references into one by taking the plain mean, as is common with InstantID.

        Embeddings of one person differ in direction, so the mean has a smaller norm than the embeddings themselves.
        """
        return embeddings.mean(1, keepdim=True), None if clip_tokens is None else clip_tokens.mean(1, keepdim=True)


class PerceiverAttention(nn.Module):
    """Attention from the latents to a face's features and to the latents themselves."""

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
        """Return the update [N, queries, width] of the latents.

        All references are concatenated as keys. The softmax weight of each of their keys is divided by the number of
        references, so that together they have the weight that a single reference has relative to the latents.

        Args:
            x: features [N, K, width] of all references.
            latents: [N, queries, width].
            references: number of references in `x`.
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
