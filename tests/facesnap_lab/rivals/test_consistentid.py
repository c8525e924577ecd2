"""ConsistentID's facial parts, their tokens, and the loss that localises the attention to them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection

from facesnap_ext.networks.adapter import AdapterConfig
from facesnap_lab.rivals import consistentid
from facesnap_lab.rivals.attention import Attended
from facesnap_lab.rivals.consistentid import (
    PARTS,
    ConsistentID,
    ConsistentIDConfig,
    FacePlusProjection,
    FacialEncoder,
    localisation_loss,
    part_crops,
    part_masks,
)
from facesnap_lab.training.objective import compute_losses
from tests.facesnap_lab.rivals.test_ip_adapter import TOLERANCE, plus_names
from tests.facesnap_lab.rivals.test_ip_adapter import copy as copy_weights
from tests.support import tiny


@torch.no_grad()
def test_face_projection_is_diffusers():
    """diffusers' projection of IP-Adapter FaceID Plus has the structure of ConsistentID's `ProjPlusModel`."""
    own = tiny.randomise(FacePlusProjection(ConsistentIDConfig(24, 32, AdapterConfig((), 128))), std=0.2)
    reference = IPAdapterFaceIDPlusImageProjection(128, 128, 32, 24, depth=4, heads=2, num_tokens=4)
    names = {f"perceiver.{key}": name for key, name in plus_names(4).items()}
    names |= {"face.proj.0.": "proj.net.0.proj.", "face.proj.2.": "proj.net.2.", "face.norm.": "norm."}
    copy_weights(own, reference, names, split=".0.to_kv.", strip="perceiver.")
    embeddings, tokens = torch.randn(3, 24), torch.randn(3, 7, 32)
    reference.clip_embeds = tokens[:, None]
    torch.testing.assert_close(own(embeddings, tokens), reference(embeddings), **TOLERANCE)


@torch.no_grad()
def test_each_part_has_its_own_token_and_references_given_twice_change_nothing():
    encoder = tiny.randomise(FacialEncoder(16, 64), std=0.2)
    tokens = torch.randn(2, 1, 4, 5, 16)
    found = encoder(tokens)
    assert found.shape == (2, 4, 64)
    torch.testing.assert_close(encoder(tokens.expand(-1, 3, -1, -1, -1)), found)
    for part in range(4):
        other = tokens.clone()
        other[0, 0, part] += 1
        changed = (encoder(other) - found).abs().amax(-1) > 1e-4
        assert changed.nonzero().tolist() == [[0, part]]


def face(side: int) -> np.ndarray:
    """72 points of a schematic face in an image of this side: an oval, brows, a nose, two eyes and a mouth."""

    def ellipse(x, y, width, height, count, start=0.0, end=2 * np.pi):
        angles = np.linspace(start, end, count, endpoint=end < 2 * np.pi)
        return np.stack([x + width * np.cos(angles), y + height * np.sin(angles)], -1)

    parts = [
        ellipse(0.5, 0.5, 0.35, 0.4, 17, np.pi, 0),
        *(ellipse(x, 0.33, 0.1, 0.05, 5, np.pi, 2 * np.pi - 0.1) for x in (0.35, 0.65)),
        np.stack([np.full(4, 0.5), np.linspace(0.4, 0.55, 4)], -1),
        np.stack([np.linspace(0.42, 0.58, 5), np.full(5, 0.6)], -1),
        *(ellipse(x, 0.42, 0.07, 0.04, 9)[:8] for x in (0.35, 0.65)),
        ellipse(0.5, 0.75, 0.12, 0.05, 13)[:12],
        ellipse(0.5, 0.75, 0.06, 0.02, 9)[:8],
    ]
    return (side * np.concatenate(parts)).astype(np.float32)


def test_masks_cover_the_parts():
    masks = part_masks(torch.from_numpy(face(100))[None], 100)[0].bool()
    covered = dict(zip(PARTS, masks))
    places = {"eyes": [(35, 42), (65, 42)], "nose": [(50, 55)], "mouth": [(50, 75)], "face": [(50, 85), (50, 50)]}
    for part, points in places.items():
        assert all(covered[part][y, x] for x, y in points), part
    assert not (covered["eyes"] & covered["nose"]).any()
    assert not (covered["nose"] & covered["mouth"]).any()
    assert covered["eyes"].sum() == pytest.approx(2 * np.pi * 7 * 4, rel=0.15)
    assert covered["mouth"].sum() == pytest.approx(np.pi * 12 * 5, rel=0.15)
    assert all((one & covered["face"]).sum() == one.sum() for one in masks)


def test_crops_show_only_their_part():
    points = face(100)
    image = np.zeros((100, 100, 3), np.uint8)
    image[67:85, 35:65] = 255  # the mouth
    eyes, nose, mouth = part_crops(image, points, ["eyes", "nose", "mouth"])
    assert mouth.mean() > 90
    assert eyes.max() == nose.max() == 0
    assert all(crop.shape[0] == crop.shape[1] for crop in (eyes, nose, mouth))
    outside = part_crops(image, points - 1000, ["mouth"])[0]
    assert outside.shape == (1, 1, 3)


def test_features_are_those_of_the_crops(monkeypatch):
    monkeypatch.setattr(consistentid, "clip_tokens", lambda clip, pixels: pixels.mean((2, 3))[:, None])
    image, points = torch.zeros(2, 100, 100, 3, dtype=torch.uint8), torch.from_numpy(np.stack([face(100)] * 2))
    image[1, 67:85, 35:65] = 255
    pixels = torch.full((2, 3, 14, 14), 7.0)
    references = consistentid.References(torch.randn(2, 8), pixels, image, points)
    _, tokens = ConsistentID.features(SimpleNamespace(image_size=14), references)
    assert tokens.shape == (2, len(PARTS), 1, 3)
    assert (tokens[:, 0] == 7).all()
    changed = (tokens[1] - tokens[0]).abs().amax((-1, -2)) > 0.1
    assert dict(zip(PARTS, changed.tolist())) == {"face": False, "eyes": False, "nose": False, "mouth": True}


def test_loss_is_the_difference_of_the_mean_attention_outside_and_inside():
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(2, 3, count, 8, generator=generator) for count in (16, 6))
    masks = (torch.rand(2, 4, 4, 4, generator=generator) > 0.6).float()
    expected = []
    for n in range(2):
        for head in range(3):
            weights = (queries[n, head] @ keys[n, head].T / 8**0.5).softmax(-1)
            for part in range(4):
                own, inside = weights[:, 2 + part] / weights[:, 2 + part].max(), masks[n, part].flatten().bool()
                expected.append(own[~inside].mean() - own[inside].mean())
    actual = localisation_loss(Attended(queries, torch.empty(0), keys), masks)
    torch.testing.assert_close(actual, torch.stack(expected).mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["consistentid"])
def test_localisation_is_added_in_the_diffusion_branch(run, batch, inputs):
    losses = compute_losses(batch, inputs, run.networks, run.frozen, run.objective, 0)
    assert -0.01 <= losses.total - losses.diffusion <= 0.01
    assert losses.total != losses.diffusion
    shifted = replace(batch, points=batch.points + 8)
    moved = compute_losses(shifted, inputs, run.networks, run.frozen, run.objective, 0)
    assert torch.equal(moved.diffusion, losses.diffusion)
    assert moved.total != losses.total
