"""Folders with photos of the miniature world's people, and the miniature's networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from facesnap_lab.dataset.build import build
from facesnap_lab.miniature import shipped
from tests.support.dataset_photos import SETTINGS, portraits, save

for package in ("cv2", "insightface", "onnxruntime", "skimage", "tqdm", "webdataset"):
    pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shipped.write_models(folder)
    return folder


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of six people, three each, in VGGFace2's layout. Tests must not change them."""
    folder = tmp_path_factory.mktemp("photos") / "people"
    for index in range(6):
        for shot, image in enumerate(portraits(index, 3)):
            save(image, folder / f"n{index:06d}" / f"{shot:04d}_01.png", f"person {index} in photo {shot}")
    return folder


@pytest.fixture(scope="session")
def built(people: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of `people`, built without interruption in one process. Tests must not change them."""
    out = tmp_path_factory.mktemp("built") / "shards"
    build([people], out, models, SETTINGS, per_shard=4, workers=0)
    return out


@pytest.fixture
def build_here(models: Path, tmp_path: Path) -> Callable[..., dict]:
    """Return a function that builds folders into `tmp_path / "out"` in the current process."""

    def run(*folders: Path, **options) -> dict:
        return build(list(folders), tmp_path / "out", models, **{"settings": SETTINGS, "workers": 0, **options})

    return run
