"""The ablated Mixers of the paper's Table 2. Importing this module registers them in `facesnap_file.MIXERS`.

Each one is the Facial Attribute Mixer without a component and is otherwise identical to it. The paper does not describe
them further. The remaining parameters have the Mixer's names and initial values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from facesnap_ext.networks.mixer import FacialAttributeMixer, MixerConfig
from facesnap_ext.weights.facesnap_file import MIXERS


@dataclass(frozen=True)
class IdMixerConfig(MixerConfig):
    """Sizes of an `IdMixer`. `clip_dim` is the dimension of the CLIP tokens, which the mixer ignores."""


@dataclass(frozen=True)
class ClipMixerConfig(MixerConfig):
    """Sizes of a `ClipMixer`. `id_dim` is the dimension of the embeddings, which the mixer ignores."""


@dataclass(frozen=True)
class ConcatMixerConfig(MixerConfig):
    """Sizes of a `ConcatMixer`, for which queries, layers, heads and feedforward have no effect."""


class IdMixer(FacialAttributeMixer):
    """Only face ID embeddings: eqs. 1 and 2 with f'_id as keys and values."""

    def __init__(self, config: IdMixerConfig):
        super().__init__(config)
        del self.project_clip

    def forward(self, embeddings: Tensor, clip_tokens: Tensor) -> Tensor:
        """Identity tokens [N, queries, dim]. Takes the same arguments as `FacialAttributeMixer.forward`."""
        f_id = self.id_features(embeddings)
        return self.decode(self.fuse(f_id, f_id))


class ClipMixer(FacialAttributeMixer):
    """Only CLIP image features: eq. 2 on f'_clip. Eq. 1 is omitted, as it has no queries without embeddings."""

    def __init__(self, config: ClipMixerConfig):
        super().__init__(config)
        del self.project_id, self.norm_id, self.norm_context, self.cross_attn

    def forward(self, embeddings: Tensor, clip_tokens: Tensor) -> Tensor:
        """Identity tokens [N, queries, dim]. Takes the same arguments as `FacialAttributeMixer.forward`."""
        return self.decode(self.clip_features(clip_tokens))


class ConcatMixer(FacialAttributeMixer):
    """Both kinds of features, projected and concatenated: the keys and values of eq. 1 are the output."""

    def __init__(self, config: ConcatMixerConfig):
        super().__init__(config)
        del self.norm_id, self.cross_attn, self.norm_fused, self.queries, self.decoder

    def forward(self, embeddings: Tensor, clip_tokens: Tensor) -> Tensor:
        """Tokens [N, id_tokens + T, dim], averaged over the references.

        Takes the same arguments as `FacialAttributeMixer.forward`.
        """
        references = embeddings.shape[1]
        features = (self.id_features(embeddings), self.clip_features(clip_tokens))
        means = [f.unflatten(1, (references, -1)).mean(dim=1) for f in features]
        return self.norm_context(torch.cat(means, dim=1))


@dataclass(frozen=True)
class PooledConcatMixerConfig(ConcatMixerConfig):
    """Sizes of a `PooledConcatMixer`, for which layers, heads and feedforward have no effect."""

    clip_tokens: int = 257  # CLIP tokens per reference


class PooledConcatMixer(ConcatMixer):
    """`ConcatMixer` with as many tokens as the Facial Attribute Mixer.

    Each output token is a learned weighted sum of all projected tokens, with the same weights for every person. So
    FFRNet receives no more tokens than from the Mixer, and there is still no attention.
    """

    def __init__(self, config: PooledConcatMixerConfig):
        super().__init__(config)
        self.pool = nn.Linear(config.id_tokens + config.clip_tokens, config.queries)
        self.norm_pooled = nn.LayerNorm(config.dim)

    def forward(self, embeddings: Tensor, clip_tokens: Tensor) -> Tensor:
        """Identity tokens [N, queries, dim]. Takes the same arguments as `FacialAttributeMixer.forward`."""
        tokens = super().forward(embeddings, clip_tokens)
        return self.norm_pooled(self.pool(tokens.transpose(1, 2)).transpose(1, 2))


# files with these mixers can only be written and loaded after this registration
MIXERS["id only"] = (IdMixerConfig, IdMixer)
MIXERS["clip only"] = (ClipMixerConfig, ClipMixer)
MIXERS["concatenation"] = (ConcatMixerConfig, ConcatMixer)
MIXERS["pooled concatenation"] = (PooledConcatMixerConfig, PooledConcatMixer)
