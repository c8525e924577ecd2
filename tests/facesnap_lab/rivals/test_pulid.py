"""PuLID's tokens and its alignment losses."""

from __future__ import annotations

import math

import pytest
import torch

from facesnap_ext.networks.adapter import AdapterConfig
from facesnap_lab.rivals.attention import Attended
from facesnap_lab.rivals.method import References
from facesnap_lab.rivals.pulid import IDEncoder, PuLID, PuLIDConfig, layout_loss, semantic_loss
from facesnap_lab.training.objective import compute_losses
from tests.support import tiny


def attended(seed: int) -> Attended:
    generator = torch.Generator().manual_seed(seed)
    return Attended(torch.randn(2, 3, 6, 4, generator=generator), torch.randn(2, 3, 5, 4, generator=generator), None)


def test_semantic_loss_is_the_papers():
    one, other = attended(0), attended(1)
    responses = []
    for record in (one, other):
        weights = torch.einsum("nhkd,nhqd->nhkq", record.text_keys, record.queries) / math.sqrt(4)
        responses.append(torch.einsum("nhkq,nhqd->nhkd", weights.softmax(-1), record.queries))
    torch.testing.assert_close(semantic_loss(one, other), (responses[0] - responses[1]).square().mean())


def test_alignment_loss_vanishes_only_for_equal_queries():
    one = {0: attended(0), 1: attended(1)}
    assert PuLID.alignment_loss(one, one) == 0
    other = {0: attended(0), 1: attended(2)}
    expected = (0.6 * semantic_loss(one[1], other[1]) + 0.1 * layout_loss(one[1], other[1])) / 2
    torch.testing.assert_close(PuLID.alignment_loss(one, other), expected)
    torch.testing.assert_close(layout_loss(one[1], other[1]), (one[1].queries - other[1].queries).square().mean())


@torch.no_grad()
def test_each_level_of_clip_has_its_own_token():
    encoder = tiny.randomise(IDEncoder(PuLIDConfig(8, 6, 16, AdapterConfig((), 12))), std=0.4)
    identity, levels = torch.randn(1, 14), torch.randn(1, 5, 4, 6)
    tokens = encoder(identity, levels)
    assert tokens.shape == (1, 10, 12)
    changed = encoder(identity + 1, levels)
    assert [i for i in range(10) if not torch.equal(tokens[0, i], changed[0, i])] == [0, 1, 2, 3, 4]
    for level in range(5):
        other = levels.clone()
        other[:, level, 2] += 1
        changed = encoder(identity, other)
        assert [i for i in range(10) if not torch.equal(tokens[0, i], changed[0, i])] == [5 + level]
    shuffled = levels[:, :, [0, 3, 1, 2]]  # only the class token's position matters
    torch.testing.assert_close(encoder(identity, shuffled), tokens)


@torch.no_grad()
def test_levels_end_with_the_mixers_clip_tokens(prepared):
    run = prepared("pulid")
    pixels = torch.stack([run.images[row]["clip_pixels"] for row in range(2)])
    embeddings = torch.ones(2, 512)
    _, levels = PuLID.features(run.frozen.clip, References(embeddings, pixels, torch.empty(0), torch.empty(0)))
    expected = run.frozen.clip.model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(levels[:, -1], expected)


@pytest.mark.parametrize("method", ["pulid"])
def test_alignment_is_added_in_the_lightning_branch(run, batch, inputs, monkeypatch):
    with_alignment = compute_losses(batch, inputs, run.networks, run.frozen, run.objective, 1)
    without_branch = compute_losses(batch, inputs, run.networks, run.frozen, run.objective, 0)
    assert torch.equal(without_branch.total, without_branch.diffusion)
    monkeypatch.setattr(PuLID, "alignment_loss", None)
    plain = compute_losses(batch, inputs, run.networks, run.frozen, run.objective, 1)
    torch.testing.assert_close(plain.total, plain.diffusion + run.objective.id_weight * plain.id)
    assert with_alignment.total > plain.total
    assert torch.equal(with_alignment.id, plain.id)
