"""The masked diffusion loss (eq. 3), with its targets, noise and weights."""

from __future__ import annotations

import torch
from torch import Tensor


def diffusion_target(latents: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """Return the target of the UNet's prediction.

    Args:
        latents, noise: [N,C,h,w]
        alpha_bar: cumulative product of the schedule's alphas at the rows' timesteps [N], 0…1.
        prediction_type: `epsilon` or `v_prediction` (Salimans and Ho, 2022, appendix D).

    Raises:
        ValueError: the prediction type is unknown.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        alpha, sigma = _alpha_and_sigma(alpha_bar, latents)
        return alpha * noise - sigma * latents
    raise ValueError(f"unknown prediction type {prediction_type}")


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the noisy latents z_t [N,C,h,w]. Takes the same arguments as `diffusion_target`."""
    alpha, sigma = _alpha_and_sigma(alpha_bar, latents)
    return alpha * latents + sigma * noise


def terminal_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the epsilon [N,C,h,w] for which z_T is exactly `noise`, without any signal from the latents.

    SDXL's schedule leaves some signal in z_T, enough to reveal the colours of skin and hair (Lin et al., 2023), but
    sampling starts without it. An image trained with this epsilon at the last timestep starts as sampling does: from
    z_T = noise, with only text, tokens and landmarks as information.
    """
    alpha, sigma = _alpha_and_sigma(alpha_bar, latents)
    return (noise - alpha * latents) / sigma


def _alpha_and_sigma(alpha_bar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = alpha_bar.float()[:, None, None, None]
    return alpha_bar.sqrt().to(like.dtype), (1 - alpha_bar).sqrt().to(like.dtype)


def snr_weights(alpha_bar: Tensor, low: float, high: float, prediction_type: str) -> Tensor:
    """Return weights [N] that turn the squared error into the error of the predicted image times its clamped SNR.

    The upper bound (min-SNR, Hang et al., 2023) keeps nearly clean images, whose errors are invisible, from dominating
    the loss. The lower bound gives weight to the noisiest steps, in which sampling decides the identity: there, a large
    error in the image is only a tiny error in epsilon. A lower bound of 1 roughly corresponds to the loss in velocity.
    """
    snr = alpha_bar.float() / (1 - alpha_bar.float())
    return snr.clamp(low, high) / (snr + 1 if prediction_type == "v_prediction" else snr)


def masked_diffusion_loss(prediction: Tensor, target: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Eq. 3: squared error inside the face mask, averaged over the mask's area and channels, then over the images.

    Large and small faces count equally. Values outside the mask contribute exactly nothing, and so do images with an
    empty mask.

    Args:
        prediction, target: [N,C,h,w]
        mask: M_f [N,1,h,w] in 0…1.
        weights: one per image [N]; by default all images count equally.

    Returns:
        A scalar ≥ 0, float32.
    """
    mask = mask.float()
    # torch.where, because an infinite error outside the mask would become inf × 0 = nan
    error = torch.where(mask > 0, prediction.float() - target.float(), 0) * mask
    area = mask.square().sum(dim=(1, 2, 3)) * prediction.shape[1]
    errors = error.square().sum(dim=(1, 2, 3)) / area.clamp_min(torch.finfo(torch.float32).tiny)
    return (errors if weights is None else weights * errors).mean()
