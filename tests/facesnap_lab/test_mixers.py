"""Properties of all Mixers, including the ablated ones: how their output depends on features and references."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import facesnap_lab.ablated_mixers  # noqa: F401 (adds the ablated Mixers to MIXERS)
from facesnap_ext.weights.facesnap_file import MIXERS, build_mixer
from tests.support import tiny
from tests.support.mixers import CLIP_TOKENS, RESAMPLER, SIZES, references

READS = {"id only": (True, False), "clip only": (False, True)}  # (embeddings, CLIP tokens); all other Mixers read both


@pytest.fixture(scope="module", params=MIXERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def mixer(kind):
    pooled = {"clip_tokens": CLIP_TOKENS} if kind == "pooled concatenation" else {}
    config = RESAMPLER if kind == "resampler" else MIXERS[kind][0](**SIZES, heads=4, **pooled)
    return tiny.randomise(build_mixer(config), std=0.3)


def test_mixer_depends_only_on_the_features_in_its_name(kind, mixer):
    embeddings, clip_tokens = references(1)
    tokens = mixer(embeddings, clip_tokens)
    other_embeddings, other_clip = references(1, seed=1)
    changed = (mixer(other_embeddings, clip_tokens) - tokens, mixer(embeddings, other_clip) - tokens)
    for reads, change in zip(READS.get(kind, (True, True)), changed, strict=True):
        assert change.abs().max() > 1e-2 if reads else not change.any()


def test_every_parameter_of_a_mixer_has_a_gradient(kind, mixer):
    """Otherwise, data-parallel processes would wait forever for missing gradients."""
    network = copy.deepcopy(mixer).requires_grad_(True)
    network(*references(2, 2)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 4), seed=st.integers(0, 99), order=st.randoms())
def test_order_and_repetition_of_references_do_not_matter(mixer, count, seed, order):
    embeddings, clip_tokens = references(1, count, seed)
    tokens = mixer(embeddings, clip_tokens)
    shuffled = list(range(count))
    order.shuffle(shuffled)
    torch.testing.assert_close(mixer(embeddings[:, shuffled], clip_tokens[:, shuffled]), tokens, atol=1e-4, rtol=1e-4)
    twice = list(range(count)) * 2
    torch.testing.assert_close(mixer(embeddings[:, twice], clip_tokens[:, twice]), tokens, atol=1e-4, rtol=1e-4)


def test_every_reference_affects_the_tokens(mixer):
    embeddings, clip_tokens = references(1, 2)
    both = mixer(embeddings, clip_tokens)
    for one in range(2):
        alone = mixer(embeddings[:, [one]], clip_tokens[:, [one]])
        assert (both - alone).abs().max() > 1e-2


def test_rows_of_a_batch_are_independent(mixer):
    embeddings, clip_tokens = references(3, 2)
    together = mixer(embeddings, clip_tokens)
    for person in range(3):
        alone = mixer(embeddings[[person]], clip_tokens[[person]])
        torch.testing.assert_close(together[[person]], alone, atol=1e-5, rtol=1e-5)
