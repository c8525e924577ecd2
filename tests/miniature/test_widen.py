"""A widened VAE computes what the narrow one does."""

import pytest
import torch
from diffusers import AutoencoderKL

from facesnap_ext.miniature.widen import widen_vae


@pytest.mark.parametrize("groups", [4, 8, 16, 32])
def test_the_wide_vae_equals_the_narrow_one(groups):
    torch.manual_seed(0)
    narrow = AutoencoderKL(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=groups,
    )
    for parameter in narrow.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # no norm at rest, no bias at zero
    tensors, config = widen_vae(narrow.state_dict(), narrow.config)
    wide = AutoencoderKL.from_config(config)
    wide.load_state_dict(tensors)
    assert wide.config.norm_num_groups == 32

    picture = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        latents, wide_latents = (vae.encode(picture).latent_dist.mean for vae in (narrow, wide))
        torch.testing.assert_close(wide_latents, latents, atol=1e-4, rtol=1e-4)
        again, wide_again = (vae.decode(latents).sample for vae in (narrow, wide))
        torch.testing.assert_close(wide_again, again, atol=1e-4, rtol=1e-4)
    assert again.std() > 0.1
