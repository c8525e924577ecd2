"""A real LDM UNet, from stable-diffusion-sdkit. It runs its blocks in the same order as A1111's and Forge's UNets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.support import tiny


def ldm_unet(seed: int = 1) -> nn.Module:
    """Return a UNet with the widths of `tiny.ffrnet` and SDXL's vector conditioning."""
    module = pytest.importorskip(
        "ldm.modules.diffusionmodules.openaimodel", reason="stable-diffusion-sdkit is not installed"
    )
    unet = module.UNetModel(
        image_size=32,
        in_channels=4,
        model_channels=tiny.WIDTHS[0],
        out_channels=4,
        num_res_blocks=2,
        attention_resolutions=[2, 4],
        channel_mult=[width // tiny.WIDTHS[0] for width in tiny.WIDTHS],
        num_classes=1,
        num_head_channels=16,
        use_spatial_transformer=True,
        use_linear_in_transformer=True,
        context_dim=tiny.CONTEXT,
        use_checkpoint=False,
    )
    embedding = unet.time_embed[2].out_features
    unet.label_emb = nn.Sequential(
        nn.Sequential(nn.Linear(tiny.ADM, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
    )
    return tiny.randomise(unet, seed)


def reference_walk(
    unet: nn.Module, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor, residuals: list[Tensor] | None
) -> Tensor:
    """Run the UNet's forward pass, written out, with residuals added to the skips and the middle block.

    Residuals are resized to the features they are added to, and the decoder's features to the skips, as in A1111.
    """
    from ldm.modules.diffusionmodules.util import timestep_embedding

    emb = unet.time_embed(timestep_embedding(timesteps, unet.model_channels)) + unet.label_emb(y)
    *skips, middle = residuals or [torch.zeros(1)] * (len(unet.input_blocks) + 1)
    h, hs = x, []
    for block, residual in zip(unet.input_blocks, skips):
        h = block(h, emb, context)
        hs.append(h + resized(residual, h, "bilinear"))
    h = unet.middle_block(h, emb, context)
    h = h + resized(middle, h, "bilinear")
    for block in unet.output_blocks:
        skip = hs.pop()
        h = block(torch.cat([resized(h, skip, "nearest"), skip], dim=1), emb, context)
    return unet.out(h)


def resized(features: Tensor, like: Tensor, mode: str) -> Tensor:
    """Return features resized to the size of others."""
    if features.dim() < 4 or features.shape[2:] == like.shape[2:]:
        return features
    return nn.functional.interpolate(features, like.shape[2:], mode=mode)


def inputs(rows: int, size: tuple[int, int] = (16, 16), seed: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents, timesteps, context and y, different for each row."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, *size, generator=g)
    timesteps = torch.randint(0, 1000, (rows,), generator=g).float()
    return x, timesteps, torch.randn(rows, 77, tiny.CONTEXT, generator=g), torch.randn(rows, tiny.ADM, generator=g)


def both_sides(size: tuple[int, int] = (16, 16)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the inputs of an image's conditional and unconditional row, which share latent and timestep."""
    x, timesteps, context, y = inputs(2, size)
    return x[[0, 0]], timesteps[[0, 0]], context, y
