"""The metrics compared with closed forms, transformers and torchmetrics."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torchmetrics", reason="FID is computed with torchmetrics")
pytest.importorskip("scipy")

from scipy import linalg

from facesnap_lab.evaluation.metrics import clip_t, fid, likeness


def with_moments(random, count, mean, covariance):
    """Return samples [count, D] with exactly this mean and sample covariance."""
    numbers = random.normal(size=(count, len(mean)))
    numbers -= numbers.mean(axis=0)
    whitened = numbers @ np.linalg.inv(np.linalg.cholesky(np.cov(numbers.T))).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


@given(seed=st.integers(0, 2**32 - 1), width=st.integers(2, 6))
@settings(max_examples=20, deadline=None)
def test_fid_is_the_frechet_distance_between_gaussians(seed, width):
    random = np.random.default_rng(seed)
    means = random.normal(size=(2, width))
    roots = random.normal(size=(2, width, width))
    first, second = (root @ root.T + 0.1 * np.eye(width) for root in roots)
    found = fid(with_moments(random, 50, means[0], first), with_moments(random, 70, means[1], second))
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(first + second - 2 * linalg.sqrtm(first @ second).real)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_fid_of_uncorrelated_features_depends_on_their_standard_deviations():
    random, deviations = np.random.default_rng(0), np.array([[1.0, 2.0, 0.5], [3.0, 2.0, 0.1]])
    sets = [with_moments(random, 40, np.zeros(3), np.diag(row**2)) for row in deviations]
    assert fid(*sets) == pytest.approx(np.sum((deviations[0] - deviations[1]) ** 2))


def test_fid_of_a_set_with_itself_is_0():
    features = np.random.default_rng(0).normal(size=(30, 64))  # fewer samples than features: a singular covariance
    assert fid(features, features[::-1].copy()) == pytest.approx(0, abs=1e-3)
    assert fid(features, features + 1) == pytest.approx(64, rel=1e-4)


def test_fid_does_not_wait_for_other_processes(monkeypatch):
    """There is no process group here, so a synchronisation would fail."""
    import torch

    features = np.random.default_rng(0).normal(size=(2, 30, 4))
    alone = fid(*features)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert fid(*features) == alone


def test_likeness_and_clip_t_are_cosines():
    random = np.random.default_rng(0)
    pictures, texts = random.normal(size=(2, 5, 8))
    assert clip_t(pictures, 3 * pictures) == pytest.approx(1)
    assert clip_t(pictures, -texts) == pytest.approx(-clip_t(5 * pictures, texts))
    assert likeness(pictures[0], [7 * pictures[0]]) == pytest.approx(1)
    both = likeness(pictures[0], [pictures[0], texts[0]])
    assert both == pytest.approx((1 + clip_t(pictures[:1], texts[:1])[0]) / 2)
    assert likeness(None, [pictures[0]]) == 0
