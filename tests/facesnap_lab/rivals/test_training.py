"""The trainer trains every rival: its own weights and nothing else, resumably, with samples and a file."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers.models.attention_processor import AttnProcessor2_0

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.residuals import landmark_image
from facesnap_lab.rivals import files
from facesnap_lab.rivals.method import Text
from facesnap_lab.rivals.methods import METHODS
from facesnap_lab.training import checkpoints, trainer
from facesnap_lab.training.config import CHOICES, read_config
from facesnap_lab.training.frozen import size_ids
from facesnap_lab.training.objective import compute_losses, condition, few_step_sampler
from facesnap_lab.training.prepare import _check_fsdp
from facesnap_lab.training.rival_objective import encode_text, rows_without_person
from facesnap_lab.training.samples import generate_samples
from tests.facesnap_lab.rivals.conftest import without_output
from tests.support.training_world import train_config


def state(network) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in network.state_dict().items()}


def test_three_steps_change_only_the_rivals_weights_and_resume(run):
    start, frozen = state(run.networks), [state(run.frozen.unet), state(run.frozen.pipe.text_encoder)]
    for step in trainer.steps(run, 0):
        assert np.isfinite(step.loss)
        if step.number == 2:
            checkpoints.save_checkpoint(run, 2)
    for before, network in zip(frozen, (run.frozen.unet, run.frozen.pipe.text_encoder)):
        assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    done = state(run.networks)
    assert all(tensor.isfinite().all() for tensor in done.values())
    assert not [key for key, tensor in done.items() if torch.equal(tensor, start[key])], "every weight is trained"

    assert checkpoints.load_checkpoint(run) == 2
    assert [step.number for step in trainer.steps(run, 2)] == [3]
    assert all(torch.equal(done[key], tensor) for key, tensor in run.networks.state_dict().items())


def test_command_writes_the_rivals_file_and_samples(world, tmp_path):
    changes = {"method": "ip-adapter-face", "steps": 1, "sample_every": 1, "sample_count": 1, "sample_steps": 1}
    config = replace(train_config(world, tmp_path / "out"), **changes)
    folder = trainer.train(config)
    assert METHODS["ip-adapter-face"].load(folder / "ip-adapter-face.safetensors").name == "ip-adapter-face"
    assert not (folder / checkpoints.WEIGHTS).exists()
    assert (config.out / "samples" / "step-0000001.png").is_file()


def test_file_contains_the_average_and_its_origin(run, method, tmp_path):
    path = tmp_path / "rival.safetensors"
    rival = METHODS[method]
    checkpoints.average_networks(run).save(path, replace(run.info, license="CC0"))
    loaded = rival.load(path)
    expected = run.networks.state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in loaded.state_dict().items()} == {
        key: tuple(tensor.shape) for key, tensor in expected.items()
    }
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    other = next(kind for name, kind in METHODS.items() if name not in (method, "instantid"))
    with pytest.raises(FaceSnapError, match=r"rival.safetensors is not a file of"):
        files.load(path, other)


@torch.no_grad()
def test_unet_is_unchanged_while_the_rivals_outputs_are_zero(run, batch, inputs):
    unet = run.frozen.unet
    without_output(run.networks)
    text = encode_text(run.frozen, batch.captions, type(run.networks))
    text = Text(text.context, text.pooled, torch.zeros_like(text.class_words))
    conditioning = condition(batch, run.networks, run.frozen, run.objective)
    actual = conditioning.predictor(unet, text)(inputs.noise, inputs.timesteps)
    unet.set_attn_processor(AttnProcessor2_0())
    sizes = {"text_embeds": text.pooled, "time_ids": size_ids(32, 2, "cpu")}
    expected = unet(inputs.noise, inputs.timesteps, text.context, added_cond_kwargs=sizes).sample
    assert torch.equal(actual, expected)


def test_gradients_reach_every_weight_of_the_rival_and_no_other(run, batch, inputs):
    with torch.no_grad():
        for parameter in run.networks.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    compute_losses(batch, inputs, run.networks, run.frozen, run.objective, 1).total.backward()
    without = [name for name, p in run.networks.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    for network in (run.frozen.unet, run.frozen.vae, run.frozen.clip, run.frozen.arcface):
        assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith("ip-adapter")])
def test_gradient_checkpointing_changes_nothing(run, batch, inputs):
    def gradients():
        run.networks.zero_grad()
        losses = compute_losses(batch, inputs, run.networks, run.frozen, run.objective, 1)
        losses.total.backward()
        return [losses.total.detach()] + [p.grad.clone() for p in run.networks.parameters() if p.grad is not None]

    expected = gradients()
    unet = run.frozen.unet.train()
    unet.enable_gradient_checkpointing()
    try:
        for actual, wanted in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(actual, wanted, atol=1e-6, rtol=1e-5)
    finally:
        unet.eval().disable_gradient_checkpointing()


@torch.no_grad()
def test_samples_show_the_rival_and_leave_the_pipeline_as_it_was(run, batch):
    pipe = run.frozen.pipe
    processors, before = dict(pipe.unet.attn_processors), state(pipe.unet)
    networks = checkpoints.average_networks(run)
    image = generate_samples(run, batch, networks)[0]
    assert pipe.unet.attn_processors == processors
    assert not pipe.unet._forward_pre_hooks
    assert all(torch.equal(before[key], tensor) for key, tensor in pipe.unet.state_dict().items())
    for parameter in networks.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    other = generate_samples(run, batch, networks)[0]
    assert np.abs(image.astype(int) - other).max() > 1


def test_dropped_rows_do_not_depend_on_the_reference(run, batch, inputs):
    inputs = replace(inputs, text=[0.01, 0.12])  # without text and person, without person
    changes = {name: torch.zeros_like(getattr(batch, name)) for name in ("embeddings", "clip_pixels", "references")}

    def loss(batch, inputs):
        return compute_losses(batch, inputs, run.networks, run.frozen, run.objective, 0).diffusion

    with torch.no_grad():
        for parameter in run.networks.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(loss(batch, inputs), loss(replace(batch, **changes), inputs))
        inputs = replace(inputs, text=[0.5, 0.12])
        assert not torch.equal(loss(batch, inputs), loss(replace(batch, **changes), inputs))


def test_a_step_without_any_person_has_a_gradient_for_every_weight(run, batch, inputs):
    """DDP waits for all of them."""
    inputs = replace(inputs, text=[0.01, 0.12])
    compute_losses(batch, inputs, run.networks, run.frozen, run.objective, 0).total.backward()
    assert not [name for name, parameter in run.networks.named_parameters() if parameter.grad is None]


def test_fsdp_is_refused():
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(auto_wrap_policy=None)))
    _check_fsdp(accelerator, "facesnap")
    with pytest.raises(FaceSnapError, match="FSDP cannot shard 'photomaker'"):
        _check_fsdp(accelerator, "photomaker")


def test_person_and_text_are_dropped_as_often_as_in_ip_adapters_training():
    numbers = np.linspace(0, 1, 2001)[:-1].tolist()
    person = rows_without_person(numbers, 0.1)
    text = torch.tensor(numbers) < 0.1
    for rows in (person & text, text & ~person, person & ~text):
        assert rows.float().mean() == pytest.approx(0.05, abs=1e-3)


@torch.no_grad()
def test_pipeline_generates_what_the_lightning_branch_trains(run, batch, inputs):
    """Compare with diffusers' sampler and guidance, with the rival applied as in its samples."""
    from diffusers import EulerDiscreteScheduler

    rival, frozen = run.networks, run.frozen
    for parameter in rival.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    side = batch.images.shape[-1]
    landmarks = Landmarks(batch.points[0].numpy(), side, side)
    drawn = landmark_image(landmarks, *batch.landmark_images.shape[:1:-1], rival.hint)
    batch = replace(batch, landmark_images=drawn.expand(2, -1, -1, -1))
    scale = 2.0
    sample = few_step_sampler(inputs, frozen, replace(run.objective, lightning_steps=2), 1)
    conditioning = condition(batch, rival, frozen, run.objective)
    actual, _ = conditioning.lightning_branch(frozen, batch.captions[:1], sample, scale)

    text, null = (encode_text(frozen, [caption], type(rival)) for caption in (batch.captions[0], None))
    features = tuple([feature[:1] for feature in conditioning.features])
    pipe, scheduler = frozen.pipe, frozen.pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    try:
        with rival.applied(pipe, features, text, null, landmarks) as (prompt, negative_prompt):
            expected = pipe(
                prompt_embeds=prompt,
                negative_prompt_embeds=negative_prompt,
                pooled_prompt_embeds=text.pooled,
                negative_pooled_prompt_embeds=null.pooled,
                width=side,
                height=side,
                num_inference_steps=2,
                guidance_scale=scale,
                latents=inputs.initial[:1].clone(),
                output_type="latent",
            ).images
    finally:
        pipe.scheduler = scheduler
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_configuration_offers_every_method():
    assert CHOICES["method"] == ("facesnap", *METHODS)


def test_tokens_in_the_text_are_refused(tmp_path, world):
    path = tmp_path / "train.yaml"
    files_of = {name: str(world / name) for name in ("base", "clip")}
    fields = {**files_of, "start": str(world / "start.safetensors"), "shards": str(world / "shards" / "*.tar")}
    path.write_text(yaml.safe_dump({**fields, "out": "out", "id_rows": 0, "method": "instantid", "tokens": "text"}))
    with pytest.raises(FaceSnapError, match="only FaceSnap supports"):
        read_config(path)
