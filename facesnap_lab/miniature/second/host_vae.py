"""`vae4` in the layout that WebUIs load: a diffusers AutoencoderKL that learns the same latents and pictures.

Its encoder is trained to return `vae4`'s latents, and its decoder to draw the pictures from them. The UNet and FFRNet,
which are trained on `vae4`'s latents, therefore work with it unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from facesnap_lab.miniature.perception import to_tensor
from facesnap_lab.miniature.second.loop import CPU, Compute, fit, load_state, prepared
from facesnap_lab.miniature.second.vae import LATENT_NOISE, Vae, noisy_batch, reconstruction_loss

WIDTHS, GROUPS = (32, 64, 64), 8
STEPS, BATCH, RATE, SEED = 4000, 8, 1e-3, 8
PSNR, LATENTS = 30.0, 0.95  # the gate: dB of `vae4`'s latents decoded, and R² of the latents


def new_autoencoder(side: int) -> Any:
    from diffusers import AutoencoderKL

    levels = len(WIDTHS)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=GROUPS,
        sample_size=side,
        scaling_factor=1.0,
        mid_block_add_attention=True,
        force_upcast=False,
    )


def train(teacher: Vae, pictures: np.ndarray, out: Path, *, minutes: float, compute: Compute = CPU) -> tuple[Any, int]:
    """Train or resume the autoencoder, write it as `out/model`, and return it with the number of its steps.

    Both networks are on the CPU afterwards.
    """
    torch.manual_seed(SEED)
    device = torch.device(compute.device)
    student = new_autoencoder(pictures.shape[1]).to(device).train()
    teacher.to(device)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        return noisy_batch(pictures, BATCH * compute.batch, teacher.config, [SEED, step])

    batch_of = prepared(draw, compute.threads)

    def loss_of(step: int) -> Tensor:
        x, noise = (part.to(device) for part in batch_of(step))
        with torch.no_grad():
            latents = teacher.encode(x)
        with torch.autocast(device.type, torch.bfloat16):
            moments = student.encode(x).latent_dist
            again = student.decode(latents + LATENT_NOISE * noise).sample
        encoded = F.mse_loss(moments.mean.float(), latents) + 1e-3 * (moments.logvar.float() + 10).pow(2).mean()
        return reconstruction_loss(again.float(), x) + 0.1 * encoded

    steps = fit(student, loss_of, out, steps=STEPS, minutes=minutes, rate=RATE, decay=0.01, compute=compute)
    load_state(out, student)
    teacher.cpu()
    student.cpu().eval().requires_grad_(False).save_pretrained(out / "model")
    return student, steps


@torch.no_grad()
def measure(student: Any, teacher: Vae, pictures: np.ndarray) -> dict[str, Any]:
    """Return the figures on pictures of unseen people, and whether they pass."""
    errors, own, taught = [], [], []
    for part in to_tensor(pictures).split(32):
        latents = teacher.encode(part)
        errors.append(F.mse_loss(student.decode(latents).sample.clamp(-1, 1), part))
        own.append(student.encode(part).latent_dist.mean)
        taught.append(latents)
    psnr = -10 * torch.log10(torch.stack(errors).mean() / 4).item()
    target = torch.cat(taught)
    r2 = 1 - (F.mse_loss(torch.cat(own), target) / target.var()).item()
    return {"psnr": round(psnr, 3), "latents R2": round(r2, 4), "passed": psnr >= PSNR and r2 >= LATENTS}
