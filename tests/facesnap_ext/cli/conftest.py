"""Photos as files, for commands that read them from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from facesnap_ext.photos import Photo


@pytest.fixture
def photo_file(astronaut: Photo, tmp_path: Path) -> Path:
    path = tmp_path / "astronaut.png"
    Image.fromarray(astronaut.pixels).save(path)
    return path


@pytest.fixture
def mirrored_file(mirrored: Photo, tmp_path: Path) -> Path:
    path = tmp_path / "mirrored.png"
    Image.fromarray(mirrored.pixels).save(path)
    return path


@pytest.fixture
def faceless_file(tmp_path: Path) -> Path:
    path = tmp_path / "grey.png"
    Image.new("RGB", (200, 200), "grey").save(path)
    return path
