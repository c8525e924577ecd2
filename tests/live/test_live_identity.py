"""No job uses another job's identity: concurrent jobs, and a FaceSnap file that is replaced between two jobs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.live.live_host import INIT, RANDOM, Host, Images, Job, differ, encode, equal, grace_hopper, with_facesnap

Baseline = Callable[[Job], Images]


def test_concurrent_jobs_keep_their_own_person(host: Host, baseline: Baseline) -> None:
    jobs = [with_facesnap({}), {}, with_facesnap({}, references=[encode(grace_hopper())])]
    alone = [host.images(jobs[0]), baseline({}), host.images(jobs[2])]
    assert differ(alone[0], alone[2])
    for _ in range(3):
        together = [host.start(job) for job in jobs]
        assert [equal(job.result(timeout=600), one) for job, one in zip(together, alone, strict=True)] == [True] * 3


@pytest.fixture
def replaced(request: pytest.FixtureRequest) -> Iterator[Callable[[str], str]]:
    """Replaces one of the WebUI's FaceSnap files with a copy of a different one, and returns its name."""
    if not (folder := request.config.getoption("--models", default="")):
        pytest.skip("--models, the folder models/facesnap of the running WebUI, was not given")
    path = Path(folder, "replaced.safetensors")

    def replace(name: str) -> str:
        new = path.with_suffix(".new")
        shutil.copyfile(path.with_name(name), new)
        new.replace(path)
        return path.name

    yield replace
    path.unlink(missing_ok=True)


def test_a_replaced_file_is_read_again(host: Host, baseline: Baseline, replaced: Callable[[str], str]) -> None:
    random = host.images(with_facesnap({}))
    assert equal(host.images(with_facesnap({}, model=replaced(RANDOM))), random)
    assert equal(host.images(with_facesnap({}, model=replaced(INIT))), baseline({}))
    assert equal(host.images(with_facesnap({}, model=replaced(RANDOM))), random)
