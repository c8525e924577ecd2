"""The paper's ablation without FFRNet: the UNet is conditioned only by the Mixer's tokens, appended to the text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from facesnap_ext.weights import facesnap_file
from facesnap_lab.training import checkpoints, trainer
from facesnap_lab.training.data import collate
from facesnap_lab.training.frozen import size_ids
from facesnap_lab.training.objective import BatchConditioning, compute_losses, draw_random_inputs, encode_clip
from facesnap_lab.training.prepare import prepare_run
from facesnap_lab.training.samples import generate_samples
from tests.support.training_world import generate_with_tokens_in_text


@pytest.fixture
def run(config, random_start):
    return prepare_run(replace(config, start=random_start, tokens="text"))


def first_batch(run):
    batch = collate([run.images[row] for row in range(2)])
    return batch, draw_random_inputs(0, batch.rows.tolist(), (4, 8, 8))


@torch.no_grad()
def test_prediction_is_that_of_the_unet_with_tokens_appended_to_the_text(run):
    batch, inputs = first_batch(run)
    clip_tokens = encode_clip(run.frozen, batch.clip_pixels)
    text = run.frozen.text([batch.captions[0], None])
    predict = BatchConditioning(batch, clip_tokens, run.networks, run.objective).predictor(run.frozen.unet, text)
    actual = predict(inputs.noise, inputs.timesteps)

    mixer = facesnap_file.load(run.config.start).mixer
    tokens = mixer(batch.embeddings[:, None], clip_tokens[:, None])
    unet = run.frozen.unet
    unet.set_attn_processor(AttnProcessor())  # plain attention without fused kernels
    expected = unet(
        inputs.noise,
        inputs.timesteps,
        torch.cat([text[0], tokens], 1),
        added_cond_kwargs={"text_embeds": text[1], "time_ids": size_ids(32, 2, "cpu")},
    ).sample
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("part", ["id", "diffusion"])
def test_gradients_reach_every_parameter_of_the_mixer_and_no_other(run, part):
    batch, inputs = first_batch(run)
    getattr(compute_losses(batch, inputs, run.networks, run.frozen, run.objective, 1), part).backward()
    assert all(parameter.grad.any() for parameter in run.networks.mixer.parameters())
    for network in (run.networks.ffrnet, run.frozen.unet, run.frozen.vae, run.frozen.clip, run.frozen.arcface):
        assert all(parameter.grad is None for parameter in network.parameters())


def test_run_trains_and_reports_only_the_mixer(config, random_start):
    config = replace(config, start=random_start, tokens="text", steps=2, sample_every=2)
    done = facesnap_file.load(trainer.train(config) / checkpoints.WEIGHTS)
    start = facesnap_file.load(random_start)
    assert done.info.trained_on.endswith("only the Mixer, with its tokens appended to the text")
    for key, tensor in start.ffrnet.state_dict().items():
        assert torch.equal(done.ffrnet.state_dict()[key], tensor), key
    assert not torch.equal(done.mixer.queries, start.mixer.queries)


def test_samples_are_generated_as_in_training(run):
    """FFRNet has random weights, so running it would change every image."""
    batch, _ = first_batch(run)
    networks = checkpoints.average_networks(run)
    samples = generate_samples(run, batch, networks)

    tokens = networks.mixer(batch.embeddings[:1, None], encode_clip(run.frozen, batch.clip_pixels)[:1, None])
    expected = generate_with_tokens_in_text(
        run.frozen.pipe,
        batch.captions[0],
        tokens,
        32,
        num_inference_steps=run.config.sample_steps,
        guidance_scale=run.config.sample_scale,
        generator=torch.Generator().manual_seed(run.config.seed),
        output_type="np",
    )
    np.testing.assert_allclose(samples[0] / 255, expected, atol=1.01 / 255)
