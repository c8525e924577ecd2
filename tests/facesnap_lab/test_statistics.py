"""Bootstrap intervals over people, tested on data with known means."""

import numpy as np
import pytest

pytest.importorskip("scipy")

from facesnap_lab import statistics
from facesnap_lab.statistics import Interval, bootstrap, by_person

IMAGES = 10  # number of images per person
BETWEEN, WITHIN = 0.2, 0.1  # standard deviations between people, and between images of one person


def draw(random, people, truth):
    """Return values of images, and the index of each image's person."""
    whose = np.repeat(np.arange(people), IMAGES)
    return truth + random.normal(0, BETWEEN, people)[whose] + random.normal(0, WITHIN, len(whose)), whose


def test_interval_covers_the_true_mean_in_95_percent_of_trials(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    random, held, times = np.random.default_rng(0), 0, 400
    for _ in range(times):
        values, whose = draw(random, people=30, truth=0.6)
        found = bootstrap(by_person(values, whose, np.ones(len(values))))
        held += found.low <= 0.6 <= found.high
    # three standard errors of the count around 95 %, and the known undercoverage of a bootstrap over 30 people
    assert 0.90 <= held / times <= 0.985


def test_people_are_resampled_rather_than_images():
    values, whose = draw(np.random.default_rng(1), people=100, truth=0)
    found = bootstrap(by_person(values, whose, np.ones(len(values))))
    expected = 2 * 1.96 * np.hypot(BETWEEN, WITHIN / IMAGES**0.5) / 100**0.5
    assert found.high - found.low == pytest.approx(expected, rel=0.2)
    assert found.mean == pytest.approx(values.mean())


def test_paired_interval_detects_small_differences_between_methods():
    random = np.random.default_rng(2)
    people = random.normal(0.5, 0.2, 40)
    first, second = (people + step + random.normal(0, 0.01, 40) for step in (0.02, 0))
    alone, paired = (bootstrap(first), bootstrap(second)), bootstrap(first - second)
    assert alone[0].low < alone[1].high  # the intervals overlap
    assert 0.01 < paired.low < paired.mean < paired.high < 0.03


def test_by_person_weights_values_within_each_person():
    random = np.random.default_rng(3)
    values, weights, whose = random.normal(size=12), random.uniform(0.1, 3, 12), np.arange(12) % 3
    expected = [np.average(values[whose == who], weights=weights[whose == who]) for who in range(3)]
    assert by_person(values, whose, weights) == pytest.approx(expected)


def test_interval_is_missing_for_one_person_and_empty_for_equal_values():
    assert bootstrap(np.array([0.4])) == Interval(0.4)
    assert bootstrap(np.full(5, 0.25)) == Interval(0.25, 0.25, 0.25)
    rounded = bootstrap(np.array([1.0, 1.0, 1 - 1e-16, 1 + 3e-16]))
    assert (rounded.low, rounded.high) == pytest.approx((1, 1))
