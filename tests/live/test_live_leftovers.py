"""FaceSnap leaves nothing in the host after a job, however the job ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.live.live_host import (
    LONG,
    Host,
    Images,
    Job,
    Refused,
    encode,
    equal,
    failing,
    grey,
    leftovers,
    with_facesnap,
)

Baseline = Callable[[Job], Images]


def test_a_completed_job_leaves_nothing(probed: Host) -> None:
    before = leftovers(probed.probe())
    probed.images(with_facesnap({}))
    assert leftovers(probed.probe()) == before


def test_an_interrupted_job_does_not_affect_the_next_one(host: Host, baseline: Baseline) -> None:
    complete = host.images(with_facesnap(LONG))
    assert not equal(host.interrupted(), complete)
    assert equal(host.images({}), baseline({}))


def test_an_interrupted_job_leaves_nothing(probed: Host) -> None:
    before = leftovers(probed.probe())
    probed.interrupted()
    assert leftovers(probed.probe()) == before
    assert probed.probe()["evaluations"] < LONG["steps"]


@pytest.mark.parametrize("fail_at", [1, 3])
def test_a_failed_job_leaves_nothing(probed: Host, baseline: Baseline, fail_at: int) -> None:
    before = leftovers(probed.probe())
    with pytest.raises(Exception, match="the probe raised"):
        probed.images(failing({"steps": 4}, fail_at))
    assert leftovers(probed.probe(collect=True)) == before
    assert equal(probed.images({}), baseline({}))
    assert leftovers(probed.probe()) == before


def test_a_refused_job_leaves_nothing(probed: Host) -> None:
    before = leftovers(probed.probe())
    with pytest.raises(Refused, match="No face"):
        probed.images(with_facesnap({}, references=[encode(grey())]))
    assert leftovers(probed.probe(collect=True)) == before


def test_a_failed_job_does_not_affect_the_next_one_with_facesnap(probed: Host) -> None:
    expected = probed.images(with_facesnap({}))
    with pytest.raises(Exception, match="the probe raised"):
        probed.images(failing({}, at=1))
    assert equal(probed.images(with_facesnap({})), expected)
