"""The second edition's VAE as a component of a diffusers pipeline, saved and loaded with it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from facesnap_lab.miniature.second.vae import Vae, VaeConfig, load_vae

LOG_VARIANCE = -30.0  # the encoder is deterministic


class Autoencoder(ModelMixin, ConfigMixin):
    """`Vae` with the interface of diffusers' AutoencoderKL. Its latents are white, so their scale is 1.

    Args:
        latent_channels, factor, widths, blocks: see `VaeConfig`.
        block_out_channels: not used; pipelines derive the factor from their number.
    """

    _keep_in_fp32_modules: ClassVar = ["vae"]  # it casts to bfloat16 itself, where that does no harm

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        factor: int = 4,
        widths: tuple[int, int] = (64, 128),
        blocks: tuple[int, int] = (1, 2),
        block_out_channels: tuple[int, ...] = (64, 128, 128),
        scaling_factor: float = 1.0,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        self.vae = Vae(VaeConfig(latent_channels, factor, tuple(widths), tuple(blocks)))

    def encode(self, pictures: Tensor) -> AutoencoderKLOutput:
        """Encode images [N,3,H,W] in -1…1."""
        mean = self.vae.encode(pictures)
        moments = torch.cat([mean, torch.full_like(mean, LOG_VARIANCE)], 1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def decode(
        self, latents: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents [N,C,H/f,W/f]. `generator` is not used."""
        pictures = self.vae.decode(latents)
        return DecoderOutput(sample=pictures) if return_dict else (pictures,)


def from_file(path: Path) -> Autoencoder:
    """Wrap a VAE that `vae.save_vae` wrote, frozen."""
    vae = load_vae(path)
    config = vae.config
    levels = config.factor.bit_length()
    autoencoder = Autoencoder(
        config.channels, config.factor, config.widths, config.blocks, block_out_channels=(config.widths[-1],) * levels
    )
    autoencoder.vae.load_state_dict(vae.state_dict())
    return autoencoder.eval().requires_grad_(False)
