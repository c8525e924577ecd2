"""The shipped miniature keeps people apart: pictures of people whom nobody trained on, judged by a network that never
conditions."""

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="the miniature is drawn with diffusers")
pytest.importorskip("onnxruntime", reason="the miniature's faces are found with onnxruntime")
pytest.importorskip("insightface", reason="the miniature's faces are found with insightface")

from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.measure import Judge, measure, summary

PEOPLE = 16
MARGIN = 0.35  # of the judge's cosines, in which two photos of one person are 0.76 above those of two people


@pytest.fixture(scope="module")
def portraits():
    return measure(shipped.few_step_sampler(), PEOPLE, progress=lambda line: None)


@pytest.fixture(scope="module")
def likeness(portraits):
    """[PEOPLE, PEOPLE]: each picture (rows) to each reference."""
    judge = Judge()
    pictures, references = (
        [judge.embedding(getattr(portrait, name)) for portrait in portraits] for name in ("picture", "reference")
    )
    assert all(found is not None for found in (*pictures, *references)), "a picture without a face"
    return np.stack(pictures) @ np.stack(references).T


def test_pictures_are_of_their_reference_and_of_nobody_else(likeness):
    """Shuffled identities fail this: the diagonal would be any other."""
    own = np.diag(likeness)
    others = (likeness.sum(1) - own) / (PEOPLE - 1)
    kept = (own - others).mean()
    assert kept > MARGIN
    for shift in range(1, PEOPLE):
        assert (np.diag(np.roll(likeness, shift, axis=1)) - others).mean() < kept


def test_without_facesnap_nobody_is_kept(portraits):
    found = summary(portraits)
    assert found["without_facesnap"][0] < 0.25
    assert found["with_facesnap"][0] > found["without_facesnap"][0] + MARGIN


def test_the_pose_is_the_driving_photos(portraits):
    errors = np.array([portrait.pose_error for portrait in portraits])
    assert np.nanmean(errors) < 8  # degrees; any other scene of the world is 20 away


def test_all_weights_together_are_small():
    assert sum(file.stat().st_size for file in shipped.WEIGHTS.rglob("*") if file.is_file()) <= 30 * 2**20
