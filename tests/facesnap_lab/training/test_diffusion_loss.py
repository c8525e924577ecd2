"""The masked diffusion loss (eq. 3), its targets and weights, compared with closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from facesnap_lab.training.diffusion_loss import (
    add_noise,
    diffusion_target,
    masked_diffusion_loss,
    snr_weights,
    terminal_noise,
)


def tensors(seed: int, rows: int = 3, channels: int = 4, side: int = 6):
    g = torch.Generator().manual_seed(seed)
    prediction, target = torch.randn(2, rows, channels, side, side, generator=g, dtype=torch.float64).float()
    mask = torch.rand(rows, 1, side, side, generator=g)
    return prediction, target, mask * (torch.rand(mask.shape, generator=g) < 0.5)


@given(seed=st.integers(0, 10_000), outlier=st.sampled_from([1e4, float("inf"), float("nan")]))
@settings(max_examples=30, deadline=None)
def test_values_outside_the_mask_do_not_contribute(seed, outlier):
    prediction, target, mask = tensors(seed)
    outside = (mask == 0).expand_as(prediction)
    changed = torch.where(outside, outlier, prediction).requires_grad_()
    loss = masked_diffusion_loss(changed, target, mask)
    assert loss == masked_diffusion_loss(prediction, target, mask)
    loss.backward()
    assert (changed.grad[outside] == 0).all()
    inside = ~outside & (prediction != target)
    assert (changed.grad[inside] != 0).all()


def test_loss_is_the_mean_over_the_mask():
    prediction, target = torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :2, :2], mask[1, :, 0, 0] = 1, 1
    prediction[0] += 3.0  # a large face with an error of 3
    prediction[1] += 1.0  # a small one with an error of 1
    assert masked_diffusion_loss(prediction, target, mask) == pytest.approx((9 + 1) / 2)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_loss_equals_eq_3_divided_by_the_masks_area(seed):
    prediction, target, mask = tensors(seed)
    m = mask.numpy().astype("float64")
    difference = target.numpy() * m - prediction.numpy() * m  # || eps M - eps_theta M ||^2
    expected = [(difference[i] ** 2).sum() / max(4 * (m[i] ** 2).sum(), 1e-30) for i in range(3)]
    assert float(masked_diffusion_loss(prediction, target, mask)) == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_image_without_a_face_contributes_nothing():
    prediction, target, _ = tensors(0)
    prediction.requires_grad_()
    loss = masked_diffusion_loss(prediction, target, torch.zeros(3, 1, 6, 6))
    loss.backward()
    assert loss == 0
    assert (prediction.grad == 0).all()


def test_noise_and_targets_equal_diffusers():
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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@settings(deadline=None)
@given(alpha_bar=st.floats(0.001, 0.999), low=st.floats(0, 2), width=st.floats(0.1, 20), seed=st.integers(0, 99))
def test_snr_weights_give_the_images_error_times_the_clamped_snr(prediction_type, alpha_bar, low, width, seed):
    """For both prediction types, the weighted error is the error of the predicted image times the clamped SNR."""
    g = torch.Generator().manual_seed(seed)
    clean, noise, error = torch.randn(3, 1, 4, 4, 4, generator=g, dtype=torch.float64)
    a = torch.tensor([alpha_bar], dtype=torch.float64)
    target = diffusion_target(clean, noise, a, prediction_type).double()
    predicted = target + error
    noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
    if prediction_type == "epsilon":
        image = (noisy - (1 - a).sqrt() * predicted) / a.sqrt()
    else:
        image = a.sqrt() * noisy - (1 - a).sqrt() * predicted
    expected = min(max(alpha_bar / (1 - alpha_bar), low), low + width) * (image - clean).square().mean()
    weighted = masked_diffusion_loss(
        predicted, target, torch.ones(1, 1, 4, 4), snr_weights(a, low, low + width, prediction_type)
    )
    torch.testing.assert_close(weighted.double(), expected, rtol=2e-3, atol=1e-5)


@given(alpha_bar=st.floats(0.001, 0.9), seed=st.integers(0, 99))
@settings(deadline=None)
def test_terminal_noise_recovers_the_image_from_pure_noise(alpha_bar, seed):
    g = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, 3, 4, 4, 4, generator=g, dtype=torch.float64)
    a = torch.full((3,), alpha_bar, dtype=torch.float64)
    epsilon = terminal_noise(clean, noise, a)
    torch.testing.assert_close(add_noise(clean, epsilon, a), noise, atol=1e-5, rtol=0)
    image = (noise - (1 - a).sqrt()[:, None, None, None] * epsilon) / a.sqrt()[:, None, None, None]
    torch.testing.assert_close(image, clean, atol=1e-4, rtol=0)
