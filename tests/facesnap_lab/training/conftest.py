"""The files that training runs in the tests use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from facesnap_ext.weights import facesnap_file
from facesnap_lab.training.config import TrainConfig
from tests.support import tiny
from tests.support.training_world import train_config

for package in ("accelerate", "diffusers", "onnx", "peft", "tensorboard", "webdataset", "yaml"):
    pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.fixture(scope="session")
def random_start(world: Path) -> Path:
    """A start file with random weights in its zero convolutions, so that no gradient vanishes."""
    weights = facesnap_file.load(world / "start.safetensors")
    tiny.randomise(weights.ffrnet)
    path = world / "random.safetensors"
    facesnap_file.save(path, replace(weights.info, trained_on="nothing, random weights"), weights.mixer, weights.ffrnet)
    return path


@pytest.fixture
def config(world: Path, tmp_path: Path) -> TrainConfig:
    return train_config(world, tmp_path / "out")
