"""Never the identity of another job: with two at once, and with a FaceSnap file that is exchanged between two."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.live.live_host import INIT, RANDOM, Host, Job, Pictures, differ, encode, equal, grace_hopper, with_facesnap

Baseline = Callable[[Job], Pictures]


def test_of_jobs_at_once_each_is_of_its_own_person(host: Host, baseline: Baseline) -> None:
    jobs = [with_facesnap({}), {}, with_facesnap({}, references=[encode(grace_hopper())])]
    alone = [host.pictures(jobs[0]), baseline({}), host.pictures(jobs[2])]
    assert differ(alone[0], alone[2])
    for _ in range(3):
        together = [host.start(job) for job in jobs]
        assert [equal(job.result(timeout=600), one) for job, one in zip(together, alone, strict=True)] == [True] * 3


@pytest.fixture
def exchanged(request: pytest.FixtureRequest) -> Iterator[Callable[[str], str]]:
    """Makes one FaceSnap file of the WebUI's a copy of another, and gives its name."""
    if not (folder := request.config.getoption("--models", default="")):
        pytest.skip("no --models, the folder models/facesnap of the running WebUI, was given")
    path = Path(folder, "exchanged.safetensors")

    def exchange(name: str) -> str:
        new = path.with_suffix(".new")
        shutil.copyfile(path.with_name(name), new)
        new.replace(path)
        return path.name

    yield exchange
    path.unlink(missing_ok=True)


def test_a_file_exchanged_between_two_jobs_is_read_anew(
    host: Host, baseline: Baseline, exchanged: Callable[[str], str]
) -> None:
    whole = host.pictures(with_facesnap({}))
    assert equal(host.pictures(with_facesnap({}, model=exchanged(RANDOM))), whole)
    assert equal(host.pictures(with_facesnap({}, model=exchanged(INIT))), baseline({}))
    assert equal(host.pictures(with_facesnap({}, model=exchanged(RANDOM))), whole)
