"""The demo: every stage of FaceSnap on one public-domain photo, side by side in one picture.

The photo and the face detector are real. All other networks are small stand-ins with random weights, so the identity is
none and the pictures are patterns; what the demo shows is that every part runs, and what it hands to the next.
"""

from __future__ import annotations

import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from facesnap_ext import photos
from facesnap_ext.engine import Engine
from facesnap_ext.guidance import landmark_picture
from facesnap_ext.hosts.diffusers import guided
from facesnap_ext.landmarks.points72 import draw
from facesnap_ext.miniature.sheet import Panel, heatmap, sheet
from facesnap_ext.miniature.stand_ins import write_stand_ins
from facesnap_ext.photos import Photo
from facesnap_ext.prepare import framed, overlay
from facesnap_ext.settings import Settings
from facesnap_ext.weights.places import find_models

SIDE = 256
STEPS = 8  # as in the paper, with its guidance scale
GUIDANCE_SCALE = 2.0
CONTEXT, SIZE_DIM, POOLED = 128, 16, 64


def demo(out: Path, progress: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> None:
    """Run every stage and write one picture of them all.

    Args:
        progress: told each stage as it begins.
    """
    _quieten_libraries()
    stages = iter(range(1, 8))

    def begin(stage: str) -> None:
        progress(f"[{next(stages)}/7] {stage}")

    with tempfile.TemporaryDirectory() as folder:
        begin("making stand-in networks")
        pipe = small_sdxl()
        models = Path(folder)
        checkpoint = models / "unet.safetensors"
        _save(pipe.unet, checkpoint)
        write_stand_ins(checkpoint, models / "facesnap", head_dim=32, size_dim=SIZE_DIM, context_dim=CONTEXT, seed=2)
        engine = Engine(lambda: find_models(models / "facesnap"))
        reference, driving = demo_photos()
        settings = Settings(enabled=True, references=(reference,), driving=driving, model="random.safetensors")
        prepared = engine.prepare(settings, SIDE, SIDE, progress=begin)
        files = find_models(models / "facesnap")
        own = engine.landmarks(files, prepared.references[0], prepared.references[0])
        clip_tokens = engine.clip_tokens(files, prepared.references[0])

    begin("sampling without and with FaceSnap")
    guidance = prepared.guidance
    plain = sample(pipe)
    with guided(pipe, guidance):
        picture = sample(pipe)

    begin("drawing")
    face, drive = prepared.references[0], prepared.driving
    with torch.no_grad():
        ffrnet = guidance.ffrnet
        features = ffrnet.embed_landmarks(landmark_picture(guidance.landmarks, SIDE, SIDE))
        x = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(0))
        residuals = ffrnet(x, torch.tensor([500.0]), guidance.tokens, features)
    in_driving = guidance.landmarks.scaled(*drive.photo.pixels.shape[1::-1])  # both are square
    rows = [
        [
            Panel("Reference photo", framed(face), "public domain (NASA); detector: CenterFace"),
            Panel("Face crop", Image.fromarray(face.crop), "goes to CLIP"),
            Panel("ArcFace embedding", heatmap(face.embedding.reshape(16, 32)), f"{face.embedding.size} numbers"),
            Panel("CLIP tokens", heatmap(clip_tokens.numpy()), " x ".join(map(str, clip_tokens.shape))),
            Panel(
                "Identity tokens", heatmap(guidance.tokens[0].numpy()), " x ".join(map(str, guidance.tokens[0].shape))
            ),
        ],
        [
            Panel("Driving photo", framed(drive), "gives pose and expression"),
            Panel("The reference's own points", overlay(face, own), "72 landmarks"),
            Panel("Predicted points", overlay(drive, in_driving), "its shape in the driving pose"),
            Panel(
                "Landmark drawing", Image.fromarray(draw(guidance.landmarks, 2 * SIDE, 2 * SIDE)), "what FFRNet sees"
            ),
            Panel("FFRNet residuals", mosaic(residuals), f"{len(residuals) - 1} skips and the middle"),
        ],
        [
            Panel("Without FaceSnap", plain, f"SDXL-shaped UNet, random; {STEPS} steps, CFG {GUIDANCE_SCALE:g}"),
            Panel("With FaceSnap", picture, "same seed"),
            Panel("Difference", difference(plain, picture), "what the residuals changed"),
        ],
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet("FaceSnap, stage by stage, with stand-in networks", rows).save(out)


def demo_photos() -> tuple[Photo, Photo]:
    """Eileen Collins (NASA, public domain), and the same photo mirrored and tilted to drive."""
    from skimage import data

    image = Image.fromarray(data.astronaut()).crop((64, 0, 384, 320))
    turned = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(-12, Image.Resampling.BICUBIC)
    return photos.from_pil(image, "Eileen Collins"), photos.from_pil(turned, "Eileen Collins, mirrored and tilted")


def small_sdxl(seed: int = 0) -> Any:
    """A diffusers pipeline of SDXL's shape: three levels, added text and sizes; small, with random weights."""
    from diffusers import (
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=SIDE // 8,
            block_out_channels=(32, 64, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 3),
            attention_head_dim=(1, 2, 4),
            cross_attention_dim=CONTEXT,
            addition_embed_type="text_time",
            addition_time_embed_dim=SIZE_DIM,
            projection_class_embeddings_input_dim=POOLED + 6 * SIZE_DIM,
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 64, 64),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            scaling_factor=0.13025,
        )
    no_text = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True)
    return StableDiffusionXLPipeline(
        vae=vae.eval(), unet=unet.eval(), scheduler=scheduler, add_watermarker=False, **no_text
    )


def sample(pipe: Any, seed: int = 0) -> Image.Image:
    g = torch.Generator().manual_seed(seed)
    text, pooled = torch.randn(2, 1, 77, CONTEXT, generator=g), torch.randn(2, 1, POOLED, generator=g)
    return pipe(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        pooled_prompt_embeds=pooled[0],
        negative_pooled_prompt_embeds=pooled[1],
        width=SIDE,
        height=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE_SCALE,
        generator=g,
    ).images[0]


def mosaic(residuals: list[Tensor]) -> Image.Image:
    """Mean magnitude of each residual in rows, shallow to deep."""
    across = math.ceil(len(residuals) ** 0.5)
    cell = SIDE // across
    grid = Image.new("RGB", (SIDE, SIDE))
    for i, residual in enumerate(residuals):
        tile = heatmap(residual[0].abs().mean(dim=0).numpy())
        grid.paste(tile.resize((cell, cell), Image.Resampling.NEAREST), (i % across * cell, i // across * cell))
    return grid


def difference(a: Image.Image, b: Image.Image) -> Image.Image:
    return heatmap(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean(axis=2))


def _save(network: torch.nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(network.state_dict(), path)


def _quieten_libraries() -> None:
    """Leave the console to the stages: other libraries' hints are for their own users."""
    import diffusers
    import transformers

    warnings.simplefilter("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
