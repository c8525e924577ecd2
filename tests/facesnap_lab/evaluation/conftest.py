"""A list of people of the miniature world, and the miniature's judges."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def judges():
    pytest.importorskip("insightface", reason="the miniature's faces are detected with insightface")
    pytest.importorskip("transformers", reason="the miniature's CLIP is loaded with transformers")
    from facesnap_lab.evaluation.miniature import miniature_judges

    return miniature_judges()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Three people in two poses with one prompt."""
    pytest.importorskip("cv2")
    from facesnap_lab.evaluation.miniature import miniature_protocol

    return miniature_protocol(tmp_path_factory.mktemp("world"), people=3, poses=2, prompts=1)
