"""Train the miniature's CLIP: an image and a text encoder whose embeddings match for an image and its caption.

    python -m facesnap_lab.miniature.clip_pair --data DIR --out DIR

Source: Radford et al., "Learning transferable visual models from natural language supervision" (2021). In addition to
the other captions in the batch, each image has its own caption with one word changed as a negative, so that single
words matter.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from facesnap_ext.identity.clip import MEAN, STD, preprocess
from facesnap_ext.identity.faces import square_crop
from facesnap_lab.miniature import dataset
from facesnap_lab.miniature.captions import COLOURS, EXPRESSIONS, HAIR, HAIR_COLOURS, LIGHTS
from facesnap_lab.miniature.perception import degrade, fit, warp, write_figures
from facesnap_lab.miniature.words import BEGIN, END, padded_ids, vocabulary_ids

IMAGE_SIZE, PATCH = 64, 8
TEXT_LENGTH = 28  # longest caption, including commas and the begin and end tokens

_CAPTION = re.compile(
    r"portrait of a (?P<expression>\w+) person in a (?P<clothes>\w+) shirt, (?P<background>\w+) background, "
    r"light from (?P<light>\w+), with (?:(?P<hair>short|long) (?P<hair_colour>\w+) hair|bald)(?P<rest>.*)"
)
PART_VALUES: dict[str, tuple[str, ...]] = {
    "expression": EXPRESSIONS,
    "clothes": tuple(COLOURS),
    "background": tuple(COLOURS),
    "light": LIGHTS,
    "hair": HAIR,
    "hair_colour": HAIR_COLOURS,
}


@dataclass(frozen=True)
class CaptionParts:
    """The parts of a caption for CLIP."""

    expression: str
    clothes: str
    background: str
    light: str
    hair: str
    hair_colour: str  # black for bald people, whose captions do not name a colour
    rest: str  # beard and glasses

    @property
    def caption(self) -> str:
        hair = "bald" if self.hair == "bald" else f"{self.hair} {self.hair_colour} hair"
        return (
            f"portrait of a {self.expression} person in a {self.clothes} shirt, {self.background} background, "
            f"light from {self.light}, with {hair}{self.rest}"
        )


def parse_caption(caption: str) -> CaptionParts:
    """Parse a caption for CLIP into its parts."""
    found = _CAPTION.fullmatch(caption)
    if found is None:
        raise ValueError(f"not a caption for CLIP: {caption}")
    parts = found.groupdict()
    return CaptionParts(**parts | {"hair": parts["hair"] or "bald", "hair_colour": parts["hair_colour"] or "black"})


def variants(caption: CaptionParts, part: str) -> list[CaptionParts]:
    """Return all captions that differ in one part only."""
    if part == "hair_colour" and caption.hair == "bald":
        return []
    return [replace(caption, **{part: word}) for word in PART_VALUES[part] if word != getattr(caption, part)]


def _negative(caption: CaptionParts, random: np.random.Generator) -> str:
    """Return the caption with one part changed: half of the time the expression, which is the hardest to see."""
    part = "expression" if random.random() < 0.5 else list(PART_VALUES)[random.integers(len(PART_VALUES))]
    wrong = variants(caption, part) or variants(caption, "expression")
    return wrong[random.integers(len(wrong))].caption


def new_clip() -> Any:
    """Create an untrained transformers CLIPModel: images of 64 px as 65 tokens of 96, text with one token per word."""
    from transformers import CLIPConfig, CLIPModel

    ids = vocabulary_ids()
    text = {
        "vocab_size": len(ids),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TEXT_LENGTH,
        "projection_dim": 64,
        "hidden_act": "gelu",
        "bos_token_id": ids[BEGIN],
        "eos_token_id": ids[END],
        "pad_token_id": ids[END],
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "projection_dim": 64,
        "hidden_act": "gelu",
    }
    # CLIP's initialisation has a standard deviation of 0.02 at its widths, and should have a larger one at these widths
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, initializer_factor=2.0))


def token_ids(captions: list[str]) -> Tensor:
    """Tokenise captions to [N,28]: begin, words and commas, end, then end again as padding; truncate longer ones."""
    return torch.tensor(padded_ids(captions, TEXT_LENGTH))


def train(
    data: Path, minutes: float, start: Path | None = None, batch: int = 64, rate: float = 2e-3, seed: int = 5
) -> tuple[Any, int]:
    """Train the pair and return it with the number of steps.

    Args:
        start: folder of an earlier training run to continue at half the learning rate.
    """
    from transformers import CLIPModel

    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    world = dataset.load(data / "train")
    captions = [parse_caption(caption) for caption in world.clip_captions]
    clip = new_clip()
    clip.logit_scale.data.fill_(np.log(10.0))
    if start is not None:
        clip, rate = CLIPModel.from_pretrained(start, dtype=torch.float32), rate / 2
    clip.train()
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))

    def loss_of(done: float) -> Tensor:
        rows = np.sort(random.integers(0, len(captions), batch))
        pictures = warp(degrade(world.pictures[rows], random, 0.3), windows(batch, random, IMAGE_SIZE), IMAGE_SIZE)
        pixels = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - mean) / std
        ids = token_ids(
            [captions[row].caption for row in rows] + [_negative(captions[row], random) for row in rows for _ in "12"]
        )
        images, texts = (F.normalize(half) for half in embeddings(clip, pixels, ids))
        logits = clip.logit_scale.exp().clamp(max=100) * images @ texts.T  # [N,3N], own captions first
        own = torch.arange(batch)
        by_image = F.cross_entropy(logits, own)
        by_text = F.cross_entropy(logits[:, :batch].T, own)
        negatives = logits[:, batch:].unflatten(1, (batch, 2))[own, own]
        by_word = F.cross_entropy(torch.cat([logits.diagonal()[:, None], negatives], 1), torch.zeros_like(own))
        return (by_image + by_text) / 2 + by_word

    steps = fit([clip], loss_of, minutes, rate, decay=0.05)
    return clip.eval(), steps


def embeddings(clip: Any, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Embed images [N,64] and texts [M,64], not normalised."""
    images = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    return images, clip.text_projection(clip.text_model(input_ids=ids).pooler_output)


