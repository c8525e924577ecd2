"""Facial Attribute Mixer: ArcFace and CLIP features of a face become identity tokens (FaceSnap, eqs. 1 and 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class MixerConfig:
    """Sizes of a Mixer. The defaults are the paper's (section 2.1); depth and heads are ours, the paper names none."""

    id_dim: int = 512
    clip_dim: int = 1280
    dim: int = 2048
    id_tokens: int = 20
    queries: int = 16
    layers: int = 2
    feedforward: int = 8192
    heads: int = 32

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], heads: int) -> MixerConfig:
        """Read every size from the tensors' shapes; only the number of heads leaves no trace in them."""
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

    Attention is pre-normalised with residual connections, the usual form of the blocks that the paper names.
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
        self._tell_tokens_apart()

    def _tell_tokens_apart(self) -> None:
        """Start with attention that sees tokens unlike each other: PyTorch's own start weighs all of them alike, and
        the identity tokens of a person are then one mean, 16 times."""
        nn.init.normal_(self.project_id.bias)  # each token of f'_id gets an address, as CLIP's have their places
        for attention in (module for module in self.modules() if isinstance(module, nn.MultiheadAttention)):
            attention.in_proj_weight.data[: 2 * self.config.dim] *= 2  # queries and keys: scores 4 times as far apart

    def forward(self, embeddings: Tensor, clip_tokens: Tensor) -> Tensor:
        """Mix R references of each of N people.

        Args:
            embeddings: ArcFace embeddings [N, R, id_dim]; of any length, only their direction is used.
            clip_tokens: CLIP image tokens of the face crops [N, R, T, clip_dim].

        Returns:
            Identity tokens [N, queries, dim]. The order of the references does not matter, and a reference given
            twice counts as one: the tokens of all references stand side by side as queries, keys and values.
        """
        f_id, f_clip = self.id_features(embeddings), self.clip_features(clip_tokens)
        return self.decode(self.fuse(f_id, torch.cat([f_id, f_clip], dim=1)))

    def average(self, embeddings: Tensor, clip_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """R references as one: `average_references`."""
        return average_references(embeddings, clip_tokens)

    def id_features(self, embeddings: Tensor) -> Tensor:
        """f'_id [N, R × id_tokens, dim] of embeddings [N, R, id_dim]."""
        # entries of variance 1: those of a vector of length 1 would drown among CLIP's
        directions = F.normalize(embeddings, dim=-1) * self.config.id_dim**0.5
        projected = self.project_id(directions)
        return projected.reshape(len(embeddings), -1, self.config.dim)

    def clip_features(self, clip_tokens: Tensor) -> Tensor:
        """f'_clip [N, R × T, dim] of CLIP tokens [N, R, T, clip_dim]."""
        return self.project_clip(clip_tokens).flatten(1, 2)

    def fuse(self, f_id: Tensor, context: Tensor) -> Tensor:
        """Eq. 1: f_pre [N, R × id_tokens, dim], with `context` as keys and values."""
        context = self.norm_context(context)
        return f_id + self.cross_attn(self.norm_id(f_id), context, context, need_weights=False)[0]

    def decode(self, f_pre: Tensor) -> Tensor:
        """Eq. 2: identity tokens [N, queries, dim] of features [N, K, dim]."""
        return self.decoder(self.queries.expand(len(f_pre), -1, -1), self.norm_fused(f_pre))


def average_references(embeddings: Tensor, clip_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Turn R references into one by averaging, the alternative to mixing them together.

    Args:
        embeddings: [N, R, id_dim]; their directions are averaged, so that a blurred photo (whose embedding is short)
            counts as much as a sharp one.
        clip_tokens: [N, R, T, clip_dim].

    Returns:
        Embeddings [N, 1, id_dim], as long as the given ones are on average, and CLIP tokens [N, 1, T, clip_dim].
    """
    direction = F.normalize(F.normalize(embeddings, dim=-1).mean(dim=1, keepdim=True), dim=-1)
    length = embeddings.norm(dim=-1, keepdim=True).mean(dim=1, keepdim=True)
    return direction * length, clip_tokens.mean(dim=1, keepdim=True)
