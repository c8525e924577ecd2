"""The second edition's SDXL: the UNet and both text encoders, trained on the latents of `vae4`.

The latents have 32×32 cells, as WebUIs expect of 128 pixels at factor 4. The UNet's first level is narrow and has no
attention, so that most of its cost is at 16×16. Captions describe the scene only: a picture's person is left open.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from facesnap_ext.files import atomic_write
from facesnap_ext.identity.detection import detect_faces
from facesnap_lab.miniature.base_model import NULL_TEXT, BaseModel, encode_all, new_scheduler, new_unet, save_pipeline
from facesnap_lab.miniature.second.autoencoder import Autoencoder
from facesnap_lab.miniature.second.dataset import SHOTS, World, caption
from facesnap_lab.miniature.second.loop import CPU, Compute, fit, load_state, prepared
from facesnap_lab.miniature.second.render import SIDE
from facesnap_lab.miniature.shipped import Sampler
from facesnap_lab.miniature.words import padded_ids
from facesnap_lab.training.diffusion_loss import add_noise, snr_weights, terminal_noise

WIDTHS = (64, 64, 128)
DEPTHS = (1, 1, 2)
STEPS, BATCH, RATE = 8_600, 16, 1e-3
SNR = (1.0, 5.0)  # bounds of the loss weights
TERMINAL = 0.1  # share of images that start at pure noise, as sampling does
EMA = 0.999
PICTURES = 200  # generated for the gate
FACES = 0.99  # share of them in which the detector has to find a face


def new_base() -> BaseModel:
    unet = new_unet(SIDE // 4, WIDTHS, DEPTHS)
    preserve_input(unet)
    return BaseModel(unet)


@torch.no_grad()
def preserve_input(unet: Any, share: float = 0.8) -> None:
    """Initialise a UNet so that a share of its output is exactly its input.

    At the first steps of sampling, epsilon is nearly the input, and an error in its mean colours the image. With two
    channels in each group, the last GroupNorm removes most of the mean, except that of a pair with opposite signs. As
    SiLU(a) − SiLU(−a) = a, such a pair carries each input channel from `conv_in` through the last skip connection.
    """
    patches = torch.linalg.pinv(unet.conv_in.weight.flatten(1)).unflatten(0, (unet.conv_in.in_channels, -1))
    centres = patches[:, patches.shape[1] // 2]  # [C,width]: reads the input from the features of conv_in
    offsets = centres @ unet.conv_in.bias
    resnet = unet.up_blocks[-1].resnets[-1]
    unet.conv_out.weight *= 1 - share
    unet.conv_out.bias *= 1 - share
    for channel, (centre, offset) in enumerate(zip(centres, offsets)):
        for sign, place in ((1, 2 * channel), (-1, 2 * channel + 1)):
            resnet.conv_shortcut.weight[place] = 0
            resnet.conv_shortcut.weight[place, -len(centre) :, 0, 0] = sign * centre
            resnet.conv_shortcut.bias[place] = -sign * offset
            resnet.conv2.weight[place] = 0
            resnet.conv2.bias[place] = 0
            unet.conv_out.weight[:, place] = 0
            unet.conv_out.weight[channel, place, 1, 1] = sign * share


def captions_of(split: str, rows: range) -> list[str]:
    """Return the captions of some of a split's images."""
    return [caption(split, row // SHOTS, row % SHOTS) for row in rows]


def cached_latents(vae: Autoencoder, pictures: np.ndarray, file: Path) -> Tensor:
    """Return the latents [N,C,H,W] of all images in half precision. They are encoded at the first call, and again if
    there are more images, or if the VAE has been trained further."""
    weights = hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in vae.state_dict().values()))
    if file.exists():
        found = torch.load(file, weights_only=True)
        if len(found["latents"]) == len(pictures) and found["vae"] == weights.hexdigest():
            return found["latents"]
    latents = encode_all(vae, pictures).half()
    with atomic_write(file) as part:
        torch.save({"latents": latents, "vae": weights.hexdigest()}, part)
    return latents


