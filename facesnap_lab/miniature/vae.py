"""Train the miniature's VAE: SDXL's architecture, four channels, four pixels per latent cell.

    python -m facesnap_lab.miniature.vae --data DIR --out DIR

A weak VAE destroys identity, so it must reach 30 dB on unseen people.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from facesnap_lab.miniature import dataset
from facesnap_lab.miniature.perception import to_tensor, write_figures

WIDTHS = (32, 32, 64)
LATENT_CHANNELS = 4
# With SDXL's 32 groups, each of 32 channels would be normalised separately, which removes the image's colour. The
# export for WebUIs widens the network to 32 groups without changing its function.
NORM_GROUPS = 8


def new_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=NORM_GROUPS,
        sample_size=dataset.SIDE,
        scaling_factor=1.0,
    )


def train_vae(data: Path, out: Path, minutes: float, batch: int = 6, rate: float = 1.5e-3, seed: int = 0) -> None:
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    world = dataset.load(data / "train")
    test = to_tensor(dataset.load(data / "test").pictures[::9][:256])
    vae = new_vae()
    if (out / "config.json").exists():
        vae = type(vae).from_pretrained(out)
    optimizer = torch.optim.AdamW(vae.parameters(), rate, betas=(0.9, 0.98), weight_decay=1e-4)
    began, step = time.thread_time(), 0
    while (done := (time.thread_time() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))
        pictures = to_tensor(world.pictures[np.sort(random.integers(0, len(world.pictures), batch))])
        if random.random() < 0.5:
            pictures = pictures.flip(-1)
        latents = vae.encode(pictures).latent_dist
        again = vae.decode(latents.mean + 0.02 * torch.randn_like(latents.mean)).sample
        loss = F.mse_loss(again, pictures) + 0.02 * F.l1_loss(again, pictures)
        loss = loss + 1e-4 * latents.mean.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 250 == 0:
            print(f"{step} steps, {done:.0%}, loss {loss.item():.5f}, test {psnr(vae, test[:64]):.2f} dB", flush=True)
            vae.save_pretrained(out)
    whiten(vae, to_tensor(world.pictures[::37][:800]))
    vae.save_pretrained(out)
    write_figures(out, "vae", {"steps": step, "psnr": psnr(vae, test)})


@torch.no_grad()
def psnr(vae: Any, pictures: Tensor) -> float:
    """Return the PSNR over all pixels in dB, for the range 0…1."""
    errors = [
        F.mse_loss(vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1), part).item()
        for part in pictures.split(64)
    ]
    return -10 * math.log10(np.mean(errors) / 4)


@torch.no_grad()
def whiten(vae: Any, pictures: Tensor) -> None:
    """Whiten the latents (mean 0, identity covariance) exactly, by changing the two 1×1 convolutions around them."""
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(64)])
    flat = latents.permute(0, 2, 3, 1).reshape(-1, LATENT_CHANNELS).double()
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    forward, backward = vectors / values.sqrt(), vectors * values.sqrt()  # z = (x - mean) forward
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight.data.double()[:, :, 0, 0], quant.bias.data.double()
    weight[:LATENT_CHANNELS] = forward.T @ weight[:LATENT_CHANNELS]
    bias[:LATENT_CHANNELS] = forward.T @ (bias[:LATENT_CHANNELS] - mean)
    weight[LATENT_CHANNELS:], bias[LATENT_CHANNELS:] = 0, -10  # log variance of sampling: negligible
    quant.weight.data[:, :, 0, 0], quant.bias.data[:] = weight.float(), bias.float()
    weight = post.weight.data.double()[:, :, 0, 0]
    post.bias.data += (weight @ mean).float()
    post.weight.data[:, :, 0, 0] = (weight @ backward).float()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the miniature's VAE.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    arguments = parser.parse_args()
    train_vae(arguments.data, arguments.out, arguments.minutes)
