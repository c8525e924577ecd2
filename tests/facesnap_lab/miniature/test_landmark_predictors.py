"""The comparison of the Landmark Predictors on two people, and its figures for known differences."""

import numpy as np
import pytest

from facesnap_lab.evaluation.pose_transfer import distance, eye_distance, moved_and_scaled
from facesnap_lab.miniature import landmark_predictors as module
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.landmark_predictors import METHODS, REFERENCE, Comparison, Drawn, summary

BLACK = np.zeros((64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def compared():
    return module.compare(shipped.few_step_sampler(), 2, progress=lambda text: None)


def test_methods_differ_in_the_landmarks_alone(compared):
    for one in compared:
        assert tuple(one.drawn) == METHODS
        assert one.drawn["truth"].landmark_error == 0
        pictures = [drawn.picture for drawn in one.drawn.values()]
        assert all(not np.array_equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])


def test_the_open_face_model_is_closer_to_the_truth_than_the_driving_photo(compared):
    errors = {name: np.mean([one.drawn[name].landmark_error for one in compared]) for name in METHODS}
    noisy = "open face model, true points with 2 % noise"
    assert errors[noisy] < errors["driving photo"]
    assert errors["open face model"] < errors["mean face"]


def test_errors_ignore_position_and_size():
    points = np.random.default_rng(0).uniform(0, 64, (72, 2))
    assert distance(moved_and_scaled(1.3 * points + 5, points), points) < 1e-9
    assert eye_distance(points) > 0


def test_differences_are_person_by_person():
    random = np.random.default_rng(1)
    compared = []
    for base in random.normal(0.5, 0.3, 50):
        drawn = {
            name: Drawn(BLACK, dict.fromkeys(module.JUDGES, base + 0.1 * (name != REFERENCE)), 3.0, 4.0)
            for name in METHODS
        }
        compared.append(Comparison(BLACK, BLACK, drawn))
    found = summary(compared)
    mean, low, high = found["truth"]["judge_difference"]
    assert (mean, low, high) == pytest.approx((0.1, 0.1, 0.1), abs=1e-3)
    assert found["truth"]["judge"][2] - found["truth"]["judge"][1] > 0.05
