"""The Mixer initialised from InstantID, compared with InstantID's Resampler written out, and its CLIP layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from facesnap_ext.networks.resampler import CLIP_PREFIXES, ResamplerConfig, ResamplerMixer
from tests.support import tiny
from tests.support.mixers import RESAMPLER, instantid_resampler, references


@pytest.fixture(scope="module")
def start():
    """The state at the start of training: random Resampler, and CLIP layers as initialised."""
    torch.manual_seed(0)
    mixer = ResamplerMixer(RESAMPLER)
    added = {key: tensor.clone() for key, tensor in mixer.state_dict().items() if key.startswith(CLIP_PREFIXES)}
    tiny.randomise(mixer, std=0.3).load_state_dict(added, strict=False)
    return mixer


def test_starts_equal_to_instantids_resampler(start):
    embeddings, clip_tokens = references(3)
    expected = instantid_resampler(start.state_dict(), embeddings, head_dim=16)
    assert expected.shape == (3, 4, 48)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    torch.testing.assert_close(start(embeddings, clip_tokens), expected, atol=1e-5, rtol=1e-5)


def test_norm_of_the_embedding_matters(start):
    """InstantID was trained on embeddings that were not normalised."""
    embeddings, clip_tokens = references()
    assert (start(embeddings, clip_tokens) - start(F.normalize(embeddings, dim=-1), clip_tokens)).abs().max() > 0.1


def test_clip_layers_receive_gradients_from_the_first_step(start):
    embeddings, clip_tokens = references()
    projections = [attention.to_out.weight for attention in start.clip_layers]
    for weight in projections:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(start(embeddings, clip_tokens).pow(2)[..., :7].sum(), projections)
    for weight in projections:
        weight.requires_grad_(False)
    assert len(gradients) == RESAMPLER.layers
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients)


def test_full_size_has_the_tensors_of_instantids_resampler():
    """The numbers of tensors and parameters match `image_proj` in the published `ip-adapter.bin`."""
    with torch.device("meta"):
        mixer = ResamplerMixer(ResamplerConfig())
        tokens = mixer(torch.empty(3, 2, 512), torch.empty(3, 2, 257, 1280))
    assert tokens.shape == (3, 16, 2048)
    own = {key: tensor for key, tensor in mixer.state_dict().items() if not key.startswith(CLIP_PREFIXES)}
    shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    assert len(shapes) == 51
    assert sum(tensor.numel() for tensor in own.values()) == 81_978_624
    layer = {
        "0.norm1.weight": (1280,),
        "0.norm1.bias": (1280,),
        "0.norm2.weight": (1280,),
        "0.norm2.bias": (1280,),
        "0.to_q.weight": (1280, 1280),
        "0.to_kv.weight": (2560, 1280),
        "0.to_out.weight": (1280, 1280),
        "1.0.weight": (1280,),
        "1.0.bias": (1280,),
        "1.1.weight": (5120, 1280),
        "1.3.weight": (1280, 5120),
    }
    assert shapes == {
        "latents": (1, 16, 1280),
        "proj_in.weight": (1280, 512),
        "proj_in.bias": (1280,),
        "proj_out.weight": (2048, 1280),
        "proj_out.bias": (2048,),
        "norm_out.weight": (2048,),
        "norm_out.bias": (2048,),
        **{f"layers.{index}.{key}": shape for index in range(4) for key, shape in layer.items()},
    }
    assert ResamplerConfig.from_shapes(shapes) == ResamplerConfig()
