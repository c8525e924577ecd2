"""Fixtures that several tests share: real photos, and a face model pack made of small real networks."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facesnap_ext.hosts import webui
from facesnap_ext.identity.faces import FacePack, load_pack
from facesnap_ext.photos import Photo, from_path
from tests.support import mock_webui, real_models, stand_in_models
from tests.support.chromium import chromium
from tests.support.stand_in_pack import scrfd_from_centerface


@pytest.fixture(scope="session")
def centerface_file() -> Path:
    """CenterFace's own ONNX file."""
    pytest.importorskip("onnx")
    try:
        return real_models.centerface()
    except real_models.Unavailable as reason:
        pytest.skip(f"no CenterFace: {reason}")


@pytest.fixture(scope="session")
def face_pack_folder(centerface_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like antelopev2's, of small real networks: SCRFD-shaped detector, ArcFace-shaped embedding."""
    try:
        embedding = real_models.face_embedding()
    except real_models.Unavailable as reason:
        pytest.skip(f"no face embedding: {reason}")
    folder = tmp_path_factory.mktemp("pack")
    scrfd_from_centerface(centerface_file, folder / "scrfd_centerface.onnx")
    shutil.copy(embedding, folder)
    return folder


@pytest.fixture(scope="session")
def face_pack(face_pack_folder: Path) -> FacePack:
    """The pack of `face_pack_folder`, loaded."""
    pytest.importorskip("insightface")
    return load_pack(face_pack_folder)


@pytest.fixture(scope="session")
def astronaut() -> Photo:
    """Eileen Collins, 512x512 (NASA, public domain): one face, looking at us, left of the middle."""
    data = pytest.importorskip("skimage.data")
    return Photo(np.ascontiguousarray(data.astronaut()), "astronaut.png")


@pytest.fixture(scope="session")
def mirrored(astronaut: Photo) -> Photo:
    """`astronaut` from the other side: the same person, another picture."""
    return Photo(np.ascontiguousarray(astronaut.pixels[:, ::-1]), "mirrored.png")


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate has one state a process, and refuses another precision."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def grace_hopper() -> Photo:
    """Grace Hopper, 512x600 (US Navy, public domain): one face with a cap."""
    cbook = pytest.importorskip("matplotlib.cbook")
    return from_path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


@pytest.fixture(scope="session")
def group() -> Photo:
    """insightface's own test photo, 1280x886: six people side by side."""
    insightface = pytest.importorskip("insightface")
    path = Path(insightface.__file__).parent / "data" / "images" / "t1.jpg"
    if not path.is_file():
        pytest.skip("this insightface has no t1.jpg")
    return from_path(path)


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder full of stand-ins; tests that change it copy it first."""
    return stand_in_models.make(tmp_path_factory.mktemp("models"))


@pytest.fixture
def host(stand_ins: Path, monkeypatch: pytest.MonkeyPatch):
    """The script in a mock WebUI whose adapter notes what it is told."""
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


@pytest.fixture(scope="module")  # not longer: Playwright's event loop would be in the way of other tests
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright."""
    with chromium() as browser:
        yield browser
