"""What both Mixers promise: how features, references and people count."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from facesnap_ext.mixer import FacialAttributeMixer, MixerConfig
from facesnap_ext.resampler import ResamplerConfig, ResamplerMixer

MIXERS = {
    "facial attributes": FacialAttributeMixer(
        MixerConfig(id_dim=12, clip_dim=10, dim=32, id_tokens=5, queries=4, layers=2, feedforward=48, heads=4)
    ),
    "resampler": ResamplerMixer(
        ResamplerConfig(
            id_dim=12, clip_dim=10, dim=48, width=40, queries=4, layers=3, feedforward=56, heads=3, head_dim=16
        )
    ),
}


@pytest.fixture(scope="module", params=MIXERS)
def mixer(request):
    return tiny.randomise(MIXERS[request.param], std=0.3)


def references(people=2, count=1, seed=0):
    """Embeddings of the length that ArcFace gives: the Resampler looks at it, the paper's Mixer does not."""
    g = torch.Generator().manual_seed(seed)
    return 20 * torch.randn(people, count, 12, generator=g), torch.randn(people, count, 7, 10, generator=g)


def test_both_features_of_a_reference_count(mixer):
    embeddings, clip_tokens = references(1)
    tokens = mixer(embeddings, clip_tokens)
    other_embeddings, other_clip = references(1, seed=1)
    assert (mixer(other_embeddings, clip_tokens) - tokens).abs().max() > 1e-2
    assert (mixer(embeddings, other_clip) - tokens).abs().max() > 1e-2


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 4), seed=st.integers(0, 99), order=st.randoms())
def test_the_order_of_references_does_not_matter_and_a_copy_changes_nothing(mixer, count, seed, order):
    embeddings, clip_tokens = references(1, count, seed)
    tokens = mixer(embeddings, clip_tokens)
    shuffled = list(range(count))
    order.shuffle(shuffled)
    torch.testing.assert_close(mixer(embeddings[:, shuffled], clip_tokens[:, shuffled]), tokens, atol=1e-4, rtol=1e-4)
    twice = list(range(count)) * 2
    torch.testing.assert_close(mixer(embeddings[:, twice], clip_tokens[:, twice]), tokens, atol=1e-4, rtol=1e-4)


def test_every_reference_counts(mixer):
    embeddings, clip_tokens = references(1, 2)
    both = mixer(embeddings, clip_tokens)
    for one in range(2):
        alone = mixer(embeddings[:, [one]], clip_tokens[:, [one]])
        assert (both - alone).abs().max() > 1e-2


def test_people_do_not_mix(mixer):
    embeddings, clip_tokens = references(3, 2)
    together = mixer(embeddings, clip_tokens)
    for person in range(3):
        alone = mixer(embeddings[[person]], clip_tokens[[person]])
        torch.testing.assert_close(together[[person]], alone, atol=1e-5, rtol=1e-5)
