"""The gates of the second edition's recognition networks: the individual must be recognised, whatever the look."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.landmarks.points72 import five_points
from facesnap_lab.miniature.second import probes
from facesnap_lab.miniature.second.dataset import SHOTS, World
from facesnap_lab.miniature.second.gates import PAIRS
from facesnap_lab.miniature.second.identity import LOOKS, RECIPES, embed
from facesnap_lab.miniature.second.world import LOOK_TRAITS, PERSON_TRAITS, SHOTS_PER_LOOK

SHAPE, LOOK, RANK_1 = 0.3, 0.3, 0.8
CHOICE, MEAN_CHOICE = 0.75, 0.9  # of `details`, for each trait and on average


def measure(
    name: str,
    network: nn.Module,
    fit: tuple[str, World],
    test: tuple[str, World],
    pairs: dict[str, np.ndarray],
    pair_points: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Return a network's figures, and whether it passes.

    Args:
        fit, test: split and images for fitting and testing the probes; the network knows neither's people.
        pairs, pair_points: images and landmarks of `gates.trait_pairs`.
    """
    zoom = RECIPES[name].zoom

    def features(world: World, rows: np.ndarray) -> Tensor:
        return embed(network, world.pictures[rows], five_points(np.array(world.points[rows])), zoom)

    figures: dict[str, Any] = {f"{trait} R2": score for trait, score in probes.probe(features, fit, test).items()}
    rows = probes.rows_of_looks(min(probes.IDENTIFIED, len(test[1].pictures) // SHOTS))
    figures["rank_1"] = probes.identification(features(test[1], rows), LOOKS)
    choices = trait_choices(features, network, zoom, test[1], pairs, pair_points, RECIPES[name].looks)
    figures |= {f"{trait} choice": choice for trait, choice in choices.items()}
    figures["passed"] = passes(figures, choices if RECIPES[name].looks else None)
    return figures


def passes(figures: dict[str, Any], choices: dict[str, float] | None = None) -> bool:
    """Return whether a recognition network passes its gate.

    Args:
        choices: of the judge of details, which must distinguish every trait; the other networks must ignore looks.
    """
    if choices is not None:
        return min(choices.values()) >= CHOICE and float(np.mean(list(choices.values()))) >= MEAN_CHOICE
    ignores_looks = max(figures["glasses R2"], figures["beard R2"]) <= LOOK
    return figures["shape R2"] >= SHAPE and ignores_looks and figures["rank_1"] >= RANK_1


def trait_choices(
    features: probes.Features,
    network: nn.Module,
    zoom: float,
    test: World,
    pairs: dict[str, np.ndarray],
    pair_points: dict[str, np.ndarray],
    same_look: bool,
) -> dict[str, float]:
    """Return how often another photo of a person is closer to the original than to the image with one trait exchanged.

    The other photos are in the look of the original, if `same_look`, and otherwise in other looks, so that only the
    person's own traits can be tested.
    """
    count = min(len(pairs["original"]), PAIRS, len(test.pictures) // SHOTS)
    shots = range(1, SHOTS_PER_LOOK) if same_look else range(SHOTS_PER_LOOK, SHOTS)
    others = F.normalize(features(test, np.array([i * SHOTS + s for i in range(count) for s in shots])))
    own = _embedded(network, pairs["original"][:count], pair_points["original"][:count], zoom)
    choices = {}
    for trait in PERSON_TRAITS + LOOK_TRAITS if same_look else PERSON_TRAITS:
        changed = _embedded(network, pairs[trait][:count], pair_points[trait][:count], zoom)
        margin = (others.unflatten(0, (count, -1)) * (own - changed)[:, None]).sum(-1)
        visible = np.abs(pairs["original"][:count].astype(int) - pairs[trait][:count]).max((1, 2, 3)) > 6
        choices[trait] = round((margin[visible] > 0).float().mean().item(), 3)
    return choices


def _embedded(network: nn.Module, pictures: np.ndarray, points: np.ndarray, zoom: float) -> Tensor:
    return embed(network, pictures, five_points(points), zoom)
