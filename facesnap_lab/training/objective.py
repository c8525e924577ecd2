"""The training objective of a batch: L_diff + lambda_id L_id (eq. 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from facesnap_lab.rivals.method import Rival
from facesnap_lab.training.data import Batch, on_device
from facesnap_lab.training.diffusion_loss import (
    add_noise,
    diffusion_target,
    masked_diffusion_loss,
    snr_weights,
    terminal_noise,
)
from facesnap_lab.training.frozen import Frozen, size_ids, text_y
from facesnap_lab.training.id_loss import portrait_id_loss
from facesnap_lab.training.lightning import few_step_latents
from facesnap_lab.training.networks import append_tokens
from facesnap_lab.training.rival_objective import RivalConditioning, condition_rival

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True, eq=False)
class RandomInputs:
    """All random numbers of a batch.

    text: N numbers in 0…1; a caption is dropped if its number is below `Objective.drop_text`.
    timesteps: [N] in 0…999. noise: epsilon [N,C,h,w]. posterior: normal noise for sampling the VAE's posterior
    [N,C,h,w]. initial: x_T of the lightning branch [N,C,h,w].
    terminal: [N] in 0…1; an image starts at pure noise if its number is below `Objective.terminal`.
    """

    text: list[float]
    timesteps: Tensor
    noise: Tensor
    posterior: Tensor
    initial: Tensor
    terminal: Tensor

    def to(self, device: torch.device | str) -> RandomInputs:
        return on_device(self, device)


def draw_random_inputs(seed: int, rows: Sequence[int], shape: tuple[int, int, int]) -> RandomInputs:
    """Draw the random numbers of some rows of the run.

    Each row has its own generator, so the result does not depend on the number of processes or on resuming. It runs on
    the CPU, so the result does not depend on the device either.

    Args:
        shape: (C, h, w) of the latents.
    """
    text, columns = [], []
    for row in rows:
        state = np.random.SeedSequence((seed, 2, row)).generate_state(1, np.uint64)
        g = torch.Generator().manual_seed(int(state[0]))
        text.append(float(torch.rand((), generator=g)))
        timestep = torch.randint(TRAIN_TIMESTEPS, (), generator=g)
        columns.append((timestep, *torch.randn(3, *shape, generator=g), torch.rand((), generator=g)))
    return RandomInputs(text, *map(torch.stack, zip(*columns)))


@dataclass(frozen=True, eq=False)
class Losses:
    """total = diffusion + id_weight × id, plus a rival's own losses; id is None if the lightning branch did not run."""

    total: Tensor
    diffusion: Tensor
    id: Tensor | None


@dataclass(frozen=True)
class Objective:
    """Settings of the losses. text_free and size_dim come from the FaceSnap file, the others from `TrainConfig`.

    method: the rival that is trained instead of FaceSnap, or None.
    """

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
    method: type[Rival] | None = None


def compute_losses(
    batch: Batch, inputs: RandomInputs, networks: nn.Module, frozen: Frozen, objective: Objective, id_rows: int
) -> Losses:
    """Compute the losses of a batch. Gradients reach only the trained networks.

    Args:
        networks: `TrainedNetworks` or a `Rival`, possibly in a data-parallel wrapper.
        id_rows: number of images, from the start of the batch, in the lightning branch; 0 for no L_id.
    """
    conditioning = condition(batch, networks, frozen, objective)
    latents = encode_images(frozen, batch.images, inputs.posterior)
    captions = [None if u < objective.drop_text else c for u, c in zip(inputs.text, batch.captions)]

    terminal = inputs.terminal < objective.terminal
    timesteps = torch.where(terminal, TRAIN_TIMESTEPS - 1, inputs.timesteps)
    alpha_bar = frozen.alpha_bar[timesteps]
    noise = torch.where(terminal[:, None, None, None], terminal_noise(latents, inputs.noise, alpha_bar), inputs.noise)
    z = add_noise(latents, noise, alpha_bar)
    if isinstance(conditioning, BatchConditioning):
        prediction, own = conditioning.predictor(frozen.unet, frozen.text(captions))(z, timesteps), None
    else:
        prediction, own = conditioning.diffusion_branch(frozen, captions, inputs.text, z, timesteps)
    target = diffusion_target(latents, noise, alpha_bar, frozen.prediction_type)
    weights = None
    if objective.snr_bounds is not None:
        weights = snr_weights(alpha_bar, *objective.snr_bounds, frozen.prediction_type)
    masks = batch.masks.clamp_min(objective.outside)
    diffusion = masked_diffusion_loss(prediction, target, masks, weights)
    total = diffusion if own is None else diffusion + own
    if not id_rows:
        return Losses(total, diffusion, None)

    if isinstance(conditioning, BatchConditioning):
        portraits = generate_portraits(batch, inputs, conditioning, frozen, objective, id_rows)
    else:
        sample = few_step_sampler(inputs, frozen, objective, id_rows)
        latents, own = conditioning.lightning_branch(
            frozen, batch.captions[:id_rows], sample, objective.lightning_scale
        )
        portraits, total = decode_latents(frozen, latents), total if own is None else total + own
    identity = portrait_id_loss(
        frozen.arcface, portraits, batch.masks[:id_rows], batch.keypoints[:id_rows], batch.embeddings[:id_rows]
    )
    return Losses(total + objective.id_weight * identity, diffusion, identity)


