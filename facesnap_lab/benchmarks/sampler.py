"""Sampling with each benchmarked method and a UNet of SDXL's shape.

The methods are plain SDXL, FaceSnap, a ControlNet on both rows of classifier-free guidance, and an InstantID-style
network. All networks have random weights, which run at the same speed as trained ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from facesnap_ext.conditioning import Conditioning
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.networks.ffrnet import FFRNet, FFRNetConfig
from facesnap_ext.regions import PaintedRegion
from facesnap_ext.residuals import Residuals
from facesnap_ext.settings.strength import Strength

TEXT_TOKENS, IDENTITY_TOKENS = 77, 16
LIGHT_BLOCKS = 2  # as `facesnap compress --blocks 2`
INTERVAL = 2  # FFRNet runs at every second step
SDXL_WIDTHS = (320, 640, 1280)
SHAPE: dict[str, Any] = {
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
}
UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")

PLAIN = "plain SDXL"
CONTROLNET = "ControlNet on both rows"
INSTANTID = "InstantID-style"
INSTANTID_COND_ONLY = "InstantID-style, conditional rows only"  # `Strength.cond_only`
FACESNAP_VARIANTS = {  # whether FFRNet is light, and FFRNet's interval
    "FaceSnap": (False, 1),
    "FaceSnap, light": (True, 1),
    f"FaceSnap, every {INTERVAL} steps": (False, INTERVAL),
    f"FaceSnap, light, every {INTERVAL} steps": (True, INTERVAL),
}
COMPILED = ", compiled"  # appended to the names of the first two variants; only on a GPU


def shape_of(widths: tuple[int, ...]) -> dict[str, Any]:
    """Return diffusers' configuration of a ControlNet or UNet of SDXL's layout with these widths."""
    return {**SHAPE, "block_out_channels": widths, "attention_head_dim": tuple(width // 64 for width in widths)}


def create_unet(widths: tuple[int, ...]) -> nn.Module:
    """Create a UNet of SDXL's layout with random weights."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(up_block_types=UP, **shape_of(widths))


