"""Pictures drawn with the networks in training, as at inference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from facesnap_ext.conditioning import Conditioning
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts.diffusers import conditioned
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.networks.ffrnet import FFRNet
from facesnap_lab.training.data import Batch, collate
from facesnap_lab.training.networks import in_text
from facesnap_lab.training.objective import decode, encode_crops

if TYPE_CHECKING:
    from facesnap_lab.training.trainer import Run


def save_samples(run: Run, step: int, mixer: nn.Module, ffrnet: FFRNet, board: Any) -> None:
    """Reference | landmarks | sample, a row for each of the first pictures of the run."""
    batch = collate([run.pictures[row] for row in range(min(run.config.sample_count, len(run.pictures.index)))])
    pictures = sample(run, batch.to(run.accelerator.device), mixer, ffrnet)
    side = run.config.resolution
    rows = []
    for reference, drawing, picture in zip(batch.references, batch.drawings, pictures):
        drawn = Image.fromarray((255 * drawing.permute(1, 2, 0)).byte().numpy()).resize((side, side))
        rows.append(np.concatenate([reference.numpy(), np.asarray(drawn), picture], axis=1))
    grid = np.concatenate(rows)
    folder = run.config.out / "samples"
    try:
        folder.mkdir(exist_ok=True)
        Image.fromarray(grid).save(folder / f"step-{step:07d}.png")
    except OSError as error:
        raise FaceSnapError(f"No sample can be written to {folder} ({error}): make room and resume.") from error
    board.add_image("samples", grid, step, dataformats="HWC")


@torch.no_grad()
def sample(run: Run, batch: Batch, mixer: nn.Module, ffrnet: FFRNet) -> list[np.ndarray]:
    """Draw each picture's caption with its reference and landmarks, as at inference: N × [H,W,3] uint8."""
    config, frozen = run.config, run.frozen
    tokens = encode_crops(frozen, batch.clip_pixels).cpu()
    null, pooled_null = frozen.text.null
    pictures = []
    for i, caption in enumerate(batch.captions):
        context, pooled = frozen.text([caption])
        landmarks = None
        if config.landmarks == "drawn":
            landmarks = Landmarks(batch.points[i].cpu().numpy(), config.resolution, config.resolution)
        mixed = mixer.float()(batch.embeddings[i : i + 1, None].cpu(), tokens[i : i + 1, None])
        conditioning = Conditioning(ffrnet, mixed, landmarks, text_free=run.info.text_free)
        with steered(frozen.pipe, conditioning, config.tokens, context, null) as (with_text, without):
            latents = frozen.pipe(
                prompt_embeds=with_text,
                negative_prompt_embeds=without,
                pooled_prompt_embeds=pooled,
                negative_pooled_prompt_embeds=pooled_null,
                width=config.resolution,
                height=config.resolution,
                num_inference_steps=config.sample_steps,
                guidance_scale=config.sample_scale,
                generator=torch.Generator().manual_seed(config.seed + i),
                output_type="latent",
            ).images
        pixels = decode(frozen, latents.float())[0].permute(1, 2, 0)
        pictures.append((255 * pixels).round().byte().cpu().numpy())
    return pictures


@contextlib.contextmanager
def steered(
    pipe: Any, conditioning: Conditioning, tokens: str, context: Tensor, null: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """The text and null text [N,T,C] to give to the pipeline while the identity tokens steer it.

    Args:
        tokens: where they go, see `TrainConfig`: into FFRNet, or behind both texts.
    """
    if tokens == "text":
        yield in_text(context, conditioning.tokens), in_text(null, conditioning.tokens)
    else:
        with conditioned(pipe, conditioning):
            yield context, null
