"""Tests against a running WebUI, given by `--url`; without it they are skipped. See README.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.live_host import Host, Images, Job
from tests.live.live_page import Page

SCREENSHOTS = Path(__file__).parents[2] / "out" / "live"  # git ignores it


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("live", "a running WebUI")
    group.addoption("--url", default="", help="a WebUI with FaceSnap, for example http://127.0.0.1:7860")
    group.addoption("--plain-url", default="", help="the same WebUI without FaceSnap, for the bit-identity baselines")
    group.addoption("--empty-url", default="", help="a WebUI with FaceSnap but without its model files")
    group.addoption("--parts", default="", help="stand-ins that the WebUI at --empty-url downloads")
    group.addoption("--models", default="", help="the folder models/facesnap of the WebUI at --url")
    group.addoption("--console", default="", help="a file with the console output of the WebUI at --url")


@pytest.fixture(scope="session")
def host(request: pytest.FixtureRequest) -> Host:
    """The WebUI with FaceSnap."""
    url = request.config.getoption("--url", default="")
    if not url:
        pytest.skip("--url of a running WebUI was not given")
    host = Host(url)
    host.settle()
    return host


@pytest.fixture(scope="session")
def plain_host(request: pytest.FixtureRequest, host: Host) -> Host:
    """The WebUI without FaceSnap, or by default the one with it, in jobs that do not mention FaceSnap."""
    url = request.config.getoption("--plain-url", default="")
    if not url:
        return host
    plain = Host(url)
    plain.settle()
    return plain


@pytest.fixture(scope="session")
def empty_host(request: pytest.FixtureRequest) -> Host:
    url = request.config.getoption("--empty-url", default="")
    if not url:
        pytest.skip("--empty-url of a WebUI without FaceSnap's model files was not given")
    return Host(url)


@pytest.fixture(scope="session")
def baseline(plain_host: Host) -> Callable[[Job], Images]:
    """Runs each job without FaceSnap only once, and returns its images."""
    known: dict[str, Images] = {}

    def run_once(job: Job) -> Images:
        key = repr(sorted(job.items()))
        if key not in known:
            known[key] = plain_host.images(job)
        return known[key]

    return run_once


@pytest.fixture
def probed(host: Host) -> Host:
    """The WebUI with FaceSnap, if the probe is installed in it as well."""
    if not host.has("/facesnap-probe/state"):
        pytest.skip("the WebUI has no probe extension (tests/live/probe)")
    return host


@pytest.fixture(scope="session")
def console(request: pytest.FixtureRequest) -> Path:
    """The file that receives the console output of the WebUI."""
    path = request.config.getoption("--console", default="")
    if not path:
        pytest.skip("--console, the file with the WebUI's console output, was not given")
    return Path(path)


@pytest.fixture
def page(host: Host, browser: Any) -> Iterator[Page]:
    """The WebUI's page, newly opened."""
    page = Page(host, browser, SCREENSHOTS)
    yield page
    page.close()
