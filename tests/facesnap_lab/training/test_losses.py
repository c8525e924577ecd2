"""Eq. 3 and eq. 4 against closed forms, and what may not contribute."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from facesnap_lab.training.losses import (
    add_noise,
    diffusion_target,
    id_loss,
    masked_diffusion_loss,
    snr_weights,
    terminal_noise,
)


def tensors(seed: int, rows: int = 3, channels: int = 4, side: int = 6):
    g = torch.Generator().manual_seed(seed)
    prediction, target = torch.randn(2, rows, channels, side, side, generator=g, dtype=torch.float64).float()
    mask = torch.rand(rows, 1, side, side, generator=g)
    return prediction, target, mask * (torch.rand(mask.shape, generator=g) < 0.5)


@given(seed=st.integers(0, 10_000), wild=st.sampled_from([1e4, float("inf"), float("nan")]))
@settings(max_examples=30, deadline=None)
def test_outside_the_mask_nothing_contributes(seed, wild):
    prediction, target, mask = tensors(seed)
    outside = (mask == 0).expand_as(prediction)
    changed = torch.where(outside, wild, prediction).requires_grad_()
    loss = masked_diffusion_loss(changed, target, mask)
    assert loss == masked_diffusion_loss(prediction, target, mask)
    loss.backward()
    assert (changed.grad[outside] == 0).all()
    inside = ~outside & (prediction != target)
    assert (changed.grad[inside] != 0).all()


def test_it_is_the_mean_over_the_mask():
    prediction, target = torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :2, :2], mask[1, :, 0, 0] = 1, 1
    prediction[0] += 3.0  # a large face, off by 3
    prediction[1] += 1.0  # a small one, off by 1
    assert masked_diffusion_loss(prediction, target, mask) == pytest.approx((9 + 1) / 2)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_it_equals_eq_3_over_the_masks_area(seed):
    prediction, target, mask = tensors(seed)
    m = mask.numpy().astype("float64")
    difference = target.numpy() * m - prediction.numpy() * m  # || eps M - eps_theta M ||^2
    wanted = [(difference[i] ** 2).sum() / max(4 * (m[i] ** 2).sum(), 1e-30) for i in range(3)]
    assert float(masked_diffusion_loss(prediction, target, mask)) == pytest.approx(sum(wanted) / 3, rel=1e-5)


def test_a_picture_without_a_face_counts_nothing_and_breaks_nothing():
    prediction, target, _ = tensors(0)
    prediction.requires_grad_()
    loss = masked_diffusion_loss(prediction, target, torch.zeros(3, 1, 6, 6))
    loss.backward()
    assert loss == 0
    assert (prediction.grad == 0).all()


def test_noise_and_targets_are_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    latents, noise, _ = tensors(1)
    timesteps = torch.tensor([0, 400, 999])
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    torch.testing.assert_close(add_noise(latents, noise, alpha_bar), scheduler.add_noise(latents, noise, timesteps))
    assert diffusion_target(latents, noise, alpha_bar, "epsilon") is noise
    torch.testing.assert_close(
        diffusion_target(latents, noise, alpha_bar, "v_prediction"), scheduler.get_velocity(latents, noise, timesteps)
    )
    with pytest.raises(ValueError, match="sample"):
        diffusion_target(latents, noise, alpha_bar, "sample")


def test_id_loss_is_one_minus_the_cosine():
    a = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    b = torch.tensor([[5.0, 0.0], [0.0, 7.0], [-1.0, 0.0]])
    assert float(id_loss(a, b)) == pytest.approx((0 + 1 + 2) / 3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@settings(deadline=None)
@given(share=st.floats(0.001, 0.999), low=st.floats(0, 2), above=st.floats(0.1, 20), seed=st.integers(0, 99))
def test_snr_weights_are_of_the_error_of_the_picture(prediction_type, share, low, above, seed):
    """Whatever is predicted, the weighted error is that of the picture that follows, times the SNR within bounds."""
    g = torch.Generator().manual_seed(seed)
    clean, noise, wrong = torch.randn(3, 1, 4, 4, 4, generator=g, dtype=torch.float64)
    a = torch.tensor([share], dtype=torch.float64)
    target = diffusion_target(clean, noise, a, prediction_type).double()
    predicted = target + wrong
    noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
    if prediction_type == "epsilon":
        picture = (noisy - (1 - a).sqrt() * predicted) / a.sqrt()
    else:
        picture = a.sqrt() * noisy - (1 - a).sqrt() * predicted
    in_picture = min(max(share / (1 - share), low), low + above) * (picture - clean).square().mean()
    weighted = masked_diffusion_loss(
        predicted, target, torch.ones(1, 1, 4, 4), snr_weights(a, low, low + above, prediction_type)
    )
    torch.testing.assert_close(weighted.double(), in_picture, rtol=2e-3, atol=1e-5)


@given(share=st.floats(0.001, 0.9), seed=st.integers(0, 99))
@settings(deadline=None)
def test_terminal_noise_leads_from_the_noise_alone_back_to_the_picture(share, seed):
    g = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, 3, 4, 4, 4, generator=g, dtype=torch.float64)
    a = torch.full((3,), share, dtype=torch.float64)
    epsilon = terminal_noise(clean, noise, a)
    torch.testing.assert_close(add_noise(clean, epsilon, a), noise, atol=1e-5, rtol=0)
    picture = (noise - (1 - a).sqrt()[:, None, None, None] * epsilon) / a.sqrt()[:, None, None, None]
    torch.testing.assert_close(picture, clean, atol=1e-4, rtol=0)
