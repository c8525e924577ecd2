"""Nothing of FaceSnap is left in the host after a job, however the job ended."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.live.live_host import (
    LONG,
    Host,
    Job,
    Pictures,
    Refused,
    encode,
    equal,
    failing,
    grey,
    leftovers,
    with_facesnap,
)

Baseline = Callable[[Job], Pictures]


def test_success(probed: Host) -> None:
    before = leftovers(probed.probe())
    probed.pictures(with_facesnap({}))
    assert leftovers(probed.probe()) == before


def test_interrupt(host: Host, baseline: Baseline) -> None:
    complete = host.pictures(with_facesnap(LONG))
    assert not equal(host.interrupted(), complete)
    assert equal(host.pictures({}), baseline({}))


def test_interrupt_leaves_nothing(probed: Host) -> None:
    before = leftovers(probed.probe())
    probed.interrupted()
    assert leftovers(probed.probe()) == before
    assert probed.probe()["evaluations"] < LONG["steps"]


@pytest.mark.parametrize("fail_at", [1, 3])
def test_exception(probed: Host, baseline: Baseline, fail_at: int) -> None:
    before = leftovers(probed.probe())
    with pytest.raises(Exception, match="the probe raised"):
        probed.pictures(failing({"steps": 4}, fail_at))
    assert leftovers(probed.probe(collect=True)) == before
    assert equal(probed.pictures({}), baseline({}))
    assert leftovers(probed.probe()) == before


def test_a_refused_job(probed: Host) -> None:
    before = leftovers(probed.probe())
    with pytest.raises(Refused, match="No face"):
        probed.pictures(with_facesnap({}, references=[encode(grey())]))
    assert leftovers(probed.probe(collect=True)) == before


def test_facesnap_after_an_exception(probed: Host) -> None:
    """The next job with FaceSnap is as if nothing had happened."""
    expected = probed.pictures(with_facesnap({}))
    with pytest.raises(Exception, match="the probe raised"):
        probed.pictures(failing({}, at=1))
    assert equal(probed.pictures(with_facesnap({})), expected)
