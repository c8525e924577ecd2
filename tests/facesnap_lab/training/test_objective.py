"""The objective: its gradients, its inputs, and its shapes at SDXL's full size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from facesnap_ext.conditioning import Conditioning
from facesnap_ext.hosts.diffusers import conditioned
from facesnap_ext.identity.clip import ImageEncoder
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.networks.ffrnet import FFRNet, FFRNetConfig
from facesnap_ext.networks.mixer import FacialAttributeMixer, MixerConfig
from facesnap_ext.residuals import landmark_image
from facesnap_lab.training.arcface import ArcFace
from facesnap_lab.training.data import Batch, collate
from facesnap_lab.training.frozen import Frozen
from facesnap_lab.training.lightning import FewStep
from facesnap_lab.training.networks import TrainedNetworks
from facesnap_lab.training.objective import (
    BatchConditioning,
    Objective,
    compute_losses,
    draw_random_inputs,
    encode_clip,
    generate_portraits,
)
from facesnap_lab.training.prepare import prepare_run
from facesnap_lab.training.run import Run
from tests.support.stand_in_pack import stand_in_arcface


def first_batch(run: Run):
    batch = collate([run.images[row] for row in range(run.config.batch_size)])
    return batch, draw_random_inputs(0, batch.rows.tolist(), (4, 8, 8))


def compute(run: Run, id_rows: int, **changes):
    batch, inputs = first_batch(run)
    return compute_losses(batch, inputs, run.networks, run.frozen, replace(run.objective, **changes), id_rows)


@pytest.fixture
def run(config, random_start):
    return prepare_run(replace(config, start=random_start))


@pytest.mark.parametrize("part", ["id", "diffusion"])
def test_gradients_reach_every_trained_parameter_and_no_frozen_one(run, part):
    getattr(compute(run, 1), part).backward()
    without_gradient = [name for name, p in run.networks.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without_gradient
    frozen = run.frozen
    for network in (frozen.unet, frozen.vae, frozen.clip, frozen.arcface, frozen.pipe.text_encoder):
        assert all(not p.requires_grad and p.grad is None for p in network.parameters())


def test_total_loss_is_eq_5(run):
    losses = compute(run, 2, id_weight=0.25)
    torch.testing.assert_close(losses.total, losses.diffusion + 0.25 * losses.id)
    assert compute(run, 0).id is None


def test_errors_outside_the_face_are_weighted_by_the_squared_mask_value(run):
    """The mask is 1 in the left half and 0.5 in the right half."""
    batch, inputs = first_batch(run)
    left = torch.zeros_like(batch.masks)
    left[..., : left.shape[-1] // 2] = 1

    def loss(masks, outside):
        objective = replace(run.objective, outside=outside)
        return compute_losses(replace(batch, masks=masks), inputs, run.networks, run.frozen, objective, 0).diffusion

    inside, outside = loss(left, 0), loss(1 - left, 0)
    torch.testing.assert_close(loss(left, 0.5), (inside + 0.25 * outside) / 1.25)
    torch.testing.assert_close(loss(left, 1), loss(torch.ones_like(left), 0))


def test_losses_with_an_empty_mask_have_no_gradient(run):
    batch, inputs = first_batch(run)
    empty = replace(batch, masks=torch.zeros_like(batch.masks))
    compute_losses(empty, inputs, run.networks, run.frozen, run.objective, 1).total.backward()
    assert not any(p.grad.any() for p in run.networks.parameters() if p.grad is not None)


def test_null_text_is_that_of_the_pipeline_at_inference(run):
    null, pooled = run.frozen.text([None])
    _, expected, _, expected_pooled = run.frozen.pipe.encode_prompt("a photo", do_classifier_free_guidance=True)
    assert torch.equal(null, expected)
    assert torch.equal(pooled, expected_pooled)
    assert run.frozen.pipe.config.force_zeros_for_empty_prompt
    assert null.abs().max() == 0
    context, pooled = run.frozen.text(["a photo of a person", "a red person"])
    expected, _, expected_pooled, _ = run.frozen.pipe.encode_prompt(
        ["a photo of a person", "a red person"], do_classifier_free_guidance=False
    )
    torch.testing.assert_close(context, expected)
    torch.testing.assert_close(pooled, expected_pooled)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_lightning_branch_generates_the_same_image_as_the_pipeline(run, scale):
    """Compare with diffusers' sampler and guidance, with FaceSnap applied as at inference."""
    from diffusers import EulerDiscreteScheduler

    batch, inputs = first_batch(run)
    side = batch.images.shape[-1]
    landmarks = Landmarks(batch.points[0].numpy(), side, side)
    without_jitter = landmark_image(landmarks, *batch.landmark_images.shape[:1:-1])
    batch = replace(batch, landmark_images=without_jitter)
    objective = replace(run.objective, lightning_steps=3, lightning_scale=scale)
    clip_tokens = encode_clip(run.frozen, batch.clip_pixels)
    with torch.no_grad():
        actual = generate_portraits(
            batch, inputs, BatchConditioning(batch, clip_tokens, run.networks, objective), run.frozen, objective, 1
        )
        tokens = run.networks.mixer(batch.embeddings[:1, None], clip_tokens[:1, None])
    conditioning = Conditioning(run.networks.ffrnet, tokens, landmarks)
    pipe = run.frozen.pipe
    scheduler = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    try:
        with conditioned(pipe, conditioning):
            expected = pipe(
                batch.captions[0],
                width=side,
                height=side,
                num_inference_steps=3,
                guidance_scale=scale,
                latents=inputs.initial[:1].clone(),
                output_type="pt",
            ).images
    finally:
        pipe.scheduler = scheduler
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_captions_are_dropped_with_the_given_probability(run, monkeypatch):
    encoded = []
    encode = run.frozen.text
    monkeypatch.setattr(
        type(encode), "__call__", lambda self, captions: encoded.append(list(captions)) or encode_all(captions)
    )

    def encode_all(captions):
        rows = [encode.null if c is None else encode._cached(c) for c in captions]
        return tuple(torch.cat(column) for column in zip(*rows))

    for probability in (0.0, 1.0):
        compute(run, 0, drop_text=probability)
    assert all(encoded[0])
    assert encoded[1] == [None, None]
    dropped = sum(u < 0.1 for u in draw_random_inputs(0, range(2000), (1, 1, 1)).text) / 2000
    assert 0.07 < dropped < 0.13


