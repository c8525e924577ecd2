"""Few-step sampling compared with diffusers' scheduler, and loading of the few-step model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.training.lightning import few_step_latents, load_few_step
from tests.support.training_world import sdxl


def schedule():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return (1 - betas).cumprod(0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_sampling_equals_diffusers_euler_scheduler_with_trailing_timesteps(steps, prediction_type):
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )
    noise = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))

    def predict(x, timesteps):
        return torch.sin(3 * x) * timesteps[:, None, None, None] / 1000

    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), t.expand(2)), t, x).prev_sample
    actual = few_step_latents(predict, noise, schedule(), prediction_type, steps, 1)
    torch.testing.assert_close(actual, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad_steps", [1, 2, 4])
def test_only_the_last_steps_are_backpropagated_through(grad_steps):
    weight = torch.tensor(0.5, requires_grad=True)
    grad_enabled = []

    def predict(x, timesteps):
        grad_enabled.append(torch.is_grad_enabled())
        return weight * x

    few_step_latents(predict, torch.ones(1, 4, 2, 2), schedule(), "epsilon", 4, grad_steps).sum().backward()
    assert grad_enabled == [False] * (4 - grad_steps) + [True] * grad_steps
    assert weight.grad != 0


def call(unet):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return unet(
            torch.randn(1, 4, 8, 8, generator=g),
            torch.tensor([500]),
            encoder_hidden_states=torch.randn(1, 12, 48, generator=g),
            added_cond_kwargs={"text_embeds": torch.randn(1, 20, generator=g), "time_ids": torch.ones(1, 6)},
            return_dict=False,
        )[0]


def write_lora(path):
    """Write a LoRA with the key names of SDXL-Lightning's LoRA."""
    g = torch.Generator().manual_seed(1)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{layer}.lora_A.weight": torch.randn(2, 96, generator=g),
        f"{layer}.lora_B.weight": torch.randn(96, 2, generator=g),
    }
    save_file(tensors, path)
    return tensors


def test_lora_is_enabled_only_inside_the_with_block(tmp_path):
    pipe = sdxl()
    before = call(pipe.unet)
    lora = write_lora(tmp_path / "lora.safetensors")
    few_step = load_few_step(pipe, tmp_path / "lora.safetensors")
    assert torch.equal(call(pipe.unet), before)
    with pytest.raises(KeyError), few_step.active():
        raise KeyError
    assert torch.equal(call(pipe.unet), before)
    with few_step.active() as unet:
        inside = call(unet)
    assert torch.equal(call(pipe.unet), before)

    merged = sdxl().unet
    a, b = lora.values()
    with torch.no_grad():
        merged.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight += b @ a
    torch.testing.assert_close(inside, call(merged), rtol=1e-4, atol=1e-4)
    assert (inside - before).abs().max() > 1e-3
    assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())


def test_separate_unet_is_loaded_from_file_or_folder(tmp_path):
    pipe, other = sdxl(), sdxl(seed=1).unet
    save_file(other.state_dict(), tmp_path / "unet.safetensors")
    other.save_pretrained(tmp_path / "unet")
    for path in (tmp_path / "unet.safetensors", tmp_path / "unet"):
        few_step = load_few_step(pipe, path)
        with few_step.active() as unet:
            torch.testing.assert_close(call(unet), call(other))
        assert not any(parameter.requires_grad for parameter in few_step.unet.parameters())


def test_base_is_the_few_step_model_by_default():
    pipe = sdxl()
    with load_few_step(pipe, None).active() as unet:
        assert unet is pipe.unet


def test_unsuitable_files_are_rejected_by_name(world, tmp_path):
    with pytest.raises(FaceSnapError, match=r"start\.safetensors is a FaceSnap file"):
        load_few_step(sdxl(), world / "start.safetensors")
    state = sdxl().unet.state_dict()
    save_file({key: tensor for key, tensor in state.items() if "mid_block" not in key}, tmp_path / "part.safetensors")
    with pytest.raises(FaceSnapError, match=r"part\.safetensors is not a UNet"):
        load_few_step(sdxl(), tmp_path / "part.safetensors")
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    wide = {f"{layer}.lora_A.weight": torch.zeros(2, 5), f"{layer}.lora_B.weight": torch.zeros(5, 2)}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(FaceSnapError, match=r"wide\.safetensors is not a LoRA"):
        load_few_step(sdxl(), tmp_path / "wide.safetensors")
    with pytest.raises(FaceSnapError, match="is not a UNet"):
        load_few_step(sdxl(), tmp_path)
