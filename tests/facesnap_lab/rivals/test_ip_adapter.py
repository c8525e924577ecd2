"""IP-Adapter computes what diffusers' implementation computes with the same weights."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterFaceIDImageProjection, IPAdapterPlusImageProjection

from facesnap_lab.rivals.attention import CROSS
from facesnap_lab.rivals.ip_adapter import FaceProjection, Resampler, direction, resampler_config
from facesnap_lab.training.frozen import size_ids
from facesnap_lab.training.objective import condition
from facesnap_lab.training.rival_objective import encode_text
from tests.support import tiny

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@torch.no_grad()
@pytest.mark.parametrize("method", ["ip-adapter-face", "ip-adapter-plus"])
def test_decoupled_attention_is_diffusers(run, batch, inputs):
    rival, unet = run.networks, run.frozen.unet
    tiny.randomise(rival.ip_adapter, std=0.5).requires_grad_(True)
    conditioning = condition(batch, rival, run.frozen, run.objective)
    text = encode_text(run.frozen, batch.captions, type(rival))
    actual = conditioning.predictor(unet, text)(inputs.noise, inputs.timesteps)

    tokens = rival.tokens(conditioning.features)
    layers = iter(rival.ip_adapter.children())
    processors = {}
    for name in unet.attn_processors:
        processors[name] = AttnProcessor2_0()
        if CROSS in name:
            own = next(layers)
            width, context = own.to_k_ip.weight.shape
            processors[name] = IPAdapterAttnProcessor2_0(width, context, num_tokens=(tokens.shape[1],))
            processors[name].to_k_ip[0].weight.copy_(own.to_k_ip.weight)
            processors[name].to_v_ip[0].weight.copy_(own.to_v_ip.weight)
    unet.set_attn_processor(processors)
    expected = unet(
        inputs.noise,
        inputs.timesteps,
        (text.context, [tokens]),
        added_cond_kwargs={"text_embeds": text.pooled, "time_ids": size_ids(32, 2, "cpu")},
    ).sample
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@torch.no_grad()
def test_face_projection_is_diffusers():
    own = tiny.randomise(FaceProjection(24, 4, 48), std=0.3)
    reference = IPAdapterFaceIDImageProjection(24, 48, mult=2, num_tokens=4)
    copy(own, reference, {"proj.0.": "ff.net.0.proj.", "proj.2.": "ff.net.2.", "norm.": "norm."})
    embeddings = torch.randn(3, 24)
    torch.testing.assert_close(own(embeddings), reference(embeddings), **TOLERANCE)


@torch.no_grad()
def test_resampler_is_diffusers():
    config = resampler_config(32, 128, queries=5, layers=2)
    own = tiny.randomise(Resampler(config), std=0.2)
    reference = plus_projection(own, config)
    tokens = torch.randn(3, 7, 32)
    torch.testing.assert_close(own(tokens), reference(tokens), **TOLERANCE)


@torch.no_grad()
def test_resampler_treats_a_reference_given_twice_as_one():
    own = tiny.randomise(Resampler(resampler_config(32, 64, queries=5)), std=0.2)
    tokens = torch.randn(3, 7, 32)
    torch.testing.assert_close(own(torch.cat([tokens, tokens], 1), references=2), own(tokens))


def test_directions_have_unit_variance_and_zeros_stay_zeros():
    embeddings = torch.randn(3, 512) * 7
    embeddings[1] = 0
    found = direction(embeddings)
    torch.testing.assert_close(found.square().mean(-1), torch.tensor([1.0, 0.0, 1.0]))


def plus_projection(own: Resampler, config) -> IPAdapterPlusImageProjection:
    reference = IPAdapterPlusImageProjection(
        config.id_dim, config.dim, config.width, config.layers, config.head_dim, config.heads, config.queries
    )
    copy(own, reference, {**plus_names(config.layers), "latents": "latents"}, split=".0.to_kv.")
    return reference


def plus_names(layers: int) -> dict[str, str]:
    """Beginnings of a Resampler's keys, and what diffusers calls them."""
    names = {f"{part}.": f"{part}." for part in ("proj_in", "proj_out", "norm_out")}
    for i in range(layers):
        layer = f"layers.{i}."
        names |= {f"{layer}0.norm1.": f"{layer}ln0.", f"{layer}0.norm2.": f"{layer}ln1."}
        names |= {f"{layer}0.to_q.": f"{layer}attn.to_q.", f"{layer}0.to_out.": f"{layer}attn.to_out.0."}
        names |= {f"{layer}1.0.": f"{layer}ff.0.", f"{layer}1.1.": f"{layer}ff.1.net.0.proj."}
        names |= {f"{layer}1.3.": f"{layer}ff.1.net.2."}
    return names


def copy(own, reference, names: dict[str, str], split: str = "\0", strip: str = "") -> None:
    """Load the weights of `own` into diffusers' module, which must take all of them.

    Args:
        split: part of the keys whose tensors diffusers splits into keys and values, and `strip` their beginning.
    """
    state = {}
    for key, tensor in own.state_dict().items():
        if split in key:
            prefix = key.split(split)[0].removeprefix(strip)
            state[f"{prefix}.attn.to_k.weight"], state[f"{prefix}.attn.to_v.weight"] = tensor.chunk(2)
        else:
            start = max((name for name in names if key.startswith(name)), key=len)
            state[names[start] + key.removeprefix(start)] = tensor
    reference.load_state_dict(state)