@dataclass(frozen=True)
class Networks:
    """SDXL's UNet and the networks that condition it, all with the same dtype and on the same device."""

    unet: nn.Module
    controlnet: nn.Module
    ffrnet: FFRNet
    light: FFRNet

    @classmethod
    def random(cls, widths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Networks:
        from diffusers import ControlNetModel

        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # creating them in single precision would take twice the memory
        try:
            with device:
                unet, controlnet = create_unet(widths), ControlNetModel(**shape_of(widths))
                config = FFRNetConfig.from_shapes({key: tuple(t.shape) for key, t in controlnet.state_dict().items()})
                networks = cls(unet, controlnet, FFRNet(config), FFRNet(config.with_blocks(LIGHT_BLOCKS)))
        finally:
            torch.set_default_dtype(default_dtype)
        for network in (networks.unet, networks.controlnet, networks.ffrnet, networks.light):
            network.eval().requires_grad_(False)
        return networks


class BenchSampler:
    """Samples images of one size with one UNet and classifier-free guidance, step by step."""

    def __init__(self, networks: Networks, pixels: int, pictures: int = 1):
        self.networks, self.pixels, self.pictures = networks, pixels, pictures
        weight = networks.unet.conv_in.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.latents = self.random(pictures, 4, pixels // 8, pixels // 8)
        self.text, self.tokens = self.random(2 * pictures, TEXT_TOKENS, 2048), self.random(1, IDENTITY_TOKENS, 2048)
        self.added = {"text_embeds": self.random(2 * pictures, 1280), "time_ids": self.random(2 * pictures, 6)}
        self.landmark_image = self.random(1, 3, pixels, pixels)

    def random(self, *size: int) -> Tensor:
        return torch.rand(*size, device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def draw(self, steps: int, residuals: Callable[[Tensor, Tensor], Sequence[Tensor]] | None = None) -> None:
        for step in range(steps):
            x = torch.cat([self.latents, self.latents]) + step
            timesteps = torch.full((len(x),), 999.0 - step, device=self.device)
            extra = {}
            if residuals is not None:
                *skips, middle = residuals(x, timesteps)
                extra = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
            self.networks.unet(x, timesteps, self.text, added_cond_kwargs=self.added, **extra)

    def plain(self, steps: int) -> None:
        self.draw(steps)

    def facesnap(
        self, steps: int, light: bool = False, interval: int = 1, people: int = 1, compile: bool = False
    ) -> None:
        """Sample with FaceSnap and several people side by side, each with its own tokens, landmarks and region."""
        network = self.networks.light if light else self.networks.ffrnet
        one = Conditioning(network, self.tokens, self.landmarks, Strength(ffrnet_interval=interval), compile=compile)
        regions = [PaintedRegion(column[None]) for column in np.eye(people, dtype=np.float32)]
        conditionings = [replace(one, region=region, tokens=one.tokens + i) for i, region in enumerate(regions)]
        self.draw(steps, self._residuals([one] if people == 1 else conditionings))

    def controlnet(self, steps: int) -> None:
        self.draw(steps, self._controlnet)

    def instantid(self, steps: int, cond_only: bool = False) -> None:
        unet, text = self.networks.unet, self.text
        before, adapted = (
            unet.attn_processors,
            dict(self.adapter),
        )  # a copy, because setting processors empties the dict
        unet.set_attn_processor(adapted)
        self.text = (text, [self.tokens.expand(len(text), -1, -1)])
        one = Conditioning(self.networks.ffrnet, self.tokens, self.landmarks, Strength(cond_only=True), text_free=False)
        try:
            self.draw(steps, self._residuals([one]) if cond_only else self._controlnet)
        finally:
            unet.set_attn_processor(before)
            self.text = text

    @cached_property
    def landmarks(self) -> Landmarks:
        return front_face(self.pixels)

    @cached_property
    def adapter(self) -> dict[str, nn.Module]:
        return adapter_processors(self.networks.unet)

    def _residuals(self, people: Sequence[Conditioning]) -> Callable[[Tensor, Tensor], Sequence[Tensor]]:
        """FaceSnap's residuals for both rows of each picture, as the hosts request them."""
        blended = Residuals(people)
        y = self.random(2 * self.pictures, self.networks.ffrnet.config.adm_dim)
        is_cond, images = [True] * self.pictures + [False] * self.pictures, [*range(self.pictures)] * 2

        def residuals(x: Tensor, timesteps: Tensor) -> Sequence[Tensor]:
            blended.begin_evaluation()
            return blended.rows(x, timesteps, is_cond, y, images=images, announced=True) or []

        return residuals

    def _controlnet(self, x: Tensor, timesteps: Tensor) -> list[Tensor]:
        tokens, landmark_images = self.tokens.expand(len(x), -1, -1), self.landmark_image.expand(len(x), -1, -1, -1)
        down, middle = self.networks.controlnet(
            x, timesteps, tokens, landmark_images, added_cond_kwargs=self.added, return_dict=False
        )
        return [*down, middle]

    def methods(self, steps: int) -> dict[str, Callable[[], None]]:
        """Return all methods by name, as functions without arguments."""
        own = {
            name: lambda light=light, interval=interval: self.facesnap(steps, light, interval)
            for name, (light, interval) in FACESNAP_VARIANTS.items()
        }
        if self.device.type == "cuda":
            for name in ("FaceSnap", "FaceSnap, light"):
                light, interval = FACESNAP_VARIANTS[name]
                own[name + COMPILED] = lambda light=light, interval=interval: self.facesnap(
                    steps, light, interval, compile=True
                )
        return {
            PLAIN: lambda: self.plain(steps),
            **own,
            CONTROLNET: lambda: self.controlnet(steps),
            INSTANTID: lambda: self.instantid(steps),
            INSTANTID_COND_ONLY: lambda: self.instantid(steps, cond_only=True),
        }


def front_face(pixels: int) -> Landmarks:
    """Return the landmarks of a face in the centre of a square image, half as high as the image."""
    from facesnap_lab.miniature.render import face_shapes

    shape = face_shapes(1)[0] * (1, -1)  # the y axis is flipped to point down
    shape = (shape - shape.mean(0)) / np.ptp(shape[:, 1])
    return Landmarks((pixels * (0.5 + 0.5 * shape)).astype(np.float32), pixels, pixels)


def adapter_processors(unet: nn.Module) -> dict[str, nn.Module]:
    """Return IP-Adapter's attention for diffusers' UNet: each cross-attention also attends to 16 identity tokens."""
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    networks = {}
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            networks[name] = AttnProcessor2_0()
            continue
        query = unet.get_submodule(name.removesuffix(".processor")).to_q.weight
        with query.device:
            adapted = IPAdapterAttnProcessor2_0(len(query), 2048, num_tokens=(IDENTITY_TOKENS,))
        networks[name] = adapted.to(query.dtype).requires_grad_(False)
    return networks
