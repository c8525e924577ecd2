"""The Mixer, compared with equations 1 and 2 written out, and its treatment of several references."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from facesnap_ext.networks.mixer import FacialAttributeMixer, MixerConfig, average_references
from facesnap_lab.miniature.tokens import token_similarity
from tests.support import tiny

CONFIG = MixerConfig(id_dim=12, clip_dim=10, dim=32, id_tokens=5, queries=4, layers=2, feedforward=48, heads=4)


@pytest.fixture(scope="module")
def mixer():
    return tiny.randomise(FacialAttributeMixer(CONFIG), std=0.3)


def references(people=2, count=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(people, count, 12, generator=g), torch.randn(people, count, 7, 10, generator=g)


def attention(p, q, kv):
    """Compute multi-head attention explicitly from the parameters of an nn.MultiheadAttention."""
    wq, wk, wv = p["in_proj_weight"].chunk(3)
    bq, bk, bv = p["in_proj_bias"].chunk(3)
    q, k, v = q @ wq.T + bq, kv @ wk.T + bk, kv @ wv.T + bv
    heads = []
    for h in range(CONFIG.heads):
        part = slice(h * 8, h * 8 + 8)
        scores = torch.einsum("nqc,nkc->nqk", q[..., part], k[..., part]) / 8**0.5
        heads.append(torch.einsum("nqk,nkc->nqc", scores.softmax(-1), v[..., part]))
    return torch.cat(heads, -1) @ p["out_proj.weight"].T + p["out_proj.bias"]


def test_matches_equations_1_and_2(mixer):
    embeddings, clip_tokens = references()
    p = dict(mixer.named_parameters())

    def part(name):
        return {key[len(name) + 1 :]: value for key, value in p.items() if key.startswith(name + ".")}

    def norm(x, name):
        return F.layer_norm(x, (32,), p[f"{name}.weight"], p[f"{name}.bias"])

    unit = embeddings[:, 0] / embeddings[:, 0].norm(dim=-1, keepdim=True)
    f_id = (CONFIG.id_dim**0.5 * unit @ p["project_id.weight"].T + p["project_id.bias"]).view(2, 5, 32)
    f_clip = clip_tokens[:, 0] @ p["project_clip.weight"].T + p["project_clip.bias"]
    kv = norm(torch.cat([f_id, f_clip], 1), "norm_context")
    f_pre = f_id + attention(part("cross_attn"), norm(f_id, "norm_id"), kv)
    memory = norm(f_pre, "norm_fused")

    x = p["queries"].expand(2, -1, -1)
    for layer in ("decoder.layers.0", "decoder.layers.1"):
        h = norm(x, f"{layer}.norm1")
        x = x + attention(part(f"{layer}.self_attn"), h, h)
        x = x + attention(part(f"{layer}.multihead_attn"), norm(x, f"{layer}.norm2"), memory)
        h = norm(x, f"{layer}.norm3") @ p[f"{layer}.linear1.weight"].T + p[f"{layer}.linear1.bias"]
        x = x + F.gelu(h) @ p[f"{layer}.linear2.weight"].T + p[f"{layer}.linear2.bias"]
    f_mix = norm(x, "decoder.norm")

    assert f_mix.shape == (2, 4, 32)
    torch.testing.assert_close(mixer(embeddings, clip_tokens), f_mix, atol=1e-5, rtol=1e-5)


def test_untrained_mixer_depends_on_the_embedding_as_well_as_clip():
    """With an unscaled embedding of unit norm, its influence would be a thousandth of the influence of the 257 CLIP
    tokens."""
    torch.manual_seed(0)
    mixer = FacialAttributeMixer(MixerConfig(id_dim=512, clip_dim=64, dim=64, heads=4, feedforward=128)).eval()
    embeddings, clip_tokens = torch.randn(40, 1, 512), torch.randn(40, 1, 257, 64) + torch.randn(40, 1, 1, 64)
    with torch.no_grad():
        identity_variance = mixer(embeddings, clip_tokens[:1].expand_as(clip_tokens)).var(0).mean()
        clip_variance = mixer(embeddings[:1].expand_as(embeddings), clip_tokens).var(0).mean()
    assert identity_variance > clip_variance / 10


def test_untrained_mixer_gives_distinct_tokens():
    """The measure is the similarity of a person's tokens after subtracting the mean over people. It is 0.95 with
    PyTorch's default initialisation."""
    torch.manual_seed(0)
    mixer = FacialAttributeMixer(MixerConfig(id_dim=512, clip_dim=64, dim=256, heads=4, feedforward=512)).eval()
    with torch.no_grad():
        tokens = mixer(torch.randn(40, 1, 512), torch.randn(40, 1, 257, 64))
    assert token_similarity(tokens) < 0.5


def test_default_sizes_are_those_of_the_paper():
    with torch.device("meta"):
        mixer = FacialAttributeMixer(MixerConfig())
        tokens = mixer(torch.empty(3, 1, 512), torch.empty(3, 1, 257, 1280))
        shapes = {key: tuple(t.shape) for key, t in mixer.state_dict().items()}
    assert tokens.shape == (3, 16, 2048)
    assert shapes["project_id.weight"] == (20 * 2048, 512)
    assert MixerConfig.from_shapes(shapes, heads=32) == MixerConfig()


def test_averaging_is_independent_of_embedding_norms():
    embeddings = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    clip_tokens = torch.tensor([[[[2.0]], [[4.0]]]])
    mean, tokens = average_references(embeddings, clip_tokens)
    torch.testing.assert_close(mean, torch.tensor([[[2**0.5, 2**0.5]]]))  # halfway between, mean norm 2
    torch.testing.assert_close(tokens, torch.tensor([[[[3.0]]]]))
