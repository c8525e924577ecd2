"""Facial Attribute Mixer: map ArcFace and CLIP features of a face to identity tokens (FaceSnap, eqs. 1 and 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class MixerConfig:
    """Sizes of a Mixer. The defaults come from the paper (section 2.1), except for `layers`, `feedforward` and `heads`,
    which it does not state."""

    id_dim: int = 512  # width of an ArcFace embedding
    clip_dim: int = 1280  # width of a CLIP image token
    dim: int = 2048  # width of an identity token, and of all hidden states
    id_tokens: int = 20  # number of tokens that an ArcFace embedding is projected to
    queries: int = 16  # number of learned queries, and therefore of identity tokens
    layers: int = 2  # decoder layers
    feedforward: int = 8192  # hidden width of the decoder's feed-forward layers
    heads: int = 32  # attention heads

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], heads: int) -> MixerConfig:
        """Derive the sizes from tensor shapes. The number of heads cannot be derived and must be given."""
        queries, dim = shapes["queries"]
        return cls(
            id_dim=shapes["project_id.weight"][1],
            clip_dim=shapes["project_clip.weight"][1],
            dim=dim,
            id_tokens=shapes["project_id.weight"][0] // dim,
            queries=queries,
            layers=sum(key.endswith(".self_attn.in_proj_weight") for key in shapes),
            feedforward=shapes["decoder.layers.0.linear1.weight"][0],
            heads=heads,
        )


class FacialAttributeMixer(nn.Module):
    """Fuse the features of one person's references into identity tokens.

    Attention uses pre-normalisation and residual connections, the usual form of the blocks that the paper mentions.
    """

    def __init__(self, config: MixerConfig):
        super().__init__()
        self.config = config
        dim, heads = config.dim, config.heads
        self.project_id = nn.Linear(config.id_dim, config.id_tokens * dim)  # pi_1
        self.project_clip = nn.Linear(config.clip_dim, dim)  # pi_2
        self.norm_id = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim)
        self.cross_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm_fused = nn.LayerNorm(dim)
        self.queries = nn.Parameter(torch.randn(config.queries, dim) / dim**0.5)
        layer = nn.TransformerDecoderLayer(
            dim, heads, config.feedforward, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, config.layers, norm=nn.LayerNorm(dim))
        self._init_distinct_tokens()

    def _init_distinct_tokens(self) -> None:
        """Initialise attention so that it distinguishes between tokens. With PyTorch's default initialisation, all
        tokens have nearly equal weights, and a person's 16 identity tokens are all the same mean."""
        nn.init.normal_(self.project_id.bias)  # the bias serves as a position embedding for each token of f'_id
        for attention in (module for module in self.modules() if isinstance(module, nn.MultiheadAttention)):
            attention.in_proj_weight.data[: 2 * self.config.dim] *= 2  # queries and keys; scores grow by a factor of 4

    def forward(self, embeddings: Tensor, clip_tokens: Tensor) -> Tensor:
        """Fuse R references for each of N people.

        Args:
            embeddings: ArcFace embeddings [N, R, id_dim] of any norm; only their direction is used.
            clip_tokens: CLIP image tokens of the face crops [N, R, T, clip_dim].

        Returns:
            Identity tokens [N, queries, dim]. The tokens of all references are concatenated as queries, keys and
            values, so the order of the references does not matter, and giving all of them twice changes nothing.
        """
        f_id, f_clip = self.id_features(embeddings), self.clip_features(clip_tokens)
        return self.decode(self.fuse(f_id, torch.cat([f_id, f_clip], dim=1)))

    def average(self, embeddings: Tensor, clip_tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Average R references into one; see `average_references`."""
        assert clip_tokens is not None, "this Mixer takes CLIP tokens"
        return average_references(embeddings, clip_tokens)

    def id_features(self, embeddings: Tensor) -> Tensor:
        """Project embeddings [N, R, id_dim] to f'_id [N, R × id_tokens, dim]."""
        # Scale to unit variance per entry; an embedding of unit norm would be drowned out by the CLIP tokens.
        directions = F.normalize(embeddings, dim=-1) * self.config.id_dim**0.5
        projected = self.project_id(directions)
        return projected.reshape(len(embeddings), -1, self.config.dim)

    def clip_features(self, clip_tokens: Tensor) -> Tensor:
        """Project CLIP tokens [N, R, T, clip_dim] to f'_clip [N, R × T, dim]."""
        return self.project_clip(clip_tokens).flatten(1, 2)

    def fuse(self, f_id: Tensor, context: Tensor) -> Tensor:
        """Eq. 1: attend from f'_id to `context` [N, K, dim], giving f_pre [N, R × id_tokens, dim]."""
        context = self.norm_context(context)
        return f_id + self.cross_attn(self.norm_id(f_id), context, context, need_weights=False)[0]

    def decode(self, f_pre: Tensor) -> Tensor:
        """Eq. 2: decode features [N, K, dim] to identity tokens [N, queries, dim]."""
        return self.decoder(self.queries.expand(len(f_pre), -1, -1), self.norm_fused(f_pre))


def average_references(embeddings: Tensor, clip_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Average R references into one, as an alternative to fusing them.

    Args:
        embeddings: [N, R, id_dim]. Their directions are averaged, so that a blurred photo, whose embedding has a small
            norm, counts as much as a sharp one.
        clip_tokens: [N, R, T, clip_dim].

    Returns:
        Embeddings [N, 1, id_dim] with the mean norm of the input embeddings, and CLIP tokens [N, 1, T, clip_dim].
    """
    direction = F.normalize(F.normalize(embeddings, dim=-1).mean(dim=1, keepdim=True), dim=-1)
    length = embeddings.norm(dim=-1, keepdim=True).mean(dim=1, keepdim=True)
    return direction * length, clip_tokens.mean(dim=1, keepdim=True)
