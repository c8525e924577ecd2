"""Photos of the miniature's people in folders, and the miniature's networks."""

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
    """VGGFace2's layout: six people of three pictures each. Not to be changed."""
    folder = tmp_path_factory.mktemp("photos") / "people"
    for index in range(6):
        for shot, picture in enumerate(portraits(index, 3)):
            save(picture, folder / f"n{index:06d}" / f"{shot:04d}_01.png", f"person {index} in picture {shot}")
    return folder


@pytest.fixture(scope="session")
def built(people: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of `people`, built in one go in one process. Not to be changed."""
    out = tmp_path_factory.mktemp("built") / "shards"
    build([people], out, models, SETTINGS, per_shard=4, workers=0)
    return out


@pytest.fixture
def build_here(models: Path, tmp_path: Path) -> Callable[..., dict]:
    """Build folders into `tmp_path / "out"`, in this process."""

    def run(*folders: Path, **options) -> dict:
        return build(list(folders), tmp_path / "out", models, **{"settings": SETTINGS, "workers": 0, **options})

    return run
