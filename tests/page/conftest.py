"""The page served by `page_server.py`, with both versions of gradio, and a browser that shows it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from facesnap_lab.miniature import shipped
from tests.page.browsed_page import VERSIONS, Page

ROOT = Path(__file__).parents[2]
PATIENCE = 600  # seconds to wait for the server, on a busy machine


@pytest.fixture(scope="session", params=VERSIONS)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the running page."""
    gradio = Path(sys.prefix) / f"gradio-{request.param}"
    if not gradio.is_dir():
        pytest.fail(f"{gradio} does not exist; run `make test`, which installs gradio {request.param} there.")
    models = tmp_path_factory.mktemp("models")
    shipped.write_models(models / "facesnap")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(gradio),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(models / "gradio"),
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": "127.0.0.1",
    }
    log = models / "server.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "tests.page.page_server", str(port), str(models)]
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(address):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        server.kill()
        server.wait()


def answers(address: str) -> bool:
    """Whether the server serves the page. Proxies are bypassed."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(address, timeout=10).status == 200
    except OSError:
        return False


@pytest.fixture
def page(url: str, browser: Any) -> Iterator[Page]:
    """A newly opened page. JavaScript errors fail the test."""
    page = Page(url, browser)
    yield page
    page.close()
    assert page.errors == []
