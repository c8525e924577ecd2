"""The measures of identity tokens on inputs with known results."""

import numpy as np
import pytest
import torch

from facesnap_lab.miniature import tokens


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def test_token_similarity_is_1_for_equal_and_0_for_independent_tokens(random):
    one = torch.randn(200, 1, 64, generator=random)
    addresses = 5 * torch.randn(1, 8, 64, generator=random)  # the same for all people
    assert tokens.token_similarity(one + addresses) == pytest.approx(1)
    assert tokens.token_similarity(torch.randn(200, 8, 64, generator=random) + addresses) == pytest.approx(0, abs=0.01)


def test_effective_rank_counts_equally_strong_directions(random):
    turned = torch.linalg.qr(torch.randn(32, 32, generator=random))[0]
    people = torch.cat([torch.eye(5), -torch.eye(5)]) @ turned[:5]
    assert tokens.effective_rank(people.view(10, 4, 8) + 3) == pytest.approx(5)


def test_explained_variance_measures_what_the_tokens_contain(random):
    features = torch.randn(300, 10, generator=random)
    inside = (features @ torch.randn(10, 64, generator=random)).view(300, 4, 16)
    assert tokens.explained_variance(inside, features) == pytest.approx(1, abs=1e-4)
    assert tokens.explained_variance(inside, torch.randn(300, 10, generator=random)) < 0.02
    half = torch.cat([features, torch.randn(300, 10, generator=random)], dim=1)
    assert tokens.explained_variance(inside, half) == pytest.approx(0.5, abs=0.06)


def test_explained_variance_equals_explicit_leave_one_out_regressions(random):
    """The closed form is compared with one regression per left-out person."""
    inside, features = torch.randn(12, 2, 3, generator=random), torch.randn(12, 4, generator=random)
    flat = inside.flatten(1).double()
    flat = torch.cat([flat - flat.mean(dim=0), torch.ones(12, 1)], dim=1)
    best = -np.inf
    for ridge in tokens.RIDGES * float(flat[:, :-1].square().sum() / 12):
        penalty = ridge * torch.eye(7, dtype=torch.float64)
        penalty[-1, -1] = 0  # the intercept is not penalised
        error = spread = 0.0
        for out in range(12):
            rest = torch.arange(12) != out
            x, y = flat[rest], features[rest].double()
            error += (features[out] - flat[out] @ torch.linalg.solve(x.T @ x + penalty, x.T @ y)).square().sum()
            spread += (features[out] - y.mean(dim=0)).square().sum()
        best = max(best, 1 - float(error / spread))
    assert tokens.explained_variance(inside, features) == pytest.approx(best, abs=1e-8)
