"""Sizes and features for testing the Mixers, and a reference implementation of InstantID's Resampler."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from facesnap_ext.networks.resampler import ResamplerConfig

SIZES = {"id_dim": 12, "clip_dim": 10, "dim": 32, "id_tokens": 5, "queries": 4, "layers": 2, "feedforward": 48}
CLIP_TOKENS = 7  # per reference
RESAMPLER = ResamplerConfig(
    id_dim=12, clip_dim=10, dim=48, width=40, queries=4, layers=3, feedforward=56, heads=3, head_dim=16
)


def references(people=2, count=1, seed=0):
    """Return random embeddings and CLIP tokens. The embeddings have a typical ArcFace norm, which matters to the
    Resampler but not to the paper's Mixer."""
    g = torch.Generator().manual_seed(seed)
    return 20 * torch.randn(people, count, 12, generator=g), torch.randn(people, count, CLIP_TOKENS, 10, generator=g)


def instantid_resampler(p, embeddings, head_dim=64):
    """Compute InstantID's Resampler as published (ip_adapter/resampler.py), explicitly from its tensors.

    Args:
        p: tensors of `image_proj` in `ip-adapter.bin`.
        embeddings: [N, 1, 512], not normalised.
        head_dim: channels of an attention head.
    """

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", torch.zeros(()))

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    x = linear(embeddings, "proj_in")
    latents = p["latents"].repeat(len(embeddings), 1, 1)
    layer = 0
    while f"layers.{layer}.0.to_q.weight" in p:
        attention, feedforward = f"layers.{layer}.0", f"layers.{layer}.1"
        image, queries = norm(x, f"{attention}.norm1"), norm(latents, f"{attention}.norm2")
        q = linear(queries, f"{attention}.to_q")
        k, v = linear(torch.cat([image, queries], 1), f"{attention}.to_kv").chunk(2, -1)
        scale = 1 / head_dim**0.25
        heads = []
        for start in range(0, q.shape[-1], head_dim):
            part = slice(start, start + head_dim)
            weights = torch.einsum("nqc,nkc->nqk", q[..., part] * scale, k[..., part] * scale).softmax(-1)
            heads.append(torch.einsum("nqk,nkc->nqc", weights, v[..., part]))
        latents = latents + linear(torch.cat(heads, -1), f"{attention}.to_out")
        hidden = F.gelu(linear(norm(latents, f"{feedforward}.0"), f"{feedforward}.1"))
        latents = latents + linear(hidden, f"{feedforward}.3")
        layer += 1
    return norm(linear(latents, "proj_out"), "norm_out")
