"""The page served by `page_server.py`, with both versions of gradio, and a browser that shows it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from facesnap_ext.weights import identity_file
from facesnap_ext.weights.identity_file import Identity
from facesnap_lab.miniature import shipped
from tests.page.browsed_page import VERSIONS, Page
from tests.support.chromium import chromium

ROOT = Path(__file__).parents[2]
ONLY_THE_PAGE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # neither fonts nor analytics
HALF_SIZE = "--force-device-scale-factor=0.5"  # without a GPU, drawing takes longer than anything else
PATIENCE = 600  # seconds to wait for the server, on a busy machine


GRADIO_FOLDERS: dict[str, Path] = {}
"""The folders in which gradio keeps its temporary files, by the address of the page."""


@pytest.fixture
def gradio_folder(url: str) -> Path:
    return GRADIO_FOLDERS[url]


@pytest.fixture(scope="session", params=VERSIONS)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the running page."""
    models = tmp_path_factory.mktemp("models")
    shipped.write_models(models / "facesnap")
    write_hostile_files(models / "facesnap")
    with serve(request.param, models) as address:
        yield address


@pytest.fixture(scope="module", params=VERSIONS[-1:])  # what is shown there is not drawn by gradio
def empty_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page without model files."""
    with serve(request.param, tmp_path_factory.mktemp("empty")) as address:
        yield address


@contextmanager
def serve(version: str, models: Path) -> Iterator[str]:
    """Serve the page with a version of gradio, and yield its address.

    Args:
        models: the WebUI's model folder.
    """
    gradio = Path(sys.prefix) / f"gradio-{version}"
    if not gradio.is_dir():
        pytest.fail(f"{gradio} does not exist; run `make test`, which installs gradio {version} there.")
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
        GRADIO_FOLDERS[address] = models / "gradio"
        yield address
    finally:
        server.kill()
        server.wait()


def write_hostile_files(folder: Path) -> None:
    """Add names, contents and stored hashes that would run a script in a page that took them for HTML."""
    script = "'><img src=x onerror=window.hostile=1>"
    (folder / f"{script}.safetensors").write_bytes(script.encode())
    (folder / "identities").mkdir(exist_ok=True)
    networks = dict.fromkeys(("face_pack",), "0" * 64)
    identity = Identity(script, torch.ones(1, 512), None, None, ("0" * 10,), networks)
    identity_file.save(folder / "identities" / f"{script}.safetensors", identity)
    hashes = {str(path): [path.stat().st_size, path.stat().st_mtime_ns, script] for path in folder.rglob("*.*")}
    (folder / "hashes.json").write_text(json.dumps(hashes))


def answers(address: str) -> bool:
    """Whether the server serves the page. Proxies are bypassed."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(address, timeout=10).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright, without the network; see the fixture of the same name for all tests."""
    with chromium(ONLY_THE_PAGE, HALF_SIZE) as browser:
        yield browser


@pytest.fixture
def page(url: str, browser: Any) -> Iterator[Page]:
    """A newly opened page. JavaScript errors fail the test."""
    page = Page(url, browser)
    yield page
    page.close()
    assert page.errors == []
