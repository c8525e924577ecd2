"""The learning objective of a batch: L_diff + lambda_id L_id (eq. 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_lab.training.arcface import align
from facesnap_lab.training.data import Batch, on_device
from facesnap_lab.training.frozen import Frozen, size_ids, text_y
from facesnap_lab.training.lightning import few_step_latents
from facesnap_lab.training.losses import (
    add_noise,
    diffusion_target,
    id_loss,
    masked_diffusion_loss,
    snr_weights,
    terminal_noise,
)
from facesnap_lab.training.networks import in_text

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True, eq=False)
class Draws:
    """What chance decides for a batch.

    text: N numbers in 0…1; a caption is dropped where its number is below the chance to.
    timesteps: [N] 0…999. noise: epsilon [N,C,h,w]. posterior: where in the VAE's posterior the latents lie [N,C,h,w].
    start: x_T of the lightning branch [N,C,h,w].
    terminal: [N] in 0…1; a picture begins at pure noise where its number is below the chance to.
    """

    text: list[float]
    timesteps: Tensor
    noise: Tensor
    posterior: Tensor
    start: Tensor
    terminal: Tensor

    def to(self, device: torch.device | str) -> Draws:
        return on_device(self, device)


def draw(seed: int, rows: Sequence[int], shape: tuple[int, int, int]) -> Draws:
    """Draw for each row of the run from a generator of its own, so that neither the number of processes nor a resume
    changes it; on the CPU, so that the device does not either.

    Args:
        shape: (C, h, w) of the latents.
    """
    text, draws = [], []
    for row in rows:
        state = np.random.SeedSequence((seed, 2, row)).generate_state(1, np.uint64)
        g = torch.Generator().manual_seed(int(state[0]))
        text.append(float(torch.rand((), generator=g)))
        timestep = torch.randint(TRAIN_TIMESTEPS, (), generator=g)
        draws.append((timestep, *torch.randn(3, *shape, generator=g), torch.rand((), generator=g)))
    return Draws(text, *map(torch.stack, zip(*draws)))


@dataclass(frozen=True, eq=False)
class Losses:
    """total = diffusion + id_weight × id; id is None where there was no lightning branch."""

    total: Tensor
    diffusion: Tensor
    id: Tensor | None


@dataclass(frozen=True)
class Objective:
    """What the losses are made with. size_dim and text_free are the FaceSnap file's; the rest is `TrainConfig`'s."""

    text_free: bool
    size_dim: int
    drop_text: float
    id_weight: float
    lightning_steps: int
    lightning_grad_steps: int
    lightning_scale: float = 1.0
    snr_bounds: tuple[float, float] | None = None
    outside: float = 0.0
    terminal: float = 0.0


def losses(
    batch: Batch, draws: Draws, networks: nn.Module, frozen: Frozen, objective: Objective, id_rows: int
) -> Losses:
    """The losses of a batch; gradients reach the trained networks alone.

    Args:
        networks: `TrainedNetworks`, possibly in a data-parallel wrapper.
        id_rows: pictures of the batch, from the first, that the lightning branch draws; 0: no L_id.
    """
    clip_tokens = encode_crops(frozen, batch.clip_pixels)
    latents = encode_pictures(frozen, batch.pictures, draws.posterior)
    captions = [None if u < objective.drop_text else c for u, c in zip(draws.text, batch.captions)]
    conditioned = Guided(batch, clip_tokens, networks, objective)

    terminal = draws.terminal < objective.terminal
    timesteps = torch.where(terminal, TRAIN_TIMESTEPS - 1, draws.timesteps)
    alpha_bar = frozen.alpha_bar[timesteps]
    noise = torch.where(terminal[:, None, None, None], terminal_noise(latents, draws.noise, alpha_bar), draws.noise)
    z = add_noise(latents, noise, alpha_bar)
    prediction = conditioned.predict(frozen.unet, frozen.text(captions))(z, timesteps)
    target = diffusion_target(latents, noise, alpha_bar, frozen.prediction_type)
    weights = None
    if objective.snr_bounds is not None:
        weights = snr_weights(alpha_bar, *objective.snr_bounds, frozen.prediction_type)
    masks = batch.masks.clamp_min(objective.outside)
    diffusion = masked_diffusion_loss(prediction, target, masks, weights)
    if not id_rows:
        return Losses(diffusion, diffusion, None)

    faces = draw_portraits(batch, draws, conditioned, frozen, objective, id_rows)
    faces = gradient_within(faces, batch.masks[:id_rows])
    drawn = frozen.arcface(align(faces, batch.keypoints[:id_rows], frozen.arcface.size))
    identity = id_loss(batch.embeddings[:id_rows], drawn)
    return Losses(diffusion + objective.id_weight * identity, diffusion, identity)


def draw_portraits(
    batch: Batch, draws: Draws, conditioned: Guided, frozen: Frozen, objective: Objective, rows: int
) -> Tensor:
    """L-T2I(x_T, C_id, C_txt) of eq. 4 with the batch's landmarks: pictures [rows,3,H,W] in 0…1."""
    text = frozen.text(batch.captions[:rows])
    null = frozen.text([None] * rows) if objective.lightning_scale != 1 else None
    with frozen.few_step.active() as unet:
        latents = few_step_latents(
            conditioned.predict(unet, text, rows, null, objective.lightning_scale),
            draws.start[:rows],
            frozen.alpha_bar,
            frozen.prediction_type,
            objective.lightning_steps,
            objective.lightning_grad_steps,
        )
    return decode(frozen, latents)


