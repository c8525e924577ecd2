"""Whitening the VAE's latents does not change its reconstructions, and PSNR is measured correctly."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the miniature's VAE is implemented by diffusers")

from facesnap_lab.miniature import vae as vae_module
from facesnap_lab.miniature.perception import to_tensor
from facesnap_lab.miniature.render import render
from facesnap_lab.miniature.world import person, scene


@pytest.fixture(scope="module")
def pictures():
    people = [person("train", index) for index in range(12)]
    return to_tensor(np.stack([r.picture for r in render(people, [scene(who, 0) for who in people], 32)]))


def test_whitened_latents_decode_to_the_same_image(pictures):
    torch.manual_seed(0)
    vae = vae_module.new_vae().eval()
    with torch.no_grad():
        before = vae.decode(vae.encode(pictures).latent_dist.mean).sample
        vae_module.whiten(vae, pictures)
        latents = vae.encode(pictures).latent_dist
        after = vae.decode(latents.mean).sample
    torch.testing.assert_close(after, before, atol=2e-4, rtol=1e-3)
    flat = latents.mean.permute(0, 2, 3, 1).reshape(-1, vae_module.LATENT_CHANNELS)
    torch.testing.assert_close(flat.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.cov(flat.T), torch.eye(4), atol=1e-2, rtol=0)
    assert latents.std.max() < 0.01  # standard deviation of sampling


def test_psnr_is_relative_to_the_image_range(pictures):
    class Off:
        """A VAE whose reconstructions are a tenth of the range too bright or too dark."""

        def encode(self, x):
            return type("Coded", (), {"latent_dist": type("Latents", (), {"mean": x})})

        def decode(self, z):
            return type("Decoded", (), {"sample": torch.where(z > 0, z - 0.2, z + 0.2)})

    assert vae_module.psnr(Off(), pictures) == pytest.approx(20, abs=0.01)
