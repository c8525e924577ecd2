"""The files that a training run in the tiny world starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from training_world import SIDE, make_start, samples, sdxl

from facesnap_ext.miniature.stand_in_pack import stand_in_arcface
from facesnap_ext.training.config import TrainConfig
from facesnap_ext.training.shards import write_shards
from facesnap_ext.weights import facesnap_file

for package in ("accelerate", "diffusers", "onnx", "peft", "tensorboard", "webdataset", "yaml"):
    pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, start.safetensors, clip, pack, shards/*.tar"""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("world")
    sdxl().save_pretrained(folder / "base")
    make_start(folder / "base", folder / "start.safetensors")
    (folder / "pack").mkdir()
    stand_in_arcface(folder / "pack" / "recognition.onnx", 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        CLIPVisionModel(CLIPVisionConfig(**size, image_size=28, patch_size=14)).save_pretrained(folder / "clip")
    write_shards(folder / "shards", samples(), per_shard=6)
    return folder


@pytest.fixture(scope="session")
def random_start(world: Path) -> Path:
    """A start file whose zero convolutions are not zero, so that every gradient is alive."""
    weights = facesnap_file.load(world / "start.safetensors")
    tiny.randomise(weights.ffrnet)
    path = world / "random.safetensors"
    facesnap_file.save(path, replace(weights.info, trained_on="nothing, random"), weights.mixer, weights.ffrnet)
    return path


@pytest.fixture
def config(world: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        base=world / "base",
        start=world / "start.safetensors",
        clip=world / "clip",
        face_pack=world / "pack",
        shards=tuple(sorted((world / "shards").glob("*.tar"))),
        out=tmp_path / "out",
        resolution=SIDE,
        batch_size=2,
        steps=4,
        learning_rate=1e-3,
        warmup=2,
        ema=0.9,
        id_rows=1,
        lightning_steps=2,
        mixed_precision="no",
        gradient_checkpointing=False,
        workers=0,
        log_every=1,
        save_every=2,
        sample_every=0,
        sample_count=2,
        sample_steps=2,
    )