@dataclass(frozen=True, eq=False)
class Guided:
    """A batch's guidance, for any UNet."""

    batch: Batch
    clip_tokens: Tensor
    networks: nn.Module
    objective: Objective

    def predict(
        self,
        unet: nn.Module,
        text: tuple[Tensor, Tensor],
        rows: int | None = None,
        null: tuple[Tensor, Tensor] | None = None,
        scale: float = 1.0,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The prediction of a UNet with what the networks give, from scaled latents [N,C,h,w] and timesteps [N].

        Args:
            text: context [N,77,C] and pooled text [N,P]. rows: of the batch, from the first; by default all.
            null, scale: text to guide away from, and how far; the networks act on both sides, as at inference.
        """
        batch, use = self.batch, slice(rows)
        sizes = size_ids(batch.pictures.shape[-1], len(text[0]), batch.pictures.device)
        references = (batch.embeddings[use], self.clip_tokens[use], batch.drawings[use])
        texts = [text] if null is None else [text, null]
        ys = [None] if self.objective.text_free else [text_y(p, sizes, self.objective.size_dim) for _, p in texts]

        def ask(
            x: Tensor, timesteps: Tensor, text: tuple[Tensor, Tensor], conditioning: list[Tensor] | Tensor
        ) -> Tensor:
            context, pooled = text
            return unet(
                x.to(unet.dtype),
                timesteps,
                added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes.to(unet.dtype)},
                return_dict=False,
                **unet_inputs(context, conditioning),
            )[0]

        def predict(x: Tensor, timesteps: Tensor) -> Tensor:
            conditioning = [self.networks(*references, x, timesteps, y) for y in ys]  # without text in it, one for both
            prediction = ask(x, timesteps, text, conditioning[0])
            if null is None:
                return prediction
            without = ask(x, timesteps, null, conditioning[-1])
            return without + scale * (prediction - without)

        return predict


def unet_inputs(context: Tensor, conditioning: list[Tensor] | Tensor) -> dict[str, Any]:
    """The UNet's arguments for text context [N,77,C] and what the networks give: FFRNet's residuals, or tokens that go
    behind the text's."""
    if isinstance(conditioning, Tensor):
        return {"encoder_hidden_states": in_text(context, conditioning)}
    *skips, middle = (residual.to(context.dtype) for residual in conditioning)
    return {
        "encoder_hidden_states": context,
        "down_block_additional_residuals": tuple(skips),
        "mid_block_additional_residual": middle,
    }


@torch.no_grad()
def encode_crops(frozen: Frozen, clip_pixels: Tensor) -> Tensor:
    """CLIP tokens [N,T,C] float32 of preprocessed crops [N,3,S,S]."""
    weight = next(frozen.clip.parameters())
    return frozen.clip.model(pixel_values=clip_pixels.to(weight)).last_hidden_state.float()


@torch.no_grad()
def encode_pictures(frozen: Frozen, pictures: Tensor, posterior: Tensor) -> Tensor:
    """Scaled latents [N,C,h,w] float32 of pictures [N,3,H,W] in −1…1; `posterior` is standard normal noise."""
    found = frozen.vae.encode(pictures.to(frozen.vae.dtype)).latent_dist
    return (found.mean.float() + found.std.float() * posterior) * frozen.vae.config.scaling_factor


def gradient_within(pictures: Tensor, masks: Tensor) -> Tensor:
    """The same pictures [N,3,H,W], with gradient inside the masks [N,1,h,w] alone.

    ArcFace's crop shows hair and background too, and what pleases it there is no likeness: without this, L_id gives
    people the background that suits them, whatever the text says.
    """
    masks = F.interpolate(masks.float(), pictures.shape[-2:])
    return masks * pictures + (1 - masks) * pictures.detach()


def decode(frozen: Frozen, latents: Tensor) -> Tensor:
    """Pictures [N,3,H,W] float32 in 0…1 of scaled latents [N,C,h,w]."""
    vae = frozen.vae
    pictures = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
    return (pictures.float() / 2 + 0.5).clamp(0, 1)
