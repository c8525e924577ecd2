"""FFRNet: equivalence to diffusers' ControlNet, and sizes derived from tensor shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from facesnap_ext.networks.ffrnet import FFRNet, FFRNetConfig, sinusoid
from tests.support import tiny

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

DOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
SDXL = {
    "down_block_types": DOWN,
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def controlnet(widths, layers, heads, context, size_dim, pooled, down=DOWN):
    network = diffusers.ControlNetModel(
        **{
            **SDXL,
            "down_block_types": down,
            "block_out_channels": widths,
            "transformer_layers_per_block": layers,
            "attention_head_dim": heads,
            "cross_attention_dim": context,
            "addition_time_embed_dim": size_dim,
            "projection_class_embeddings_input_dim": pooled + 6 * size_dim,
        }
    )
    return tiny.randomise(network)


def as_ffrnet(network, heads, size_dim) -> FFRNet:
    state = network.state_dict()
    config = FFRNetConfig.from_shapes({key: tuple(t.shape) for key, t in state.items()}, heads, size_dim)
    ffrnet = FFRNet(config)
    ffrnet.load_state_dict(state)
    return ffrnet.eval().requires_grad_(False)


SHAPES = {
    "three levels": ((32, 64, 96), (1, 1, 3), (2, 4, 3), DOWN),
    "attention everywhere": ((64, 64), (2, 1), (4, 2), ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D")),
    "one level": ((32,), (2,), (4,), ("CrossAttnDownBlock2D",)),
}


@pytest.mark.parametrize("size", [(16, 16), (33, 41)])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_diffusers_controlnet(shape, size):
    widths, layers, heads, down = SHAPES[shape]
    reference = controlnet(widths, layers, heads, context=48, size_dim=8, pooled=20, down=down)
    network = as_ffrnet(reference, heads, size_dim=8)
    g = torch.Generator().manual_seed(0)
    x, tokens = torch.randn(2, 4, *size, generator=g), torch.randn(2, 16, 48, generator=g)
    timesteps = torch.tensor([3.0, 871.0])
    height, width = 8 * size[0], 8 * size[1]
    image = torch.rand(2, 3, height, width, generator=g)
    text = torch.randn(2, 20, generator=g)
    sizes = torch.tensor([[height, width, 0.0, 0, height, width]] * 2)

    for pooled, y in (
        (torch.zeros(2, 20), None),
        (text, torch.cat([text, sinusoid(sizes.flatten(), 8).view(2, -1)], 1)),
    ):
        down_residuals, middle = reference(
            x,
            timesteps,
            tokens,
            image,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
            return_dict=False,
        )
        residuals = network(x, timesteps, network.embed_tokens(tokens), network.embed_landmarks(image), y)
        assert len(residuals) == len(down_residuals) + 1
        for actual, expected in zip(residuals, [*down_residuals, middle]):
            assert expected.abs().mean() > 1e-3
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_full_size_has_the_tensors_of_an_sdxl_controlnet():
    with torch.device("meta"):
        shapes = {key: tuple(t.shape) for key, t in diffusers.ControlNetModel(**SDXL).state_dict().items()}
        network = FFRNet(FFRNetConfig.from_shapes(shapes))
    assert {key: tuple(t.shape) for key, t in network.state_dict().items()} == shapes
    assert len(shapes) == 844
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_251_014_160
    assert network.config.heads == (5, 10, 20)
    assert network.config.skip_widths == (320, 320, 320, 320, 640, 640, 640, 1280, 1280)


def test_conditional_and_unconditional_rows_have_equal_residuals():
    """Text-free residuals are the same for both rows of an image, so one forward pass serves both."""
    network = tiny.ffrnet()
    x, tokens = torch.randn(1, 4, 16, 16), torch.randn(1, 16, tiny.CONTEXT)
    features = network.embed_landmarks(torch.rand(1, 3, 128, 128))
    single = network(x, torch.tensor([500.0]), network.embed_tokens(tokens), features)
    both = network(x.expand(2, -1, -1, -1), torch.tensor([500.0, 500.0]), network.embed_tokens(tokens), features)
    for one, two in zip(single, both):
        torch.testing.assert_close(two[0], two[1], atol=0, rtol=0)
        torch.testing.assert_close(two[:1], one, atol=1e-5, rtol=1e-5)


def test_extra_inpainting_channels_are_ignored():
    network = tiny.ffrnet()
    x, tokens = torch.randn(1, 9, 8, 8), torch.randn(1, 16, tiny.CONTEXT)
    features = network.embed_landmarks(torch.rand(1, 3, 64, 64))
    for a, b in zip(
        network(x, torch.tensor([1.0]), network.embed_tokens(tokens), features),
        network(x[:, :4], torch.tensor([1.0]), network.embed_tokens(tokens), features),
    ):
        assert torch.equal(a, b)


widths = st.lists(st.sampled_from([32, 64, 96]), min_size=1, max_size=4).map(tuple)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), widths=widths, middle=st.integers(-1, 2))
def test_config_is_recovered_from_tensor_shapes(data, widths, middle):
    """This holds for any widths and depths, including a middle block without attention."""
    resnets = data.draw(st.integers(1, 3))
    depths = []
    for _ in widths:
        attention = data.draw(st.booleans())
        depths.append(tuple(data.draw(st.integers(1, 3)) if attention else 0 for _ in range(resnets)))
    if middle < 1 and not any(map(any, depths)):
        depths[-1] = (1,) * resnets  # at least one cross-attention layer is needed
    middle = middle if middle else 1
    config = tiny.config(widths=widths, depths=tuple(depths), middle_depth=middle, heads=(2,) * len(widths))
    with torch.device("meta"):
        network = FFRNet(config)
        shapes = {key: tuple(t.shape) for key, t in network.state_dict().items()}
        assert FFRNetConfig.from_shapes(shapes, config.heads, config.size_dim) == config
        x, tokens = torch.empty(1, 4, 32, 32), torch.empty(1, 16, tiny.CONTEXT)
        residuals = network(
            x, torch.empty(1), network.embed_tokens(tokens), network.embed_landmarks(torch.empty(1, 3, 256, 256))
        )
    assert [r.shape[1] for r in residuals] == [*config.skip_widths, widths[-1]]


def test_adm_dim_too_small_for_six_sizes_is_rejected():
    with pytest.raises(ValueError, match="too small for 6 sizes"):
        tiny.config(adm_dim=47)
