"""InstantID: IdentityNet on five points, conditioned on identity tokens, and attention of the UNet to the same tokens.

Sources: Wang et al., "InstantID" (2024), section 3.2, and github.com/instantX-research/InstantID
(`pipeline_stable_diffusion_xl_instantid.py`). All parts are those of `facesnap_ext`: FFRNet with text and five points
is IdentityNet. The result is a FaceSnap file, which the WebUIs load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facesnap_ext.conditioning import Conditioning
from facesnap_ext.hosts.diffusers import conditioned
from facesnap_ext.identity.clip import ImageEncoder
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.networks.adapter import Adapter, AdapterConfig
from facesnap_ext.networks.ffrnet import FFRNet, FFRNetConfig
from facesnap_ext.networks.resampler import ResamplerConfig, ResamplerMixer
from facesnap_ext.settings.strength import Strength
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.facesnap_file import POINTS5, FaceSnapInfo, FaceSnapWeights
from facesnap_lab.rivals.attention import Injection, adapter_for, keys_values
from facesnap_lab.rivals.ip_adapter import resampler_config
from facesnap_lab.rivals.method import Features, References, Rival, Text, UNetCall, without_person

TOKENS = 16


@dataclass(frozen=True)
class InstantIDConfig:
    """Sizes of the Resampler, of IdentityNet and of the adapter."""

    mixer: ResamplerConfig
    ffrnet: FFRNetConfig
    adapter: AdapterConfig


class InstantID(Rival):
    """The three networks of InstantID: the Resampler, IdentityNet and the adapter."""

    name = "instantid"
    hint = POINTS5

    def __init__(self, config: InstantIDConfig, ffrnet: FFRNet | None = None, adapter: Adapter | None = None):
        super().__init__()
        self.config = config
        self.mixer = ResamplerMixer(config.mixer)
        self.ffrnet = ffrnet or FFRNet(config.ffrnet)
        self.adapter = adapter or Adapter(config.adapter)

    @classmethod
    def create(cls, start: FaceSnapWeights, unet: Any) -> Rival:
        adapter = adapter_for(unet)
        mixer = resampler_config(start.info.mixer.id_dim, adapter.config.context_dim, TOKENS)
        return cls(InstantIDConfig(mixer, start.info.ffrnet, adapter.config), start.ffrnet, adapter)

    @staticmethod
    def features(clip: ImageEncoder, references: References) -> Features:
        return (references.embeddings.float(),)  # not normalised, as in InstantID

    def forward(self, features: Features, text: Text, call: UNetCall | None) -> Injection:
        assert call is not None, "IdentityNet is run in every UNet call"
        tokens = self.mixer(features[0])
        landmarks = self.ffrnet.embed_landmarks(call.landmark_images)
        residuals = self.ffrnet(call.x, call.timesteps, self.ffrnet.embed_tokens(tokens), landmarks, call.y)
        return Injection(text.context, keys_values(self.adapter, tokens), residuals=tuple(residuals))

    @contextmanager
    def applied(
        self, pipe: Any, features: Features, text: Text, null: Text, landmarks: Landmarks | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        with torch.no_grad():
            tokens, uncond_tokens = self.mixer(features[0]), self.mixer(without_person(features)[0])
        conditioning = Conditioning(
            self.ffrnet,
            tokens,
            landmarks,
            text_free=False,
            hint=POINTS5,
            uncond_tokens=uncond_tokens,
            name="InstantID",
            strength=Strength(adapter_weight=1.0),  # as in training
            adapter=lambda: self.adapter(tokens, uncond_tokens),
        )
        with conditioned(pipe, conditioning):
            yield text.context.to(pipe.unet.dtype), null.context.to(pipe.unet.dtype)

    def save(self, path: Path, info: FaceSnapInfo) -> None:
        sizes = {"mixer": self.config.mixer, "ffrnet": self.config.ffrnet, "adapter": self.config.adapter}
        info = replace(info, **sizes, text_free=False, hint=POINTS5, null_identity=True)
        facesnap_file.save(path, info, self.mixer, self.ffrnet, self.adapter)

    @classmethod
    def load(cls, path: Path) -> Rival:
        weights = facesnap_file.load(path)
        adapter = facesnap_file.load_adapter(path)
        rival = cls(InstantIDConfig(weights.info.mixer, weights.info.ffrnet, adapter.config), weights.ffrnet, adapter)
        rival.mixer = weights.mixer
        return rival.eval().requires_grad_(False)
