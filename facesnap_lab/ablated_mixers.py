"""The Mixers of the paper's Table 2 that leave something out, for the ablation alone.

Each is the Facial Attribute Mixer without one thing, so that a row of the table differs from the Mixer's by what its
name says; the paper does not describe them further. What they keep has the Mixer's names and starts with its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from facesnap_ext.networks.mixer import FacialAttributeMixer, MixerConfig
from facesnap_ext.weights.facesnap_file import MIXERS


@dataclass(frozen=True)
class IdMixerConfig(MixerConfig):
    """Sizes of an `IdMixer`; `clip_dim` says which tokens it is given, and leaves unread."""


@dataclass(frozen=True)
class ClipMixerConfig(MixerConfig):
    """Sizes of a `ClipMixer`; `id_dim` says which embeddings it is given, and leaves unread."""


@dataclass(frozen=True)
class ConcatMixerConfig(MixerConfig):
    """Sizes of a `ConcatMixer`, which has no queries, layers, heads or feedforward."""


class IdMixer(FacialAttributeMixer):
    """Face ID embeddings alone: eqs. 1 and 2 with f'_id for keys and values."""

    def __init__(self, config: IdMixerConfig):
        super().__init__(config)
        del self.project_clip

    def forward(self, embeddings: Tensor, clip_tokens: Tensor) -> Tensor:
        """Identity tokens [N, queries, dim]; arguments as of `FacialAttributeMixer.forward`."""
        f_id = self.id_features(embeddings)
        return self.decode(self.fuse(f_id, f_id))


class ClipMixer(FacialAttributeMixer):
    """CLIP image features alone: eq. 2 on f'_clip; eq. 1 has no query without embeddings."""

    def __init__(self, config: ClipMixerConfig):
        super().__init__(config)
        del self.project_id, self.norm_id, self.norm_context, self.cross_attn

    def forward(self, embeddings: Tensor, clip_tokens: Tensor) -> Tensor:
        """Identity tokens [N, queries, dim]; arguments as of `FacialAttributeMixer.forward`."""
        return self.decode(self.clip_features(clip_tokens))


class ConcatMixer(FacialAttributeMixer):
    """Both, concatenated with one projection each: the keys and values of eq. 1, handed on as they are."""

    def __init__(self, config: ConcatMixerConfig):
        super().__init__(config)
        del self.norm_id, self.cross_attn, self.norm_fused, self.queries, self.decoder

    def forward(self, embeddings: Tensor, clip_tokens: Tensor) -> Tensor:
        """Tokens [N, id_tokens + T, dim], means over the references; arguments as of `FacialAttributeMixer.forward`."""
        references = embeddings.shape[1]
        features = (self.id_features(embeddings), self.clip_features(clip_tokens))
        means = [f.unflatten(1, (references, -1)).mean(dim=1) for f in features]
        return self.norm_context(torch.cat(means, dim=1))


# from here on files of these kinds can be written and loaded
MIXERS["id only"] = (IdMixerConfig, IdMixer)
MIXERS["clip only"] = (ClipMixerConfig, ClipMixer)
MIXERS["concatenation"] = (ConcatMixerConfig, ConcatMixer)
