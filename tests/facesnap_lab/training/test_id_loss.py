"""The identity loss (eq. 4), and the cut of its gradient at the face mask."""

from __future__ import annotations

import pytest
import torch

from facesnap_lab.training.id_loss import id_loss, limit_gradient_to_mask


def test_id_loss_is_one_minus_the_cosine():
    a = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    b = torch.tensor([[5.0, 0.0], [0.0, 7.0], [-1.0, 0.0]])
    assert float(id_loss(a, b)) == pytest.approx((0 + 1 + 2) / 3)


def test_gradient_is_cut_off_outside_the_mask_and_pixels_are_unchanged():
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., :2] = 1
    limited = limit_gradient_to_mask(images, masks)
    assert torch.equal(limited, images)
    limited.sum().backward()
    assert torch.equal(images.grad, torch.ones(1, 3, 8, 8) * (torch.arange(8) < 4))
