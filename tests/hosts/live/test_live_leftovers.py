"""Nothing of FaceSnap is left in the host after a job, however the job ended."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from live_host import Host, Job, Pictures, Refused, encode, equal, grey, with_facesnap

Baseline = Callable[[Job], Pictures]

LONG = {"steps": 16}


def test_success(probed: Host) -> None:
    before = _leftovers(probed)
    probed.pictures(with_facesnap({}))
    assert _leftovers(probed) == before


def test_interrupt(host: Host, baseline: Baseline) -> None:
    complete = host.pictures(with_facesnap(LONG))
    assert not equal(_interrupt(host), complete)
    assert equal(host.pictures({}), baseline({}))


def test_interrupt_leaves_nothing(probed: Host) -> None:
    before = _leftovers(probed)
    _interrupt(probed)
    assert _leftovers(probed) == before
    assert probed.probe()["evaluations"] < LONG["steps"]


@pytest.mark.parametrize("fail_at", [1, 3])
def test_exception(probed: Host, baseline: Baseline, fail_at: int) -> None:
    before = _leftovers(probed)
    job = with_facesnap({"steps": 4, "alwayson_scripts": {"FaceSnap probe": {"args": [{"fail_at": fail_at}]}}})
    with pytest.raises(Exception, match="the probe raised"):
        probed.pictures(job)
    assert _leftovers(probed, collect=True) == before
    assert equal(probed.pictures({}), baseline({}))
    assert _leftovers(probed) == before


def test_a_refused_job(probed: Host) -> None:
    before = _leftovers(probed)
    with pytest.raises(Refused, match="No face"):
        probed.pictures(with_facesnap({}, references=[encode(grey())]))
    assert _leftovers(probed, collect=True) == before


def test_facesnap_after_an_exception(probed: Host) -> None:
    """The next job with FaceSnap is as if nothing had happened."""
    expected = probed.pictures(with_facesnap({}))
    with pytest.raises(Exception, match="the probe raised"):
        probed.pictures(with_facesnap({"alwayson_scripts": {"FaceSnap probe": {"args": [{"fail_at": 1}]}}}))
    assert equal(probed.pictures(with_facesnap({})), expected)


def _interrupt(host: Host) -> Pictures:
    future = host.start(with_facesnap(LONG))
    host.wait_for_step(3)
    host.post("/sdapi/v1/interrupt")
    return future.result(timeout=120)


def _leftovers(host: Host, collect: bool = False) -> Job:
    state = host.probe(collect)
    return {"hooks": state["hooks"], "controls": state["controls"]}