def test_random_inputs_depend_only_on_the_row():
    together, separate = (
        draw_random_inputs(5, [7, 8], (4, 3, 3)),
        [draw_random_inputs(5, [row], (4, 3, 3)) for row in (7, 8)],
    )
    for name in ("timesteps", "noise", "posterior", "initial"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(one, name) for one in separate]))
    assert not torch.equal(together.noise[0], together.noise[1])
    assert not torch.equal(together.noise, together.initial)
    assert not torch.equal(draw_random_inputs(6, [7], (4, 3, 3)).noise, separate[0].noise)
    timesteps = draw_random_inputs(0, range(500), (1, 1, 1)).timesteps
    assert timesteps.min() < 20
    assert 980 <= timesteps.max() <= 999


def test_files_trained_with_text_receive_text(run):
    text_free, with_text = compute(run, 0), compute(run, 0, text_free=False)
    assert text_free.total != with_text.total


def test_new_start_file_has_no_effect(config):
    """While the zero convolutions are zero, the loss equals the base's loss."""
    run = prepare_run(config)
    batch, inputs = first_batch(run)
    losses = compute_losses(batch, inputs, run.networks, run.frozen, run.objective, 0)
    other = replace(batch, landmark_images=1 - batch.landmark_images, embeddings=-batch.embeddings)
    changed = compute_losses(other, inputs, run.networks, run.frozen, run.objective, 0)
    torch.testing.assert_close(losses.total, changed.total)


def test_activation_checkpointing_does_not_change_gradients(config, random_start):
    gradients = []
    for checkpointed in (False, True):
        run = prepare_run(
            replace(config, start=random_start, gradient_checkpointing=checkpointed, out=config.out / str(checkpointed))
        )
        compute(run, 1).total.backward()
        gradients.append({name: p.grad for name, p in run.networks.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_losses_can_be_computed_at_sdxls_full_size(tmp_path):
    """SDXL, its VAE, CLIP-ViT-H, Mixer and FFRNet at 1024 pixels, on the meta device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModel

    stand_in_arcface(tmp_path / "arcface.onnx", 0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.13025,
        )
        clip = ImageEncoder(
            CLIPVisionModel(
                CLIPVisionConfig(
                    hidden_size=1280,
                    intermediate_size=5120,
                    num_hidden_layers=31,
                    num_attention_heads=16,
                    image_size=224,
                    patch_size=14,
                )
            )
        )
        shapes = {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}
        landmark_shapes = {
            f"controlnet_cond_embedding.blocks.{i}.weight": (w, 1, 3, 3)
            for i, w in enumerate((16, 32, 32, 96, 96, 256))
        }
        landmark_shapes["controlnet_cond_embedding.conv_in.weight"] = (16, 3, 3, 3)
        networks = TrainedNetworks(
            FacialAttributeMixer(MixerConfig()), FFRNet(FFRNetConfig.from_shapes({**shapes, **landmark_shapes}))
        )
        text = (torch.zeros(2, 77, 2048), torch.zeros(2, 1280))
        batch = Batch(
            rows=torch.arange(2),
            images=torch.zeros(2, 3, 1024, 1024),
            masks=torch.zeros(2, 1, 128, 128),
            captions=["one", "two"],
            landmark_images=torch.zeros(2, 3, 1024, 1024),
            keypoints=torch.zeros(2, 5, 2),
            embeddings=torch.zeros(2, 512),
            clip_pixels=torch.zeros(2, 3, 224, 224),
            points=torch.zeros(2, 72, 2),
            references=torch.zeros(2, 1024, 1024, 3),
            reference_points=torch.zeros(2, 72, 2),
        )
        alpha_bar = torch.zeros(1000)
    for network in (unet, vae, clip):
        network.requires_grad_(False)
    frozen = Frozen(
        unet=unet,
        vae=vae,
        clip=clip,
        text=lambda captions: tuple(tensor[: len(captions)] for tensor in text),
        alpha_bar=alpha_bar,
        prediction_type="epsilon",
        few_step=FewStep(unet, is_lora=False),
        arcface=ArcFace(tmp_path / "arcface.onnx").to("meta"),
        pipe=None,
    )
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684  # SDXL's
    objective = Objective(True, 256, 0.1, 0.5, lightning_steps=1, lightning_grad_steps=1)
    inputs = draw_random_inputs(0, [0, 1], (4, 128, 128)).to("meta")
    losses = compute_losses(batch, inputs, networks, frozen, objective, id_rows=1)
    losses.total.backward()
    assert losses.total.shape == ()
    for name, parameter in networks.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape


def test_images_start_at_pure_noise_with_the_given_probability_in_any_batch():
    """The numbers are drawn row by row, so that batch size and number of processes do not matter."""
    shape = (4, 2, 2)
    together = draw_random_inputs(3, range(400), shape).terminal
    separate = torch.cat([draw_random_inputs(3, [row], shape).terminal for row in range(400)])
    assert torch.equal(together, separate)
    assert abs((together < 0.3).float().mean() - 0.3) < 0.07
