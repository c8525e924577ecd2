"""The diffusers adapter on tiny SDXL pipelines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d as pool
from torch.nn.functional import interpolate

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts.diffusers import conditioned
from facesnap_ext.networks.ffrnet import FFRNet, FFRNetConfig
from facesnap_ext.regions import PaintedRegion
from facesnap_ext.residuals import Residuals, landmark_image
from tests.support import tiny
from tests.support.units import changed

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

PROMPT = {
    "prompt_embeds": torch.full((1, 8, tiny.CONTEXT), 0.1),
    "negative_prompt_embeds": torch.full((1, 8, tiny.CONTEXT), -0.1),
    "pooled_prompt_embeds": torch.full((1, tiny.ADM - 48), 0.1),
    "negative_pooled_prompt_embeds": torch.full((1, tiny.ADM - 48), -0.1),
}


def parts():
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), **tiny.DIFFUSERS
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )
    return {
        "vae": vae,
        "unet": tiny.randomise(unet),
        "scheduler": diffusers.EulerDiscreteScheduler(),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    }


def run(pipe, **changes) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    values = {
        "width": 128,
        "height": 128,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        **PROMPT,
    }
    return pipe(**{**values, **changes}).images


@pytest.fixture(scope="module")
def pipe():
    return diffusers.StableDiffusionXLPipeline(**parts(), add_watermarker=False)


@pytest.fixture(scope="module")
def controlnet():
    return tiny.randomise(diffusers.ControlNetModel(**tiny.DIFFUSERS), seed=4)


def as_ffrnet(controlnet) -> FFRNet:
    state = controlnet.state_dict()
    config = FFRNetConfig.from_shapes({key: tuple(t.shape) for key, t in state.items()}, (2, 4, 6), size_dim=8)
    network = FFRNet(config)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["CFG 1", "CFG 3"])
def test_text_free_weights_equal_a_controlnet_pipeline_given_tokens_and_zero_pooled_text(
    pipe, controlnet, scale, monkeypatch
):
    """The reference is diffusers' ControlNet, run on every row, with tokens in place of text as in the paper."""
    conditioning = tiny.conditioning(network=as_ffrnet(controlnet))
    with conditioned(pipe, conditioning):
        got = run(pipe, guidance_scale=scale)

    forward = diffusers.ControlNetModel.forward

    def text_free(self, sample, timestep, encoder_hidden_states, *args, added_cond_kwargs, **kwargs):
        added = {**added_cond_kwargs, "text_embeds": torch.zeros_like(added_cond_kwargs["text_embeds"])}
        tokens = conditioning.tokens.expand(len(sample), -1, -1)
        return forward(self, sample, timestep, tokens, *args, added_cond_kwargs=added, **kwargs)

    monkeypatch.setattr(diffusers.ControlNetModel, "forward", text_free)
    reference = diffusers.StableDiffusionXLControlNetPipeline(
        **pipe.components, controlnet=controlnet, add_watermarker=False
    )
    expected = run(reference, guidance_scale=scale, image=landmark_image(conditioning.landmarks, 128, 128))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, run(pipe, guidance_scale=scale), atol=1e-2)


def test_weights_trained_with_text_receive_each_rows_pooled_text(pipe, controlnet, monkeypatch):
    conditioning = tiny.conditioning(network=as_ffrnet(controlnet), text_free=False)
    with conditioned(pipe, conditioning):
        got = run(pipe)
    forward = diffusers.ControlNetModel.forward

    def on_tokens(self, sample, timestep, encoder_hidden_states, *args, **kwargs):
        return forward(self, sample, timestep, conditioning.tokens.expand(len(sample), -1, -1), *args, **kwargs)

    monkeypatch.setattr(diffusers.ControlNetModel, "forward", on_tokens)
    reference = diffusers.StableDiffusionXLControlNetPipeline(
        **pipe.components, controlnet=controlnet, add_watermarker=False
    )
    expected = run(reference, image=landmark_image(conditioning.landmarks, 128, 128))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_it_can_be_combined_with_a_controlnet_pipeline(pipe, controlnet):
    """The result differs from the results of only the ControlNet and of only FaceSnap."""
    reference = diffusers.StableDiffusionXLControlNetPipeline(
        **pipe.components, controlnet=controlnet, add_watermarker=False
    )
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    plain = run(reference, image=picture, controlnet_conditioning_scale=0.5)
    with conditioned(reference, tiny.conditioning()):
        both = run(reference, image=picture, controlnet_conditioning_scale=0.5)
    with conditioned(pipe, tiny.conditioning()):
        alone = run(pipe)
    assert not torch.allclose(both, plain, atol=1e-2)
    assert not torch.allclose(both, alone, atol=1e-2)


