"""The identity measurement on portraits with known figures."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from facesnap_lab.miniature.measure import Portrait, people_sheet, summary


def portrait(similarity, same=0.8, different=0.1, off=0.05, error=3.0):
    black = np.zeros((64, 64, 3), np.uint8)
    return Portrait(black, black, black, black, "", similarity, off, same, different, error, 2.0)


@pytest.mark.parametrize(("similarity", "position"), [(0.1, 0), (0.8, 1), (0.45, 0.5), (0.0, -1 / 7)])
def test_position_is_interpolated_between_the_two_limits(similarity, position):
    found = summary([portrait(similarity)] * 5)
    assert found["position_between_limits"] == pytest.approx([position] * 3, abs=1e-3)
    assert found["lower_limit"][0] == pytest.approx(0.1)
    assert found["pose_error_degrees"][0] == pytest.approx(3)


def test_interval_is_over_people_and_images_without_a_face_are_counted():
    random = np.random.default_rng(1)
    values = random.normal(0.5, 0.2, 400)
    portraits = [portrait(value) for value in values]
    portraits[0] = dataclasses.replace(portraits[0], pose_error=float("nan"))
    found = summary(portraits)
    mean, low, high = found["with_facesnap"]
    assert mean == pytest.approx(values.mean(), abs=1e-3)
    # normal approximation of a mean's interval
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert found["pictures_without_a_face"] == 1
    assert found["pose_error_degrees"][0] == pytest.approx(3)


def test_sheet_shows_everyone():
    assert people_sheet([portrait(0.5)] * 9, columns=4).height > people_sheet([portrait(0.5)] * 8, columns=4).height


def test_reduce_dimension_preserves_cosines():
    from facesnap_lab.miniature.identity import RECIPES, Embedder, reduce_dimension

    torch.manual_seed(0)
    network = Embedder(RECIPES["judge"]).train()
    faces = torch.randn(40, 3, 112, 112).clamp(-1, 1)
    with torch.no_grad():
        network(faces)  # updates the batch norms' statistics
    network.eval()
    with torch.no_grad():
        before = F.normalize(network(faces))
        reduce_dimension(network, before, 64)  # 40 faces span fewer dimensions
        after = F.normalize(network(faces))
    assert after.shape == (40, 64)
    torch.testing.assert_close(after @ after.T, before @ before.T, atol=1e-4, rtol=0)
