"""Numbers of seeds, compared with closed forms and with simulated experiments."""

from __future__ import annotations

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats", reason="quantiles are computed with scipy")

from facesnap_lab.statistics import seeds_for_difference, seeds_for_interval


@pytest.mark.parametrize(("spread", "difference", "seeds"), [(7.7, 2, 117), (1.4, 2, 4), (2.3, 2, 11), (0.1, 2, 2)])
def test_seeds_for_a_difference(spread, difference, seeds):
    """(1.96 + 0.84)² × (spread / difference)², rounded up."""
    assert seeds_for_difference(spread, difference) == seeds
    assert seeds_for_difference(spread, -difference) == seeds


@pytest.mark.parametrize("spread", [0.5, 1.4, 3.0, 7.7])
@pytest.mark.parametrize("people_error", [0.0, 0.4])
def test_seeds_for_an_interval_are_the_fewest_that_suffice(spread, people_error):
    def half_width(seeds):
        error = np.sqrt(spread**2 / seeds + people_error**2)
        return stats.t.ppf(0.975, seeds - 1) * error

    seeds = seeds_for_interval(spread, 2.0, people_error)
    assert half_width(seeds) <= 2.0
    assert seeds == 2 or half_width(seeds - 1) > 2.0


def test_intervals_with_as_many_seeds_have_the_wanted_width():
    seeds = seeds_for_interval(3.0, 2.0)
    random = np.random.default_rng(0)
    means = random.normal(0, 3.0, (4000, seeds)).mean(1)
    assert 1.96 * means.std() < 2.0
    assert (np.abs(means) < 2.0).mean() > 0.95


def test_too_few_people_cannot_be_replaced_by_seeds():
    assert seeds_for_interval(0.1, 2.0, people_error=1.1) is None