def windows(count: int, random: np.random.Generator, size: int) -> np.ndarray:
    """Return transforms [N,2,3] of images with `size` pixels to windows similar to FaceSnap's `square_crop`, but
    slightly larger or smaller."""
    side = size * random.uniform(0.86, 1.03, count)
    corner = (size - side)[:, None] * random.uniform(0, 1, (count, 2))
    scale = size / side
    moves = np.zeros((count, 2, 3))
    moves[:, 0, 0] = moves[:, 1, 1] = scale
    moves[:, :, 2] = -scale[:, None] * corner + (scale[:, None] - 1) / 2
    return moves


@torch.no_grad()
def word_accuracy(clip: Any, pixels: Tensor, captions: list[CaptionParts]) -> dict[str, float]:
    """Return, for each caption part, how often an image is closer to its own caption than to all its variants.

    Args:
        pixels: [N,3,64,64] as returned by `clip.preprocess`.
    """
    figures = {}
    for part in PART_VALUES:
        right = []
        for i, one in enumerate(captions):
            if wrong := variants(one, part):
                image, texts = embeddings(
                    clip, pixels[i : i + 1], token_ids([one.caption, *(other.caption for other in wrong)])
                )
                right.append(int((F.normalize(texts) @ F.normalize(image)[0]).argmax()) == 0)
        figures[part] = float(np.mean(right))
    return figures


@torch.no_grad()
def evaluate(clip: Any, data: Path, count: int = 600) -> dict[str, float]:
    """Return `word_accuracy` on test images cropped as FaceSnap crops them, chance levels, and retrieval figures."""
    test = dataset.load(data / "test")
    rows = np.linspace(0, len(test.pictures) - 1, count).astype(int)
    crops = [square_crop(np.array(test.pictures[row]), test.boxes[row]) for row in rows]
    captions = [parse_caption(test.clip_captions[row]) for row in rows]
    pixels = preprocess(crops, IMAGE_SIZE)
    figures = word_accuracy(clip, pixels, captions)
    figures |= {f"{part}_by_chance": 1 / len(words) for part, words in PART_VALUES.items()}
    images, texts = embeddings(clip, pixels, token_ids([one.caption for one in captions]))
    cosines = F.normalize(images) @ F.normalize(texts).T
    figures["own_caption_of_600"] = (cosines.argmax(1) == torch.arange(count)).float().mean().item()
    figures["cosine_own"], figures["cosine_others"] = cosines.diagonal().mean().item(), cosines.mean().item()
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the miniature's CLIP.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--start", type=Path, help="folder of an earlier training run to continue")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trained, steps = train(arguments.data, arguments.minutes, arguments.start)
    trained.half().save_pretrained(arguments.out / "clip")
    write_figures(arguments.out, "clip", {"steps": steps, **evaluate(trained.float(), arguments.data)})
