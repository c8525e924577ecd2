"""Means with bootstrap intervals over people: people are resampled, since images of one person are not independent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 5000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its bootstrap interval, which is missing with fewer than two people."""

    mean: float
    low: float | None = None
    high: float | None = None


def by_person(values: np.ndarray, people: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean of each person's values, [P].

    Args:
        values: [N]. people: [N] indices from 0 without gaps. weights: [N], greater than 0.
    """
    return np.bincount(people, weights * values) / np.bincount(people, weights)


def bootstrap(values: np.ndarray, seed: int = 0) -> Interval:
    """Return the mean of people's values [P] with its BCa 95 % interval (Efron 1987), computed by scipy.

    Applied to per-person differences between two methods, this is the paired interval.
    """
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean)
    if np.ptp(values) < 1e-9:
        return Interval(mean, mean, mean)  # BCa is undefined if values differ by rounding errors only
    interval = stats.bootstrap(
        (np.asarray(values, np.float64),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="BCa",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(interval.low), float(interval.high))


def crossed_bootstrap(values: np.ndarray, seed: int = 0) -> Interval:
    """Return the mean of [S,P] values with its percentile 95 % interval, resampling seeds and people independently.

    Values that are NaN, such as a trait that cannot be seen, are left out. With one seed, only people are resampled,
    and with one person, only seeds.
    """
    values = np.asarray(values, np.float64)
    mean = float(np.nanmean(values))
    if max(values.shape) < 2:
        return Interval(mean)
    random = np.random.default_rng(seed)
    # how often each seed and each person is drawn, [resamples,S] and [resamples,P]
    seeds, people = (random.multinomial(size, np.full(size, 1 / size), RESAMPLES) for size in values.shape)
    known = ~np.isnan(values)
    count = ((seeds @ known) * people).sum(1)
    total = ((seeds @ np.where(known, values, 0)) * people).sum(1)
    means = np.divide(total, count, out=np.full(RESAMPLES, np.nan), where=count > 0)
    low, high = np.nanquantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean, float(low), float(high))


def seeds_for_interval(spread: float, half_width: float, people_error: float = 0.0) -> int | None:
    """Return the smallest number of seeds whose 95 % interval of a mean is at most ± `half_width`.

    The interval is Student's t for the seeds. None: no number suffices, because the people alone are too few.

    Args:
        spread: standard deviation between the means of seeds.
        people_error: standard error of the mean over people, which does not fall with the number of seeds.
    """
    from scipy import stats

    if stats.norm.ppf((1 + CONFIDENCE) / 2) * people_error >= half_width:
        return None

    def suffices(seeds: int) -> bool:
        error = (spread**2 / seeds + people_error**2) ** 0.5
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)) * error <= half_width

    seeds = 2
    while not suffices(seeds):
        seeds *= 2
    low = seeds // 2
    while seeds - low > 1:  # the smallest number that suffices is above `low` and at most `seeds`
        middle = (low + seeds) // 2
        low, seeds = (low, middle) if suffices(middle) else (middle, seeds)
    return seeds


def seeds_for_difference(spread: float, difference: float, power: float = 0.8) -> int:
    """Return how many seeds find a difference with this probability at the 5 % level, at least 2.

    Args:
        spread: standard deviation of the difference between seeds.
        difference: the true difference, not 0.
    """
    from scipy import stats

    quantiles = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(power)
    return max(2, int(np.ceil((quantiles * spread / abs(difference)) ** 2)))


def rounded_interval(values: np.ndarray | Sequence[float], digits: int) -> list[float | None]:
    """Return mean, low and high of `bootstrap` over the values that are not NaN, rounded."""
    known = np.asarray(values, np.float64)
    found = bootstrap(known[~np.isnan(known)])
    return [None if value is None else round(value, digits) for value in (found.mean, found.low, found.high)]
