"""Train the miniature's CLIP: an image and a text encoder that agree on what a picture shows.

    python -m facesnap_ext.miniature.clip_pair --data DIR --out DIR

Source: Radford et al., "Learning transferable visual models from natural language supervision" (2021). Besides the
other captions of its batch each picture is told from its own caption with one thing changed, so that small words count.
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
from facesnap_lab.miniature.perception import damage, fit, warp, write_figures
from facesnap_lab.miniature.words import BEGIN, END, padded_ids, vocabulary_ids

IMAGE_SIZE, PATCH = 64, 8
TEXT_LENGTH = 28  # the longest caption, with its commas, begin and end

_CAPTION = re.compile(
    r"portrait of a (?P<expression>\w+) person in a (?P<clothes>\w+) shirt, (?P<background>\w+) background, "
    r"light from (?P<light>\w+), with (?:(?P<hair>short|long) (?P<hair_colour>\w+) hair|bald)(?P<rest>.*)"
)
CHOICES: dict[str, tuple[str, ...]] = {
    "expression": EXPRESSIONS,
    "clothes": tuple(COLOURS),
    "background": tuple(COLOURS),
    "light": LIGHTS,
    "hair": HAIR,
    "hair_colour": HAIR_COLOURS,
}


@dataclass(frozen=True)
class Said:
    """What a caption for CLIP says."""

    expression: str
    clothes: str
    background: str
    light: str
    hair: str
    hair_colour: str  # of the bald, whose caption has none: black
    rest: str  # beard, glasses

    @property
    def caption(self) -> str:
        hair = "bald" if self.hair == "bald" else f"{self.hair} {self.hair_colour} hair"
        return (
            f"portrait of a {self.expression} person in a {self.clothes} shirt, {self.background} background, "
            f"light from {self.light}, with {hair}{self.rest}"
        )


def read(caption: str) -> Said:
    """Take a caption apart."""
    found = _CAPTION.fullmatch(caption)
    if found is None:
        raise ValueError(f"no caption for CLIP: {caption}")
    parts = found.groupdict()
    return Said(**parts | {"hair": parts["hair"] or "bald", "hair_colour": parts["hair_colour"] or "black"})


def others(said: Said, what: str) -> list[Said]:
    """What would be said if one thing were different, each way once."""
    if what == "hair_colour" and said.hair == "bald":
        return []
    return [replace(said, **{what: word}) for word in CHOICES[what] if word != getattr(said, what)]


def _changed(said: Said, random: np.random.Generator) -> str:
    """Its caption with one thing different: in half of all cases the expression, which is the hardest to see."""
    what = "expression" if random.random() < 0.5 else list(CHOICES)[random.integers(len(CHOICES))]
    wrong = others(said, what) or others(said, "expression")
    return wrong[random.integers(len(wrong))].caption


def new_clip() -> Any:
    """An untrained transformers CLIPModel; vision 64 px in 65 tokens of 96, text of one token a word."""
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
    # initialisation as CLIP has it, which for its widths is 0.02 and for these is larger
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, initializer_factor=2.0))


def token_ids(captions: list[str]) -> Tensor:
    """[N,28] begin, words and commas, end, and the end again as padding; what is longer is cut off."""
    return torch.tensor(padded_ids(captions, TEXT_LENGTH))


def train(
    data: Path, minutes: float, start: Path | None = None, batch: int = 64, rate: float = 2e-3, seed: int = 5
) -> tuple[Any, int]:
    """The trained pair and its steps; `start` is the folder of an earlier training, to go on from at half the rate."""
    from transformers import CLIPModel

    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    world = dataset.load(data / "train")
    said = [read(caption) for caption in world.clip_captions]
    clip = new_clip()
    clip.logit_scale.data.fill_(np.log(10.0))
    if start is not None:
        clip, rate = CLIPModel.from_pretrained(start, dtype=torch.float32), rate / 2
    clip.train()
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))

    def loss_of(done: float) -> Tensor:
        rows = np.sort(random.integers(0, len(said), batch))
        pictures = warp(damage(world.pictures[rows], random, 0.3), _windows(world.boxes[rows], random), IMAGE_SIZE)
        pixels = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - mean) / std
        ids = token_ids(
            [said[row].caption for row in rows] + [_changed(said[row], random) for row in rows for _ in "12"]
        )
        seen, told = (F.normalize(half) for half in embeddings(clip, pixels, ids))
        logits = clip.logit_scale.exp().clamp(max=100) * seen @ told.T  # [N,3N], own captions first
        own = torch.arange(batch)
        by_picture = F.cross_entropy(logits, own)
        by_text = F.cross_entropy(logits[:, :batch].T, own)
        changed = logits[:, batch:].unflatten(1, (batch, 2))[own, own]
        small = F.cross_entropy(torch.cat([logits.diagonal()[:, None], changed], 1), torch.zeros_like(own))
        return (by_picture + by_text) / 2 + small

    steps = fit([clip], loss_of, minutes, rate, decay=0.05)
    return clip.eval(), steps


def embeddings(clip: Any, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of pictures [N,64] and of texts [M,64], not normalised."""
    seen = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    return seen, clip.text_projection(clip.text_model(input_ids=ids).pooler_output)


