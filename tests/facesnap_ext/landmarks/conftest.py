from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from facesnap_ext.landmarks.flame import Flame
from facesnap_ext.landmarks.predictor import LandmarkPredictor, load_predictor
from facesnap_lab.miniature.head import stand_in_flame, write_stand_in_flame
from tests.support.stand_in_deca import write_stand_in_deca


@pytest.fixture(scope="session")
def flame() -> Flame:
    return Flame(**stand_in_flame())


@pytest.fixture(scope="session")
def stand_in_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("stand-ins")
    deca, flame = folder / "deca.safetensors", folder / "flame.safetensors"
    write_stand_in_deca(deca)
    write_stand_in_flame(flame)
    return deca, flame


@pytest.fixture(scope="session")
def predictor(stand_in_files: tuple[Path, Path]) -> LandmarkPredictor:
    return load_predictor(*stand_in_files)


def blobs(seed: int, height: int, width: int) -> np.ndarray:
    """Return a colourful image that is smooth at the scale of a few pixels."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40
    waves = [random.normal(0, 1, 3) * np.sin(x * a + y * b + c)[..., None] for a, b, c in random.normal(0, 2, (12, 3))]
    return np.clip(128 + 40 * sum(waves), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    return [blobs(1, 300, 420), blobs(2, 512, 360)]


@pytest.fixture(scope="session")
def boxes() -> list[np.ndarray]:
    return [np.array([150.0, 60.0, 270.0, 210.0]), np.array([80.0, 120.0, 240.0, 330.0])]