def condition(
    batch: Batch, networks: nn.Module, frozen: Frozen, objective: Objective
) -> BatchConditioning | RivalConditioning:
    """Encode a batch's references for the method that is trained."""
    if objective.method is None:
        return BatchConditioning(batch, encode_clip(frozen, batch.clip_pixels), networks, objective)
    return condition_rival(batch, frozen, networks, objective.method, objective.size_dim, objective.drop_text)


def few_step_sampler(
    inputs: RandomInputs, frozen: Frozen, objective: Objective, rows: int
) -> Callable[[Callable[[Tensor, Tensor], Tensor]], Tensor]:
    """Return a function that samples latents [rows,C,h,w] of the lightning branch with a conditioned UNet."""

    def sample(predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return few_step_latents(
            predict,
            inputs.initial[:rows],
            frozen.alpha_bar,
            frozen.prediction_type,
            objective.lightning_steps,
            objective.lightning_grad_steps,
        )

    return sample


def generate_portraits(
    batch: Batch,
    inputs: RandomInputs,
    conditioning: BatchConditioning,
    frozen: Frozen,
    objective: Objective,
    rows: int,
) -> Tensor:
    """L-T2I(x_T, C_id, C_txt) of eq. 4 with the batch's landmarks: images [rows,3,H,W] in 0…1."""
    text = frozen.text(batch.captions[:rows])
    null = frozen.text([None] * rows) if objective.lightning_scale != 1 else None
    sample = few_step_sampler(inputs, frozen, objective, rows)
    with frozen.few_step.active() as unet:
        latents = sample(conditioning.predictor(unet, text, rows, null, objective.lightning_scale))
    return decode_latents(frozen, latents)


@dataclass(frozen=True, eq=False)
class BatchConditioning:
    """A batch's conditioning, applicable to any UNet."""

    batch: Batch
    clip_tokens: Tensor
    networks: nn.Module
    objective: Objective

    def predictor(
        self,
        unet: nn.Module,
        text: tuple[Tensor, Tensor],
        rows: int | None = None,
        null: tuple[Tensor, Tensor] | None = None,
        scale: float = 1.0,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the conditioned UNet as a function from scaled latents [N,C,h,w] and timesteps [N] to its prediction.

        Args:
            text: context [N,77,C] and pooled text [N,P].
            rows: number of images, from the start of the batch; by default all.
            null: null text for classifier-free guidance; None for no guidance. scale: the guidance scale. As at
                inference, the conditioning applies to both predictions.
        """
        batch, use = self.batch, slice(rows)
        sizes = size_ids(batch.images.shape[-1], len(text[0]), batch.images.device)
        references = (batch.embeddings[use], self.clip_tokens[use], batch.landmark_images[use])
        texts = [text] if null is None else [text, null]
        ys = [None] if self.objective.text_free else [text_y(p, sizes, self.objective.size_dim) for _, p in texts]

        def call_unet(
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
            conditioning = [self.networks(*references, x, timesteps, y) for y in ys]  # without text, one serves both
            prediction = call_unet(x, timesteps, text, conditioning[0])
            if null is None:
                return prediction
            unconditional = call_unet(x, timesteps, null, conditioning[-1])
            return unconditional + scale * (prediction - unconditional)

        return predict


def unet_inputs(context: Tensor, conditioning: list[Tensor] | Tensor) -> dict[str, Any]:
    """Return the UNet's arguments for text context [N,77,C] and the output of the trained networks.

    Args:
        conditioning: FFRNet's residuals, or identity tokens to append to the context.
    """
    if isinstance(conditioning, Tensor):
        return {"encoder_hidden_states": append_tokens(context, conditioning)}
    *skips, middle = (residual.to(context.dtype) for residual in conditioning)
    return {
        "encoder_hidden_states": context,
        "down_block_additional_residuals": tuple(skips),
        "mid_block_additional_residual": middle,
    }


@torch.no_grad()
def encode_clip(frozen: Frozen, clip_pixels: Tensor) -> Tensor:
    """Return CLIP tokens [N,T,C] float32 of preprocessed crops [N,3,S,S]."""
    weight = next(frozen.clip.parameters())
    return frozen.clip.model(pixel_values=clip_pixels.to(weight)).last_hidden_state.float()


@torch.no_grad()
def encode_images(frozen: Frozen, images: Tensor, posterior: Tensor) -> Tensor:
    """Return scaled latents [N,C,h,w] float32 of images [N,3,H,W] in −1…1.

    Args:
        posterior: standard normal noise [N,C,h,w], with which the VAE's posterior is sampled.
    """
    distribution = frozen.vae.encode(images.to(frozen.vae.dtype)).latent_dist
    return (distribution.mean.float() + distribution.std.float() * posterior) * frozen.vae.config.scaling_factor


def decode_latents(frozen: Frozen, latents: Tensor) -> Tensor:
    """Decode scaled latents [N,C,h,w] to images [N,3,H,W] float32 in 0…1."""
    vae = frozen.vae
    images = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
    return (images.float() / 2 + 0.5).clamp(0, 1)
