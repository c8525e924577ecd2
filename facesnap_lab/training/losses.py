"""The two losses of FaceSnap's training, eqs. 3 and 4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def diffusion_target(latents: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """What the UNet has to predict.

    Args:
        latents, noise: [N,C,h,w]
        alpha_bar: cumulative product of the schedule's alphas at the rows' timesteps [N], 0…1.
        prediction_type: `epsilon`, or `v_prediction` (Salimans and Ho, 2022, appendix D).

    Raises:
        ValueError: the prediction type is another one.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        signal, spread = _signal_and_spread(alpha_bar, latents)
        return signal * noise - spread * latents
    raise ValueError(f"no target for the prediction type {prediction_type}")


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise latents z_t [N,C,h,w]; arguments as of `diffusion_target`."""
    signal, spread = _signal_and_spread(alpha_bar, latents)
    return signal * latents + spread * noise


def terminal_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The epsilon [N,C,h,w] with which z_T, *taken for* the noise alone, leads back to the latents.

    SDXL's schedule ends with a rest of signal in z_T, enough to tell the colours of skin and hair from (Lin et al.,
    2023), and sampling begins without it. A picture that is trained with this epsilon at the last timestep begins as
    sampling does: from z_T = noise, with nothing but text, tokens and landmarks to go by.
    """
    signal, spread = _signal_and_spread(alpha_bar, latents)
    return (noise - signal * latents) / spread


def _signal_and_spread(alpha_bar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = alpha_bar.float()[:, None, None, None]
    return alpha_bar.sqrt().to(like.dtype), (1 - alpha_bar).sqrt().to(like.dtype)


def snr_weights(alpha_bar: Tensor, low: float, high: float, prediction_type: str) -> Tensor:
    """Weights [N] that make squared errors count by the SNR within bounds in the picture.

    The upper bound (min-SNR, Hang et al., 2023) keeps nearly clean pictures, whose errors nobody sees, from outweighing
    all others. The lower one lets the noisiest count, in which sampling decides whose face it is: an error in epsilon
    there is hardly one in the noise, and a large one in the picture. A lower bound of 1 is about what the loss in
    velocity does.
    """
    snr = alpha_bar.float() / (1 - alpha_bar.float())
    return snr.clamp(low, high) / (snr + 1 if prediction_type == "v_prediction" else snr)


def masked_diffusion_loss(prediction: Tensor, target: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Eq. 3: squared error within the face's mask, a mean over the mask's area and channels, then over the pictures.

    A picture counts alike whether its face is small or large. What lies outside the mask contributes exactly nothing,
    and neither does a picture with an empty mask.

    Args:
        prediction, target: [N,C,h,w]
        mask: M_f [N,1,h,w] in 0…1.
        weights: of the pictures [N]; by default all count alike.

    Returns:
        A number ≥ 0, float32.
    """
    mask = mask.float()
    # outside the mask an infinite error must not become 0 × inf
    error = torch.where(mask > 0, prediction.float() - target.float(), 0) * mask
    area = mask.square().sum(dim=(1, 2, 3)) * prediction.shape[1]
    errors = error.square().sum(dim=(1, 2, 3)) / area.clamp_min(torch.finfo(torch.float32).tiny)
    return (errors if weights is None else weights * errors).mean()


def id_loss(embeddings: Tensor, drawn: Tensor) -> Tensor:
    """Eq. 4: 1 − cosine of the references' ArcFace embeddings and those of the drawn faces, mean over the pictures.

    Args:
        embeddings, drawn: [N,E], of any length.

    Returns:
        A number in 0…2, float32.
    """
    return (1 - F.cosine_similarity(embeddings.float(), drawn.float(), dim=-1)).mean()
