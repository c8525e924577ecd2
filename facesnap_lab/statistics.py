"""Means with intervals over people: a person's pictures resemble each other, so people are what is resampled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 5000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its bootstrap interval; no bounds where there are fewer than two people."""

    mean: float
    low: float | None = None
    high: float | None = None


def by_person(values: np.ndarray, people: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[P] the weighted mean of each person's values.

    Args:
        values: [N]. people: [N] indices from 0, each at least once. weights: [N] above 0.
    """
    return np.bincount(people, weights * values) / np.bincount(people, weights)


def bootstrap(values: np.ndarray, seed: int = 0) -> Interval:
    """The mean of people's values [P] with its 95 % interval, BCa (Efron 1987) by scipy.

    Of the difference of two methods on the same people, this is the paired interval.
    """
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean)
    if np.ptp(values) < 1e-9:
        return Interval(mean, mean, mean)  # BCa is not defined where nothing but rounding differs
    found = stats.bootstrap(
        (np.asarray(values, np.float64),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="BCa",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))
