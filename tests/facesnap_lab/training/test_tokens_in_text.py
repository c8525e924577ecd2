"""The paper's ablation without FFRNet: the Mixer's tokens stand behind the text's, and nothing else guides the UNet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from facesnap_ext.weights import facesnap_file
from facesnap_lab.training import trainer
from facesnap_lab.training.checkpoints import WEIGHTS
from facesnap_lab.training.data import collate
from facesnap_lab.training.frozen import size_ids
from facesnap_lab.training.objective import Guided, draw, encode_crops, losses
from facesnap_lab.training.samples import sample
from tests.support.training_world import drawn_with_tokens_in_text


@pytest.fixture
def run(config, random_start):
    return trainer.prepare(replace(config, start=random_start, tokens="text"))


def first_batch(run):
    batch = collate([run.pictures[row] for row in range(2)])
    return batch, draw(0, batch.rows.tolist(), (4, 8, 8))


@torch.no_grad()
def test_the_prediction_is_the_plain_unets_on_text_with_the_tokens_behind_it(run):
    batch, draws = first_batch(run)
    clip_tokens = encode_crops(run.frozen, batch.clip_pixels)
    text = run.frozen.text([batch.captions[0], None])
    predict = Guided(batch, clip_tokens, run.networks, run.objective).predict(run.frozen.unet, text)
    got = predict(draws.noise, draws.timesteps)

    mixer = facesnap_file.load(run.config.start).mixer
    tokens = mixer(batch.embeddings[:, None], clip_tokens[:, None])
    unet = run.frozen.unet
    unet.set_attn_processor(AttnProcessor())  # attention in plain matrix products
    wanted = unet(
        draws.noise,
        draws.timesteps,
        torch.cat([text[0], tokens], 1),
        added_cond_kwargs={"text_embeds": text[1], "time_ids": size_ids(32, 2, "cpu")},
    ).sample
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("part", ["id", "diffusion"])
def test_gradients_reach_every_number_of_the_mixer_and_no_other(run, part):
    batch, draws = first_batch(run)
    getattr(losses(batch, draws, run.networks, run.frozen, run.objective, 1), part).backward()
    assert all(parameter.grad.any() for parameter in run.networks.mixer.parameters())
    for network in (run.networks.ffrnet, run.frozen.unet, run.frozen.vae, run.frozen.clip, run.frozen.arcface):
        assert all(parameter.grad is None for parameter in network.parameters())


def test_a_run_changes_the_mixer_alone_and_says_so(config, random_start):
    config = replace(config, start=random_start, tokens="text", steps=2, sample_every=2)
    done = facesnap_file.load(trainer.train(config) / WEIGHTS)
    start = facesnap_file.load(random_start)
    assert done.info.trained_on.endswith("the Mixer alone, for tokens behind the text")
    for key, tensor in start.ffrnet.state_dict().items():
        assert torch.equal(done.ffrnet.state_dict()[key], tensor), key
    assert not torch.equal(done.mixer.queries, start.mixer.queries)


def test_samples_are_drawn_as_trained(run):
    """With an FFRNet that would change every picture, were it run."""
    batch, _ = first_batch(run)
    networks = trainer.average_networks(run)
    pictures = sample(run, batch, *networks)

    tokens = networks[0](batch.embeddings[:1, None], encode_crops(run.frozen, batch.clip_pixels)[:1, None])
    wanted = drawn_with_tokens_in_text(
        run.frozen.pipe,
        batch.captions[0],
        tokens,
        32,
        num_inference_steps=run.config.sample_steps,
        guidance_scale=run.config.sample_scale,
        generator=torch.Generator().manual_seed(run.config.seed),
        output_type="np",
    )
    np.testing.assert_allclose(pictures[0] / 255, wanted, atol=1.01 / 255)
