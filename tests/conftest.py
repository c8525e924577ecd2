"""Fixtures that several tests share: real photos, and a face model pack made of small real networks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_models
import stand_in_models
from chromium import chromium

from facesnap_ext.faces import FacePack, load_pack
from facesnap_ext.miniature.stand_in_pack import scrfd_from_centerface
from facesnap_ext.photos import Photo, from_path


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


@pytest.fixture(scope="module")  # not longer: Playwright's event loop would be in the way of other tests
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright."""
    with chromium() as browser:
        yield browser