def _windows(boxes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """[N,2,3] from pictures to windows about as FaceSnap's `square_crop` cuts them, a little larger or smaller."""
    side = IMAGE_SIZE * random.uniform(0.86, 1.03, len(boxes))
    corner = (IMAGE_SIZE - side)[:, None] * random.uniform(0, 1, (len(boxes), 2))
    scale = IMAGE_SIZE / side
    moves = np.zeros((len(boxes), 2, 3))
    moves[:, 0, 0] = moves[:, 1, 1] = scale
    moves[:, :, 2] = -scale[:, None] * corner + (scale[:, None] - 1) / 2
    return moves


@torch.no_grad()
def right_words(clip: Any, pixels: Tensor, said: list[Said]) -> dict[str, float]:
    """For each thing that captions speak of, how often the picture is nearer to its own caption than to all that differ
    from it in this one word; `pixels` [N,3,64,64] as `clip.preprocess` gives them."""
    figures = {}
    for what in CHOICES:
        right = []
        for i, one in enumerate(said):
            if wrong := others(one, what):
                seen, words = embeddings(
                    clip, pixels[i : i + 1], token_ids([one.caption, *(other.caption for other in wrong)])
                )
                right.append(int((F.normalize(words) @ F.normalize(seen)[0]).argmax()) == 0)
        figures[what] = float(np.mean(right))
    return figures


@torch.no_grad()
def evaluate(clip: Any, data: Path, count: int = 600) -> dict[str, float]:
    """Of test pictures, cut as FaceSnap cuts them: how often the right caption wins over all with another word."""
    test = dataset.load(data / "test")
    rows = np.linspace(0, len(test.pictures) - 1, count).astype(int)
    crops = [square_crop(np.array(test.pictures[row]), test.boxes[row]) for row in rows]
    said = [read(test.clip_captions[row]) for row in rows]
    pixels = preprocess(crops, IMAGE_SIZE)
    figures = right_words(clip, pixels, said)
    figures |= {f"{what}_by_chance": 1 / len(words) for what, words in CHOICES.items()}
    seen, words = embeddings(clip, pixels, token_ids([one.caption for one in said]))
    cosines = F.normalize(seen) @ F.normalize(words).T
    figures["own_caption_of_600"] = (cosines.argmax(1) == torch.arange(count)).float().mean().item()
    figures["cosine_own"], figures["cosine_others"] = cosines.diagonal().mean().item(), cosines.mean().item()
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the miniature's CLIP.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--start", type=Path, help="the folder of an earlier training, to go on from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trained, steps = train(arguments.data, arguments.minutes, arguments.start)
    trained.half().save_pretrained(arguments.out / "clip")
    write_figures(arguments.out, "clip", {"steps": steps, **evaluate(trained.float(), arguments.data)})
