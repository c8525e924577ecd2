"""The gates of the second edition's VAE: PSNR, and what remains of each trait of a person or look.

A pair of images shows the same scene twice, with one trait replaced by another person's. *Kept* is the part of the
pixel difference that the VAE preserves: the projection of the reconstructions' difference on the original one. *Choice*
is the share of reconstructions that are nearer to their own original than to the other one of the pair.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from facesnap_ext.files import atomic_write
from facesnap_lab.miniature.perception import to_tensor
from facesnap_lab.miniature.second.render import SIDE, landmarks, render
from facesnap_lab.miniature.second.vae import Vae, psnr, reconstruct
from facesnap_lab.miniature.second.world import (
    LOOK_TRAITS,
    PERSON_TRAITS,
    Subject,
    exchange_visibly,
    person,
    scene,
    subject,
)
from facesnap_lab.miniature.world import Scene

PSNR, KEPT, CHOICE = 35.0, 0.8, 0.95
TRAITS = PERSON_TRAITS + LOOK_TRAITS
PAIRS = 40


def pair_subjects(count: int = PAIRS) -> dict[str, list[Subject]]:
    """Return the people of the pairs, from the test split: `original`, and with each trait exchanged."""
    originals = [subject("test", index, 0) for index in range(count)]
    subjects = {"original": originals}
    for trait in TRAITS:
        subjects[trait] = [
            exchange_visibly(one, person("test", index + count), trait) for index, one in enumerate(originals)
        ]
    return subjects


def pair_scenes(count: int = PAIRS) -> list[Scene]:
    return [scene(person("test", index), 0) for index in range(count)]


def trait_pairs(count: int = PAIRS, side: int = SIDE) -> dict[str, np.ndarray]:
    """Render pairs of people from the test split: `original` and each trait, [count,S,S,3] uint8."""
    scenes = pair_scenes(count)
    return {
        name: np.stack([r.picture for r in render(subjects, scenes, side)])
        for name, subjects in pair_subjects(count).items()
    }


def trait_pair_points(count: int = PAIRS, side: int = SIDE) -> dict[str, np.ndarray]:
    """Return the landmarks of `trait_pairs`, [count,72,2] pixels each."""
    scenes = pair_scenes(count)
    return {name: landmarks(subjects, scenes, side) for name, subjects in pair_subjects(count).items()}


def cached_trait_pairs(file: Path) -> dict[str, np.ndarray]:
    if not file.exists():
        with atomic_write(file) as part, part.open("wb") as stream:
            arrays: dict[str, Any] = trait_pairs()
            np.savez(stream, **arrays)
    with np.load(file) as stored:
        return dict(stored)


def trait_figures(before: Tensor, changed: Tensor, before_vae: Tensor, changed_vae: Tensor) -> tuple[float, float]:
    """Return the kept part of the difference of pairs [N,3,S,S], and the share of correct choices."""
    difference = (changed - before).flatten(1)
    energy = difference.pow(2).sum(1)
    remaining = ((changed_vae - before_vae).flatten(1) * difference).sum(1)
    towards = ((before_vae - before).flatten(1) * difference).sum(1) / energy
    away = ((changed_vae - changed).flatten(1) * -difference).sum(1) / energy
    right = torch.cat([towards, away]) < 0.5
    return (remaining / energy).mean().item(), right.float().mean().item()


def measure(vae: Vae, test_pictures: np.ndarray, pairs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the VAE's figures, and whether it passes."""
    figures: dict[str, Any] = {"psnr": psnr(vae, to_tensor(np.array(test_pictures[:480:2])))}
    before = to_tensor(pairs["original"])
    before_vae = reconstruct(vae, before)
    for trait in TRAITS:
        changed = to_tensor(pairs[trait])
        visible = (changed - before).abs().amax((1, 2, 3)) > 0.05  # a turned head or hair may hide it
        parts = (before[visible], changed[visible], before_vae[visible], reconstruct(vae, changed[visible]))
        kept, choice = trait_figures(*parts)
        figures[trait] = {"kept": round(kept, 3), "choice": round(choice, 3)}
    figures["passed"] = figures["psnr"] >= PSNR and all(
        figures[trait]["kept"] >= KEPT and figures[trait]["choice"] >= CHOICE for trait in TRAITS
    )
    return figures


def sheet(vae: Vae, pictures: np.ndarray) -> np.ndarray:
    """Return the originals above their reconstructions."""
    again = reconstruct(vae, to_tensor(pictures))
    again_8bit = ((again + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return np.concatenate([np.concatenate(list(row), axis=1) for row in (pictures, again_8bit)])