def train(
    world: World, vae: Autoencoder, out: Path, *, minutes: float, compute: Compute = CPU
) -> tuple[BaseModel, int]:
    """Train or resume the base on the images of the training split, and write it as `out/pipeline`.

    Returns:
        The moving average of the weights, on the CPU, and the number of steps.
    """
    device, batch = torch.device(compute.device), BATCH * compute.batch
    latents = cached_latents(vae.to(device), world.pictures, out / "latents.pt")
    ids = torch.tensor(padded_ids(captions_of("train", range(len(latents)))), dtype=torch.int32)
    torch.manual_seed(0)
    model = new_base()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    model.to(device)
    average.to(device)
    alphas_cumprod = new_scheduler().alphas_cumprod
    weights = snr_weights(alphas_cumprod, *SNR, "epsilon")

    def draw(step: int) -> list[Tensor]:
        random = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (batch,), generator=random)
        timesteps = torch.randint(len(alphas_cumprod), (batch,), generator=random)
        x = latents[rows].float()
        noise = torch.randn(x.shape, generator=random)
        null = torch.rand(batch, generator=random) < NULL_TEXT
        side = torch.randint(SIDE, 2 * SIDE + 1, (batch, 1), generator=random).float()
        sizes = torch.cat([side, side, 0 * side, 0 * side, side, side], 1)
        terminal = torch.rand(batch, generator=random) < TERMINAL
        timesteps = torch.where(terminal, len(alphas_cumprod) - 1, timesteps)
        a = alphas_cumprod[timesteps]
        noise = torch.where(terminal[:, None, None, None], terminal_noise(x, noise, a), noise)
        return [noise, weights[timesteps], add_noise(x, noise, a), timesteps, ids[rows].long(), null, sizes]

    batch_of = prepared(draw, compute.threads)

    def loss_of(step: int) -> Tensor:
        noise, weight, *inputs = (part.to(device) for part in batch_of(step))
        with torch.autocast(device.type, torch.bfloat16):
            predicted = model(*inputs).float()
        return ((predicted - noise).pow(2).mean((1, 2, 3)) * weight).mean()

    plan: dict[str, Any] = {"steps": STEPS, "minutes": minutes, "rate": RATE, "decay": 0.01}
    done = fit(model.train(), loss_of, out, **plan, average=average, ema=EMA, compute=compute)
    load_state(out, model, average=average)
    save_pipeline(average.cpu(), vae.cpu(), out / "pipeline")
    return average, done


@torch.no_grad()
def mean_slopes(unet: Any) -> list[float]:
    """Return the slope of the mean of the predicted epsilon on the mean of pure noise, for each latent channel.

    If it is below 1, the image takes the colour of its noise.
    """
    config, count = unet.config, 16
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, config.in_channels, config.sample_size, config.sample_size, generator=random).to(unet.device)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * count).float().to(unet.device)
    added = {"text_embeds": x.new_zeros(count, pooled), "time_ids": sizes}
    last = new_scheduler().config.num_train_timesteps - 1
    predicted = unet(x, last, x.new_zeros(count, 77, config.cross_attention_dim), added_cond_kwargs=added).sample
    given, found = (values.mean((2, 3)) - values.mean((0, 2, 3)) for values in (x, predicted))
    return [round(slope, 3) for slope in ((given * found).sum(0) / given.square().sum(0)).tolist()]


def measure(sampler: Sampler, detector: Any, sheet: Path) -> dict[str, Any]:
    """Generate pictures without FaceSnap, and count those in which the detector finds a face.

    Args:
        detector: as in `faces.load_pack`; None if it has not been trained yet, and then the gate is not passed.
        sheet: file for the first 40 pictures, which are judged by eye.
    """
    prompts = captions_of("test", range(0, PICTURES * SHOTS, SHOTS))
    pictures: list[np.ndarray] = []
    for first in range(0, PICTURES, 20):
        images = sampler.pipe(
            prompts[first : first + 20],
            width=SIDE,
            height=SIDE,
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.scale,
            generator=torch.Generator().manual_seed(first),
            output_type="np",
        ).images
        pictures.extend((255 * images).round().astype(np.uint8))
    rows = [np.concatenate(pictures[i : i + 8], 1) for i in range(0, 40, 8)]
    Image.fromarray(np.concatenate(rows)).save(sheet)
    slopes = {"mean slopes": mean_slopes(sampler.pipe.unet)}
    if detector is None:
        return slopes | {"passed": False}
    found = [bool(detect_faces(detector, one[:, :, ::-1].copy())) for one in pictures]
    return slopes | {"faces": float(np.mean(found)), "passed": bool(np.mean(found) >= FACES)}
