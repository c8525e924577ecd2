"""Everything a training run needs, at tiny sizes: an SDXL with its text encoders, and images of people."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from facesnap_ext.networks.mixer import MixerConfig
from facesnap_ext.weights.initialise import initialise
from facesnap_ext.weights.networks import network_hash
from facesnap_lab.training.config import TrainConfig
from facesnap_lab.training.shard_writer import write_shards
from facesnap_lab.training.shards import Sample
from tests.support import tiny
from tests.support.stand_in_pack import stand_in_arcface

SIDE = 32
WORDS = ("a", "photo", "of", "person", "red", "blue", "smiling", "sad", "man", "woman")


def tokenizer(length: int = 12):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(("<s>", "</s>", "<unk>", *WORDS))}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def sdxl(prediction_type: str = "epsilon", seed: int = 0):
    """A pipeline with SDXL's architecture, whose VAE maps 32×32 images to 8×8 latents."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def text(kind, width):
        size = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        ids = {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        return kind(CLIPTextConfig(**size, **ids, projection_dim=20, max_position_embeddings=12))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            **tiny.DIFFUSERS,
            sample_size=8,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=32,
            latent_channels=4,
            scaling_factor=0.13025,
        )
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=text(CLIPTextModel, 16),
            text_encoder_2=text(CLIPTextModelWithProjection, 32),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=unet,
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
            ),
            add_watermarker=False,
        )


def samples(people: int = 5, images_each: int = 3, side: int = SIDE, networks=None):
    """Samples of blurred noise, with a disc as face mask. The result is deterministic."""
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    for person in range(people):
        for number in range(images_each):
            noise = torch.from_numpy(rng.uniform(0, 255, (1, 3, 4, 4)))
            pixels = torch.nn.functional.interpolate(noise, (side, side), mode="bilinear")[0].permute(1, 2, 0)
            centre, radius = side * rng.uniform(0.45, 0.55, 2), side * rng.uniform(0.25, 0.35)
            points = centre + radius * np.stack([np.cos(angles), np.sin(angles)], -1) * rng.uniform(0.5, 1, (72, 1))
            y, x = np.mgrid[:side, :side] + 0.5
            mask = np.hypot(x - centre[0], y - centre[1]) < radius
            yield Sample(
                key=f"{person:06d}-{number:02d}",
                image=pixels.numpy().astype(np.uint8),
                mask=(255 * mask).astype(np.uint8),
                embedding=rng.standard_normal(512).astype(np.float32),
                caption=f"a photo of a {WORDS[4 + (person + number) % 6]} person",
                person=f"person {person}",
                points=points.astype(np.float32),
                box=np.array([*(centre - radius), *(centre + radius)], np.float32),
                networks=networks or {},
            )


def make_start(base: Path, out: Path) -> None:
    mixer = MixerConfig(clip_dim=32, dim=tiny.CONTEXT, id_tokens=4, queries=4, layers=1, feedforward=64, heads=2)
    unet = base / "unet" / "diffusion_pytorch_model.safetensors"
    initialise(unet, out, head_dim=16, size_dim=8, dtype=torch.float32, mixer=mixer)


def make_world(folder: Path) -> Path:
    """Write base, start.safetensors, clip, pack and shards/*.tar, and return the folder."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sdxl().save_pretrained(folder / "base")
    make_start(folder / "base", folder / "start.safetensors")
    (folder / "pack").mkdir()
    stand_in_arcface(folder / "pack" / "recognition.onnx", 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        CLIPVisionModel(CLIPVisionConfig(**size, image_size=28, patch_size=14)).save_pretrained(folder / "clip")
    networks = {"face_pack": network_hash("face_pack", folder / "pack")}
    write_shards(folder / "shards", samples(networks=networks), per_shard=6)
    return folder


def train_config(world: Path, out: Path) -> TrainConfig:
    """A configuration for four steps with the files of `make_world`."""
    return TrainConfig(
        base=world / "base",
        start=world / "start.safetensors",
        clip=world / "clip",
        face_pack=world / "pack",
        shards=tuple(sorted((world / "shards").glob("*.tar"))),
        out=out,
        resolution=SIDE,
        batch_size=2,
        steps=4,
        learning_rate=1e-3,
        warmup=2,
        ema=0.9,
        id_rows=1,
        lightning_steps=2,
        mixed_precision="no",
        gradient_checkpointing=False,
        workers=0,
        log_every=1,
        save_every=2,
        sample_every=0,
        sample_count=2,
        sample_steps=2,
    )


def generate_with_tokens_in_text(pipe, prompt, tokens, side, **settings):
    """The image that diffusers generates with identity tokens [1,T,C] appended to prompt and negative prompt."""
    context, null, pooled, null_pooled = pipe.encode_prompt(prompt)
    return pipe(
        prompt_embeds=torch.cat([context, tokens], 1),
        negative_prompt_embeds=torch.cat([null, tokens], 1),
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=null_pooled,
        width=side,
        height=side,
        **settings,
    ).images[0]
