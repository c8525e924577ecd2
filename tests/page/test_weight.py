"""How much the accordion adds to the page, with both versions of gradio."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.page.browsed_page import VERSIONS

ROOT = Path(__file__).parents[2]
MOST = 62  # components of one tab with two people; two tabs and the options in the host's settings make 149
CODE = """
import json, sys
from pathlib import Path
from tests.page import page_server as server

class Nothing:
    infotext_fields = []

    def ui(self, is_img2img):
        return []

host = server.Host()
pages = [server.page(script, host) for script in (server.load_script(Path(sys.argv[1]), host), Nothing())]
print(json.dumps([[len(page.blocks), len(page.config["dependencies"])] for page in pages]))
"""


@pytest.fixture(params=VERSIONS)
def counts(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Components and event handlers of the page with the accordion, and of the page without it."""
    gradio = Path(sys.prefix) / f"gradio-{request.param}"
    if not gradio.is_dir():
        pytest.fail(f"{gradio} does not exist; run `make test`, which installs gradio {request.param} there.")
    environment = {**os.environ, "PYTHONPATH": str(gradio), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_the_accordion_adds_few_components(counts: Any) -> None:
    (components, handlers), (without, handlers_without) = counts
    assert components - without <= MOST
    assert handlers - handlers_without <= 7
