"""Sample images, generated with the networks in training exactly as at inference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from facesnap_ext.conditioning import Conditioning
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts.diffusers import conditioned
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_lab.rivals.method import Rival
from facesnap_lab.training.data import Batch, collate
from facesnap_lab.training.networks import append_tokens
from facesnap_lab.training.objective import decode_latents, encode_clip
from facesnap_lab.training.rival_objective import condition_rival, encode_text
from facesnap_lab.training.run import Run


def save_samples(run: Run, step: int, networks: nn.Module, board: Any) -> None:
    """Save a grid of reference | landmark image | sample, one row for each of the run's first images.

    Args:
        board: TensorBoard's writer, or None.
    """
    batch = collate([run.images[row] for row in range(min(run.config.sample_count, len(run.images.index)))])
    samples = generate_samples(run, batch.to(run.accelerator.device), networks)
    side = run.config.resolution
    rows = []
    for reference, landmark_image, sample in zip(batch.references, batch.landmark_images, samples):
        pixels = (255 * landmark_image.permute(1, 2, 0)).byte().numpy()
        resized = Image.fromarray(pixels).resize((side, side))
        rows.append(np.concatenate([reference.numpy(), np.asarray(resized), sample], axis=1))
    grid = np.concatenate(rows)
    folder = run.config.out / "samples"
    try:
        folder.mkdir(exist_ok=True)
        Image.fromarray(grid).save(folder / f"step-{step:07d}.png")
    except OSError as error:
        raise FaceSnapError(
            f"The sample images cannot be written to {folder} ({error}): free some disk space and resume."
        ) from error
    if board is not None:
        board.add_image("samples", grid, step, dataformats="HWC")


@torch.no_grad()
def generate_samples(run: Run, batch: Batch, networks: nn.Module) -> list[np.ndarray]:
    """Generate one image per caption with its reference and landmarks, as at inference: N × [H,W,3] uint8."""
    config, frozen = run.config, run.frozen
    _, null_pooled = frozen.text.null
    apply = _rival_applier(run, batch, networks) if isinstance(networks, Rival) else _applier(run, batch, networks)
    samples = []
    for i, caption in enumerate(batch.captions):
        _, pooled = frozen.text([caption])
        landmarks = None
        if config.landmarks == "drawn":
            landmarks = Landmarks(batch.points[i].cpu().numpy(), config.resolution, config.resolution)
        with apply(i, landmarks) as (prompt, negative_prompt):
            latents = frozen.pipe(
                prompt_embeds=prompt,
                negative_prompt_embeds=negative_prompt,
                pooled_prompt_embeds=pooled,
                negative_pooled_prompt_embeds=null_pooled,
                width=config.resolution,
                height=config.resolution,
                num_inference_steps=config.sample_steps,
                guidance_scale=config.sample_scale,
                generator=torch.Generator().manual_seed(config.seed + i),
                output_type="latent",
            ).images
        pixels = decode_latents(frozen, latents.float())[0].permute(1, 2, 0)
        samples.append((255 * pixels).round().byte().cpu().numpy())
    return samples


Applier = Callable[[int, Landmarks | None], contextlib.AbstractContextManager[tuple[Tensor, Tensor]]]
"""Applies the networks for a row of the batch; see `apply_conditioning`."""


def _applier(run: Run, batch: Batch, networks: nn.Module) -> Applier:
    clip_tokens = encode_clip(run.frozen, batch.clip_pixels).cpu()
    null, _ = run.frozen.text.null

    def apply(i: int, landmarks: Landmarks | None) -> contextlib.AbstractContextManager[tuple[Tensor, Tensor]]:
        tokens = networks.mixer.float()(batch.embeddings[i : i + 1, None].cpu(), clip_tokens[i : i + 1, None])
        conditioning = Conditioning(networks.ffrnet, tokens, landmarks, text_free=run.info.text_free)
        context, _ = run.frozen.text([batch.captions[i]])
        return apply_conditioning(run.frozen.pipe, conditioning, run.config.tokens, context, null)

    return apply


def _rival_applier(run: Run, batch: Batch, rival: Rival) -> Applier:
    frozen, method = run.frozen, type(rival)
    conditioning = condition_rival(batch, frozen, rival, method, 0, 0.0)

    def apply(i: int, landmarks: Landmarks | None) -> contextlib.AbstractContextManager[tuple[Tensor, Tensor]]:
        features = tuple([feature[i : i + 1].cpu() for feature in conditioning.features])
        text, null = (encode_text(frozen, [caption], method).cpu() for caption in (batch.captions[i], None))
        return rival.float().applied(frozen.pipe, features, text, null, landmarks)

    return apply


@contextlib.contextmanager
def apply_conditioning(
    pipe: Any, conditioning: Conditioning, tokens: str, context: Tensor, null: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Apply the conditioning to a pipeline inside the `with` block.

    Args:
        tokens: where the identity tokens go (see `TrainConfig.tokens`): into FFRNet, or appended to both texts.
        context, null: text and null text [N,T,C].

    Yields:
        The text and null text to pass to the pipeline.
    """
    if tokens == "text":
        yield append_tokens(context, conditioning.tokens), append_tokens(null, conditioning.tokens)
    else:
        with conditioned(pipe, conditioning):
            yield context, null
