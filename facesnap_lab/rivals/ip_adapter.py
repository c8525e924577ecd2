"""IP-Adapter: attention of the UNet to image tokens, beside its attention to the text.

Sources: Ye et al., "IP-Adapter" (2023), eq. 5 and section 3.2, and github.com/tencent-ailab/IP-Adapter: `MLPProjModel`
of `ip_adapter_faceid.py` for the face variant, `resampler.py` for the plus variant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.identity.clip import ImageEncoder
from facesnap_ext.networks.adapter import Adapter, AdapterConfig
from facesnap_ext.networks.resampler import ResamplerConfig, ResamplerMixer
from facesnap_ext.weights.facesnap_file import FaceSnapWeights
from facesnap_lab.rivals.attention import Injection, adapter_for, keys_values
from facesnap_lab.rivals.method import Features, References, Rival, Text, UNetCall

FACE_TOKENS = 4
PLUS_TOKENS = 16


def direction(embeddings: Tensor) -> Tensor:
    """Normalise vectors [..., E] to unit variance per entry, as FaceSnap's Mixer does. Zeros stay zeros."""
    return F.normalize(embeddings.float(), dim=-1) * embeddings.shape[-1] ** 0.5


@torch.no_grad()
def clip_tokens(clip: ImageEncoder, pixels: Tensor) -> Tensor:
    """Return CLIP tokens [N,T,C] float32 of preprocessed crops [N,3,S,S]."""
    weight = next(clip.parameters())
    return clip.model(pixel_values=pixels.to(weight)).last_hidden_state.float()


class FaceProjection(nn.Module):
    """The projection of IP-Adapter FaceID: an embedding [N, id_dim] to tokens [N, tokens, dim].

    Args:
        hidden: width of the hidden layer; by default 2 × `id_dim`.
    """

    def __init__(self, id_dim: int, tokens: int, dim: int, hidden: int = 0):
        super().__init__()
        self.tokens = tokens
        hidden = hidden or 2 * id_dim
        self.proj = nn.Sequential(nn.Linear(id_dim, hidden), nn.GELU(), nn.Linear(hidden, tokens * dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.norm(self.proj(embeddings).unflatten(-1, (self.tokens, -1)))


class Resampler(ResamplerMixer):
    """IP-Adapter's perceiver for CLIP tokens. InstantID's, in `facesnap_ext`, takes embeddings instead.

    Args:
        config: `id_dim` is the width of the CLIP tokens. `queries` may be 0 if the latents are passed to `forward`.
    """

    def __init__(self, config: ResamplerConfig):
        super().__init__(config)
        if not config.queries:
            self.register_parameter("latents", None)

    def forward(self, tokens: Tensor, references: int = 1, latents: Tensor | None = None) -> Tensor:
        """Return tokens [N, queries, dim].

        Args:
            tokens: CLIP tokens [N, K, id_dim] of all references. references: their number; see `PerceiverAttention`.
            latents: what the queries start from [N, queries, width]; by default, they are learned.
        """
        latents = self.latents.expand(len(tokens), -1, -1) if latents is None else latents
        return self.resample(self.proj_in(tokens), latents, references)


def resampler_config(clip_dim: int, dim: int, queries: int, layers: int = 4) -> ResamplerConfig:
    """Return the sizes of IP-Adapter Plus' perceiver for SDXL (width 1280, heads of 64 channels), no wider than `dim`,
    the width of its tokens."""
    width = min(1280, dim)
    heads = max(1, width // 64)
    return ResamplerConfig(clip_dim, 0, dim, width, queries, layers, 4 * width, heads, 64)


@dataclass(frozen=True)
class IPAdapterConfig:
    """Sizes. inputs: width of an embedding or of a CLIP token. adapter: of the UNet's cross-attentions."""

    inputs: int
    tokens: int
    adapter: AdapterConfig


class IPAdapterFace(Rival):
    """The face variant: a projection of the ArcFace embedding."""

    name = "ip-adapter-face"

    def __init__(self, config: IPAdapterConfig, adapter: Adapter | None = None):
        super().__init__()
        self.config = config
        self.image_proj: nn.Module = FaceProjection(config.inputs, config.tokens, config.adapter.context_dim)
        self.ip_adapter = adapter or Adapter(config.adapter)

    @classmethod
    def create(cls, start: FaceSnapWeights, unet: Any) -> Rival:
        adapter = adapter_for(unet)
        return cls(IPAdapterConfig(start.info.mixer.id_dim, FACE_TOKENS, adapter.config), adapter)

    @staticmethod
    def features(clip: ImageEncoder, references: References) -> Features:
        return (direction(references.embeddings),)

    def tokens(self, features: Features) -> Tensor:
        """Return image tokens [N, T, C]. The directions of several embeddings are averaged."""
        return self.image_proj(features[0].mean(1))

    def forward(self, features: Features, text: Text, call: UNetCall | None) -> Injection:
        return Injection(text.context, keys_values(self.ip_adapter, self.tokens(features)))


class IPAdapterPlus(IPAdapterFace):
    """The plus variant: CLIP tokens of the face crop through a perceiver."""

    name = "ip-adapter-plus"

    def __init__(self, config: IPAdapterConfig, adapter: Adapter | None = None):
        super().__init__(config, adapter)
        sizes = resampler_config(config.inputs, config.adapter.context_dim, config.tokens)
        self.image_proj = Resampler(sizes)

    @classmethod
    def create(cls, start: FaceSnapWeights, unet: Any) -> Rival:
        adapter = adapter_for(unet)
        return cls(IPAdapterConfig(start.info.mixer.clip_dim, PLUS_TOKENS, adapter.config), adapter)

    @staticmethod
    def features(clip: ImageEncoder, references: References) -> Features:
        return (clip_tokens(clip, references.clip_pixels),)

    def tokens(self, features: Features) -> Tensor:
        references = features[0].shape[1]
        return self.image_proj(features[0].flatten(1, 2), references)
