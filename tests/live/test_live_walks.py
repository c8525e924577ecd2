"""What a new user does: the first image of a new installation, and a person taken along to img2img."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.live.conftest import SCREENSHOTS
from tests.live.live_host import RANDOM, Host, Job, astronaut
from tests.live.live_page import Page

FILES = {  # the stand-ins that are downloaded instead of the parts of this name
    "antelopev2-detector": "stand-in-pack/scrfd_10g_bnkps.onnx",
    "antelopev2-recognition": "stand-in-pack/glintr100.onnx",
    "antelopev2-landmarks": "stand-in-pack/1k3d68.onnx",
    "instantid-identitynet": "ControlNetModel/diffusion_pytorch_model.safetensors",
    "instantid-adapter": "ip-adapter.bin",
}


@contextmanager
def served(folder: Path) -> Iterator[list[Job]]:
    """Serve the stand-ins in a folder, and yield what the probe's catalogue needs to download them."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        yield [
            {"name": name, "url": f"{address}/{file}", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, file in FILES.items()
            if (data := (folder / file).read_bytes())
        ]
        server.shutdown()


def test_the_first_image_takes_four_clicks_after_typing(
    empty_host: Host, browser: Any, request: pytest.FixtureRequest
) -> None:
    """Nothing has to be restarted or reloaded after the download, and a new page shows the new state."""
    folder = request.config.getoption("--parts", default="")
    if not folder or not empty_host.has("/facesnap-probe/state"):
        pytest.skip("--parts, a folder with stand-ins to download, was not given, or there is no probe")
    with served(Path(folder)) as parts:
        empty_host.post("/facesnap-probe/catalogue", parts)
        page = Page(empty_host, browser, SCREENSHOTS)
        page.open_accordion()
        assert page.starter() is not None
        page.download_starter()
    page.upload("references", astronaut())
    assert isinstance(image := page.generate(), np.ndarray), image
    page.close()
    again = Page(empty_host, browser, SCREENSHOTS)
    again.open_accordion()
    again.wait_until_complete()
    again.close()


def test_one_click_takes_photos_and_settings_to_img2img(page: Page) -> None:
    page.open_accordion()
    page.upload("references", astronaut())
    page.choose_model(RANDOM)
    page.set_slider("weight", 0.7)
    page.choose_pose("sliders")
    page.generate()
    page.send_to_img2img()
    assert page.carry_over() == (0.7, "sliders", ["photo0.png"])
    assert page.img2img_enabled()
