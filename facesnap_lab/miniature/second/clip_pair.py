"""The second edition's CLIP, whose image tokens carry the details that the identity network does not.

As in CLIP, images are compared with the captions of the batch. In addition, each image is compared with a short text
for every word of every part of `details.PARTS`: all words of a part but one are hard negatives, so every detail counts.
An image has 257 tokens, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from facesnap_ext.identity.clip import MEAN, STD, preprocess
from facesnap_ext.identity.faces import square_crop
from facesnap_lab.miniature.clip_pair import embeddings, windows
from facesnap_lab.miniature.perception import degrade, warp
from facesnap_lab.miniature.second import probes
from facesnap_lab.miniature.second.dataset import SHOTS, World
from facesnap_lab.miniature.second.details import IDS, PARTS, PHRASES, TEXT_LENGTH, caption, describe, token_ids
from facesnap_lab.miniature.second.loop import CPU, Compute, fit, load_state, prepared
from facesnap_lab.miniature.second.world import person, scene, subject
from facesnap_lab.miniature.words import BEGIN, END

IMAGE_SIZE, PATCH = 128, 8
MENTIONED = 8  # parts in a caption
STEPS, BATCH, RATE, SEED = 2500, 48, 1.5e-3, 5
AHEAD, DETAILS = 0.2, 3  # the gate: R² ahead of the identity network's, on at least so many traits


def new_clip(image_size: int = IMAGE_SIZE) -> Any:
    """Create an untrained transformers CLIPModel."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": len(IDS),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TEXT_LENGTH,
        "projection_dim": 128,
        "hidden_act": "gelu",
        "bos_token_id": IDS[BEGIN],
        "eos_token_id": IDS[END],
        "pad_token_id": IDS[END],
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": image_size,
        "patch_size": PATCH,
        "projection_dim": 128,
        "hidden_act": "gelu",
    }
    # CLIP's initialisation has a standard deviation of 0.02 at its widths, and should have a larger one at these widths
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128, initializer_factor=2.0))
    clip.logit_scale.data.fill_(np.log(10.0))
    return clip


def descriptions(split: str, rows: Iterable[int]) -> np.ndarray:
    """Return the words of some images of a split, [N,parts], as in `details.describe`."""
    shots = (divmod(int(row), SHOTS) for row in rows)
    return np.array([describe(subject(split, i, shot), scene(person(split, i), shot)) for i, shot in shots])


def word_logits(clip: Any, images: Tensor, phrases: Tensor) -> list[Tensor]:
    """Return the logits of each part's words, [N,words] per part, from normalised embeddings."""
    logits = clip.logit_scale.exp().clamp(max=100) * images @ phrases.T
    return list(logits.split([len(words) for _, words in PARTS.values()], 1))


def train(world: World, out: Path, *, minutes: float, compute: Compute = CPU) -> tuple[Any, int]:
    """Train or resume the pair on the images of the train split that exist so far; return it with its steps."""
    torch.manual_seed(SEED)
    side, device, batch = world.pictures.shape[1], compute.device, BATCH * compute.batch
    clip = new_clip(side).to(device).train()
    answers = descriptions("train", range(len(world.pictures)))
    phrases = torch.tensor(token_ids(PHRASES)).to(device)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))

    def draw(step: int) -> tuple[Tensor, Tensor, Tensor]:
        random = np.random.default_rng([SEED, step])
        rows = np.sort(random.integers(0, len(answers), batch))
        pictures = warp(degrade(np.array(world.pictures[rows]), random, 0.3), windows(batch, random, side), side)
        pixels = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - mean) / std
        mentioned = [random.permutation(len(PARTS))[:MENTIONED] for _ in rows]
        ids = torch.tensor(token_ids([caption(answers[row], parts) for row, parts in zip(rows, mentioned)]))
        return pixels, ids, torch.from_numpy(answers[rows])

    batch_of = prepared(draw, compute.threads)

    def loss_of(step: int) -> Tensor:
        pixels, ids, right = (part.to(device) for part in batch_of(step))
        with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):  # not faster on a CPU
            images, texts = embeddings(clip, pixels, ids)
            words = clip.text_projection(clip.text_model(input_ids=phrases).pooler_output)
        images, texts, words = (F.normalize(part.float()) for part in (images, texts, words))
        logits = clip.logit_scale.exp().clamp(max=100) * images @ texts.T
        own = torch.arange(batch, device=device)
        by_caption = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        by_word = [F.cross_entropy(found, right[:, i]) for i, found in enumerate(word_logits(clip, images, words))]
        return 0.25 * by_caption + torch.stack(by_word).mean()

    done = fit(clip, loss_of, out, steps=STEPS, minutes=minutes, rate=RATE, decay=0.05, compute=compute)
    load_state(out, clip)
    return clip.cpu().eval(), done


@torch.no_grad()
def tokens(clip: Any, world: World, rows: np.ndarray) -> Tensor:
    """Return the image tokens [R,T,W] that condition FaceSnap: the penultimate layer's, of FaceSnap's crops."""
    parts = []
    for part in np.array_split(rows, max(1, len(rows) // 64)):
        pixels = _crops(world, part).to(clip.device)
        parts.append(clip.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2].cpu())
    return torch.cat(parts)


def features(clip: Any, world: World, rows: np.ndarray) -> Tensor:
    """Return the class token and the mean of the other tokens, [R,2·W]."""
    found = tokens(clip, world, rows)
    return torch.cat([found[:, 0], found[:, 1:].mean(1)], 1)


def _crops(world: World, rows: np.ndarray) -> Tensor:
    crops = [square_crop(np.array(world.pictures[row]), world.boxes[row]) for row in rows]
    return preprocess(crops, world.pictures.shape[1])


@torch.no_grad()
def measure(
    clip: Any, fit: tuple[str, World], test: tuple[str, World], identity: dict[str, Any], images: int = 600
) -> dict[str, Any]:
    """Return the figures, and whether CLIP passes.

    Args:
        identity: the identity network's figures, with its R² on the same people.
    """
    scores = probes.probe(lambda world, rows: features(clip, world, rows), fit, test)
    ahead = {trait: round(score - identity[f"{trait} R2"], 3) for trait, score in scores.items()}
    figures: dict[str, Any] = {f"{trait} R2": score for trait, score in scores.items()}
    figures["ahead"] = [trait for trait, lead in ahead.items() if lead >= AHEAD]
    figures |= _word_accuracy(clip, *test, images)
    figures["passed"] = len(figures["ahead"]) >= DETAILS
    return figures


def _word_accuracy(clip: Any, split: str, world: World, images: int) -> dict[str, float]:
    """Return how often an image is closest to the right word of each part."""
    rows = np.unique(np.linspace(0, len(world.pictures) - 1, images).astype(int))
    answers = torch.from_numpy(descriptions(split, rows))
    phrases = torch.tensor(token_ids(PHRASES)).to(clip.device)
    crops = (_crops(world, part).to(clip.device) for part in np.array_split(rows, 10))
    found, words = zip(*(embeddings(clip, part, phrases) for part in crops))
    logits = [part.cpu() for part in word_logits(clip, F.normalize(torch.cat(found)), F.normalize(words[0]))]
    return {
        f"{part} words": round((part_logits.argmax(1) == answers[:, i]).float().mean().item(), 3)
        for i, (part, part_logits) in enumerate(zip(PARTS, logits))
    }
