"""The routes on a page with a login, with both versions of gradio."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.page.browsed_page import VERSIONS

ROOT = Path(__file__).parents[2]
CODE = """
import json, sys
from pathlib import Path
import huggingface_hub
if not hasattr(huggingface_hub, "HfFolder"):
    huggingface_hub.HfFolder = None
import gradio, requests
from facesnap_ext.ui import routes
from facesnap_ext.weights.model_files import ModelFiles
with gradio.Blocks() as demo:
    gradio.HTML("page")
app, url, _ = demo.launch(auth=[("bert", "sesame")], prevent_thread_lock=True, quiet=True)
routes.add_routes(app, lambda: ModelFiles(Path(sys.argv[1])), lambda: None)
session, route = requests.Session(), f"{url}facesnap/models"
before = session.get(route).status_code
session.post(f"{url}login", data={"username": "bert", "password": "wrong"})
wrong = session.get(route).status_code
session.post(f"{url}login", data={"username": "bert", "password": "sesame"})
answers = [before, wrong, session.get(route).status_code, requests.get(route).status_code]
demo.close()
print(json.dumps(answers))
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_the_routes_require_the_login_of_the_page(tmp_path, version):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(sys.prefix) / f"gradio-{version}"), str(ROOT)]),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(tmp_path / "gradio"),
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [401, 401, 200, 401]
