"""The shipped miniature preserves the identity of people that no network was trained on, measured by an independent
judge."""

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="the miniature's images are generated with diffusers")
pytest.importorskip("onnxruntime", reason="the miniature's faces are detected with onnxruntime")
pytest.importorskip("insightface", reason="the miniature's faces are detected with insightface")

from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.measure import Judge, measure, summary

PEOPLE = 8
MARGIN = 0.35  # cosine of the judge; two photos of one person are 0.76 above photos of two people


@pytest.fixture(scope="module")
def portraits():
    return measure(shipped.few_step_sampler(), PEOPLE, progress=lambda line: None)


@pytest.fixture(scope="module")
def likeness(portraits):
    """[PEOPLE, PEOPLE]: each image (rows) against each reference."""
    judge = Judge()
    pictures, references = (
        [judge.embedding(getattr(portrait, name)) for portrait in portraits] for name in ("picture", "reference")
    )
    assert all(found is not None for found in (*pictures, *references)), "an image without a face"
    return np.stack(pictures) @ np.stack(references).T


def test_images_resemble_their_own_reference_most(likeness):
    """Shuffled identities would fail: no other diagonal reaches the same margin."""
    own = np.diag(likeness)
    others = (likeness.sum(1) - own) / (PEOPLE - 1)
    kept = (own - others).mean()
    assert kept > MARGIN
    for shift in range(1, PEOPLE):
        assert (np.diag(np.roll(likeness, shift, axis=1)) - others).mean() < kept


def test_identity_is_not_preserved_without_facesnap(portraits):
    found = summary(portraits)
    assert found["without_facesnap"][0] < 0.25
    assert found["with_facesnap"][0] > found["without_facesnap"][0] + MARGIN


def test_pose_follows_the_driving_photo(portraits):
    errors = np.array([portrait.pose_error for portrait in portraits])
    assert np.nanmean(errors) < 8  # degrees; other scenes of the world differ by about 20


def test_shipped_weights_stay_small():
    assert sum(file.stat().st_size for file in shipped.WEIGHTS.rglob("*") if file.is_file()) <= 30 * 2**20