@pytest.mark.parametrize("people", ["one", "two"])
def test_residuals_take_the_size_of_what_they_are_added_to(pipe, people):
    """Other code may shrink all features behind the first convolution, as HiDiffusion does."""
    shrink = pipe.unet.conv_in.register_forward_hook(lambda module, args, output: pool(output, 2))
    enlarge = pipe.unet.conv_norm_out.register_forward_pre_hook(lambda module, args: (interpolate(args[0], (16, 16)),))
    conditionings = tiny.PEOPLE[people]()
    try:
        plain = run(pipe)
        with conditioned(pipe, *conditionings):
            got = run(pipe)
        residuals = Residuals(conditionings)

        def add_pooled(module, args, kwargs):
            sample, is_cond = args[0], [False, True]
            *skips, middle = residuals.rows(sample, args[1].expand(2), is_cond, None)
            kwargs["down_block_additional_residuals"] = tuple(pool(skip, 2) for skip in skips)
            kwargs["mid_block_additional_residual"] = pool(middle, 2)
            return args, kwargs

        handle = pipe.unet.register_forward_pre_hook(add_pooled, with_kwargs=True)
        expected = run(pipe)
        handle.remove()
    finally:
        shrink.remove()
        enlarge.remove()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-2)


def test_the_pipeline_is_bit_identical_after_the_with_block(pipe):
    plain = run(pipe)
    with conditioned(pipe, tiny.conditioning()):
        assert not torch.equal(run(pipe), plain)
    assert torch.equal(run(pipe), plain)
    with pytest.raises(RuntimeError, match="half-way"), conditioned(pipe, tiny.conditioning()):
        raise RuntimeError("half-way")
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("window", [(0.0, 0.3), (0.4, 1.0)])
def test_start_and_end_are_fractions_of_the_steps(pipe, window):
    with conditioned(pipe, tiny.conditioning(start=window[0], end=window[1])):
        part = run(pipe)
    with conditioned(pipe, tiny.conditioning()):
        whole = run(pipe)
    assert not torch.equal(part, whole)
    assert not torch.equal(part, run(pipe))


def test_two_people_have_their_own_regions_start_and_end(pipe):
    """Two copies of a person produce the same image as one copy: side by side, in the same place, or one after the
    other."""
    one = tiny.conditioning()
    left = PaintedRegion(np.float32([[1, 0]]))
    with conditioned(pipe, one):
        expected = run(pipe)
    for pair in (
        (replace(one, region=left), replace(one, region=PaintedRegion(1 - left.mask))),
        (replace(one, region=left), one),
        (one, one),
        (changed(one, end=0.5), changed(one, start=0.5)),
    ):
        with conditioned(pipe, *pair):
            torch.testing.assert_close(run(pipe), expected, atol=1e-4, rtol=1e-4)
    with conditioned(
        pipe, replace(one, region=left), replace(tiny.conditioning(3), region=PaintedRegion(1 - left.mask))
    ):
        assert not torch.allclose(run(pipe), expected, atol=1e-2)


def test_other_widths_are_refused(pipe):
    network = tiny.ffrnet(widths=(32, 64, 64))
    with (
        pytest.raises(FaceSnapError, match=r"other widths|was made for"),
        conditioned(pipe, tiny.conditioning(network=network)),
    ):
        pass
