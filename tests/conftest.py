"""Fixtures that several tests share, the markers `lab` and `browser`, and how tests are spread over processes."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if WORKERS > 1:  # processes share the cores; set before torch is imported, and inherited by subprocesses
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

import hypothesis
import numpy as np
import pytest

from facesnap_ext.hosts import webui
from facesnap_ext.identity.faces import FacePack, load_pack
from facesnap_ext.photos import Photo, from_path
from tests.support import mock_webui, onnx_memo, real_models, stand_in_models
from tests.support.chromium import chromium
from tests.support.stand_in_pack import scrfd_from_centerface

hypothesis.settings.register_profile(  # time limits fail on a busy machine
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")
onnx_memo.install()

LAB = Path(__file__).with_name("facesnap_lab")
PAGE = "tests/page/"
LONGEST = ("test_install.py", "test_detection.py", "test_synchronisation.py")
MOST_WORKERS = 8  # each one holds torch and the networks of its tests, 1 to 3 GB


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The number of processes for `pytest -n auto`: one more than cores, because browser tests mostly wait."""
    return min((os.cpu_count() or 1) + 1, MOST_WORKERS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files are spread over processes, but all tests of the page run in one, with the same servers and browsers."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return PAGE if nodeid.startswith(PAGE) else super()._split_scope(nodeid)

    return Files(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_finish() -> None:
    """What has been imported and collected stays until the end, so the garbage collector need not look through it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests. Parallel runs begin with the longest files, so that no process is left idle at the end."""
    for item in items:
        if LAB in item.path.parents:
            item.add_marker("lab")
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
    if WORKERS > 1:
        items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("browser", "lab")])
        items.sort(key=lambda item: item.path.name not in LONGEST)
        items.sort(key=lambda item: not item.nodeid.startswith(PAGE))


@pytest.fixture(scope="session")
def centerface_file() -> Path:
    """CenterFace's ONNX file, as published."""
    pytest.importorskip("onnx")
    try:
        return real_models.centerface()
    except real_models.Unavailable as reason:
        pytest.skip(f"CenterFace is not available: {reason}")


@pytest.fixture(scope="session")
def face_pack_folder(centerface_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like antelopev2, with small trained networks in the format of SCRFD and ArcFace."""
    try:
        embedding = real_models.face_embedding()
    except real_models.Unavailable as reason:
        pytest.skip(f"the face embedding is not available: {reason}")
    folder = tmp_path_factory.mktemp("pack")
    scrfd_from_centerface(centerface_file, folder / "scrfd_centerface.onnx")
    shutil.copy(embedding, folder)
    return folder


@pytest.fixture(scope="session")
def face_pack(face_pack_folder: Path) -> FacePack:
    """The face model pack in `face_pack_folder`."""
    pytest.importorskip("insightface")
    return load_pack(face_pack_folder)


@pytest.fixture(scope="session")
def astronaut() -> Photo:
    """Eileen Collins, 512x512 (NASA, public domain): one frontal face, left of the centre."""
    data = pytest.importorskip("skimage.data")
    return Photo(np.ascontiguousarray(data.astronaut()), "astronaut.png")


@pytest.fixture(scope="session")
def mirrored(astronaut: Photo) -> Photo:
    """`astronaut`, mirrored: the same person in a different photo."""
    return Photo(np.ascontiguousarray(astronaut.pixels[:, ::-1]), "mirrored.png")


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Reset accelerate's per-process state, which does not accept a second precision."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def grace_hopper() -> Photo:
    """Grace Hopper, 512x600 (US Navy, public domain): one face, under a cap."""
    cbook = pytest.importorskip("matplotlib.cbook")
    return from_path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


@pytest.fixture(scope="session")
def group() -> Photo:
    """insightface's test photo, 1280x886: six people side by side."""
    insightface = pytest.importorskip("insightface")
    path = Path(insightface.__file__).parent / "data" / "images" / "t1.jpg"
    if not path.is_file():
        pytest.skip("this version of insightface does not include t1.jpg")
    return from_path(path)


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with stand-ins for every model. Tests that modify it must copy it first."""
    return stand_in_models.make(tmp_path_factory.mktemp("models"))


@pytest.fixture
def host(stand_ins: Path, monkeypatch: pytest.MonkeyPatch):
    """The script in a mock WebUI whose host adapter records its calls."""
    names = ("gradio", "modules")
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in names}
    models = stand_ins.parent
    seen = mock_webui.install(models)
    monkeypatch.setattr(webui, "_engine", None)
    spec = importlib.util.spec_from_file_location("facesnap_script", mock_webui.SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    seen.module, seen.script = module, module.Script()
    seen.script.args_from, seen.script.args_to = 0, None
    monkeypatch.setattr(module.host, "attach", lambda p, people: seen.calls.append(("attach", people)))
    monkeypatch.setattr(module.host, "refuse", lambda p, refusal: seen.calls.append(("refuse", refusal)))
    monkeypatch.setattr(module.host, "detach", lambda p: seen.calls.append("detach"))
    yield seen
    for name in [name for name in sys.modules if name.split(".")[0] in names]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture(scope="module")  # only for that long: Playwright's event loop disturbs other tests
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright."""
    with chromium() as browser:
        yield browser
