"""What a network's features say about a person and a look: linear probes, and identification across looks.

A probe is a ridge regression from one image's features to the properties that the image was rendered from. It is
fitted on people whom the network was not trained on, and tested on other people.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from facesnap_lab.miniature.second.dataset import SHOTS, World
from facesnap_lab.miniature.second.world import HIDDEN_SHAPES, NAMED_SHAPES, SHOTS_PER_LOOK, Subject, subject

Features = Callable[[World, np.ndarray], Tensor]
"""Computes the features [R,D] of the images in the rows [R]."""

RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # relative to the features' variance
IDENTIFIED = 300
FIT_PEOPLE, TEST_PEOPLE = 900, 300
VISIBLE = [index for index, name in enumerate(NAMED_SHAPES) if name not in HIDDEN_SHAPES]


def properties(who: Subject) -> dict[str, list[float]]:
    """Return the numbers that the probes predict, by trait."""
    nothing = np.zeros(3)
    left, right = (int((side * who.moles[:, 0] > 0).sum()) for side in (-1, 1))
    return {
        "shape": list(who.shape[VISIBLE]),
        "skin": list(who.skin),
        "iris": list(who.iris),
        "brows": [float(who.brow_rgb.mean()), who.brow_thickness, who.brow_height, who.brow_arch],
        "moles": [left, right],
        "long hair": [float(who.hair == "long")],
        "hair colour": list(who.hair_rgb),
        "glasses": [float(who.glasses is not None)],
        "frames": list(nothing if who.glasses is None else who.glasses),
        "beard": [who.beard],
        "lipstick": list(nothing if who.lipstick is None else who.lipstick),
        "eye shadow": list(nothing if who.eye_shadow is None else who.eye_shadow),
    }


def rows_of_looks(people: int) -> np.ndarray:
    """Return the row of the first image of each look of the first people, [people·looks]."""
    shots = np.arange(0, SHOTS, SHOTS_PER_LOOK)
    return (np.arange(people)[:, None] * SHOTS + shots).ravel()


def probe(features: Features, fit: tuple[str, World], test: tuple[str, World]) -> dict[str, float]:
    """Return the R² of each trait on the test images, averaged over the trait's numbers.

    Args:
        fit, test: split and images; the first `FIT_PEOPLE` and `TEST_PEOPLE` people are used.
    """
    fitted, tested = (_table(features, *fit, FIT_PEOPLE), _table(features, *test, TEST_PEOPLE))
    scores = r_squared(*fitted, *tested)
    widths = {name: len(values) for name, values in properties(subject("test", 0, 0)).items()}
    parts = scores.split(list(widths.values()))
    return {name: round(part.mean().item(), 3) for name, part in zip(widths, parts)}


def _table(features: Features, split: str, world: World, people: int) -> tuple[Tensor, Tensor]:
    rows = rows_of_looks(min(people, len(world.pictures) // SHOTS))
    values = [np.concatenate(list(properties(subject(split, row // SHOTS, row % SHOTS)).values())) for row in rows]
    return features(world, rows), torch.from_numpy(np.stack(values)).float()


def r_squared(fit_x: Tensor, fit_y: Tensor, test_x: Tensor, test_y: Tensor) -> Tensor:
    """Return the R² of a ridge regression for each column of y, [K]; 0 for a constant column.

    The strength of the ridge is chosen for each column on the last quarter of the fitted rows.
    """
    fit_x, test_x, fit_y, test_y = (x.double() for x in (fit_x, test_x, fit_y, test_y))
    mean, spread = fit_x.mean(0), fit_x.std(0) + 1e-6
    fit_x, test_x = (fit_x - mean) / spread, (test_x - mean) / spread
    inner = 3 * len(fit_x) // 4
    trials = torch.stack([_predict(fit_x[:inner], fit_y[:inner], fit_x[inner:], ridge) for ridge in RIDGES])
    best = (trials - fit_y[inner:]).pow(2).mean(1).argmin(0)
    answers = torch.stack([_predict(fit_x, fit_y, test_x, ridge) for ridge in RIDGES])
    answer = answers[best, :, torch.arange(fit_y.shape[1])].T
    variance = test_y.var(0, correction=0)
    explained = 1 - (answer - test_y).pow(2).mean(0) / variance
    return torch.where(variance > 0, explained, torch.zeros_like(explained))


def _predict(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
    middle = y.mean(0)
    if x.shape[1] <= len(x):
        gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        return new @ torch.linalg.solve(gram, x.T @ (y - middle)) + middle
    gram = x @ x.T + ridge * len(x) * torch.eye(len(x), dtype=x.dtype)
    return new @ (x.T @ torch.linalg.solve(gram, y - middle)) + middle


def identification(embeddings: Tensor, looks: int) -> float:
    """Return the rank-1 accuracy of people across looks, averaged over all pairs of looks.

    Args:
        embeddings: [people·looks,D], normalised, in the order of `rows_of_looks`.
    """
    by_look = embeddings.unflatten(0, (-1, looks)).transpose(0, 1)
    own = torch.arange(by_look.shape[1])
    right = [
        ((by_look[a] @ by_look[b].T).argmax(1) == own).float().mean()
        for a in range(looks)
        for b in range(looks)
        if a != b
    ]
    return torch.stack(right).mean().item()
