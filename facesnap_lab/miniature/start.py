"""Write the inputs of `facesnap train` for the miniature: the FaceSnap file to start from, and the settings.

python -m facesnap_lab.miniature.start --base DIR --models DIR --shards DIR --out DIR
facesnap train OUT/train.yaml
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from facesnap_ext.identity.clip import load_image_encoder
from facesnap_ext.networks.mixer import MixerConfig
from facesnap_ext.weights.initialise import initialise
from facesnap_lab.miniature import identity
from facesnap_lab.miniature.base_model import HEAD_WIDTH
from facesnap_lab.miniature.dataset import SIDE

HINT_WIDTHS = (16, 32, 64)  # the VAE has four pixels per latent cell

SETTINGS: dict[str, Any] = {
    "resolution": SIDE,
    "reference": "other",
    "landmark_jitter": 0.7,
    "batch_size": 6,
    "steps": 7000,
    "learning_rate": 1.2e-3,
    "mixer_rate": 0.1,
    "warmup": 100,
    "schedule": "cosine",
    "ema": 0.99,
    "snr_weights": True,
    "outside": 0.7,
    "terminal": 0.5,
    "id_weight": 1.0,
    "id_rows": 3,
    "id_every": 1,
    "lightning_grad_steps": 4,
    "lightning_scale": 2.0,
    "mixed_precision": "no",
    "gradient_checkpointing": False,
    "workers": 0,
    "save_every": 250,
    "sample_every": 500,
    "sample_steps": 12,
    "sample_scale": 2.0,
    "license": "Apache-2.0",
    "trained_on": "FaceSnap's miniature world",
}


def write_start(
    base: Path,
    clip: Path,
    pack: Path,
    shards: Path,
    out: Path,
    lightning: Path | None = None,
    settings: Mapping[str, Any] = SETTINGS,
) -> Path:
    """Write `start.safetensors` and `train.yaml`, and return the latter."""
    unet = base / "unet"
    config = json.loads((unet / "config.json").read_text(encoding="utf-8"))
    width = config["cross_attention_dim"]
    mixer = MixerConfig(
        id_dim=identity.SIZE,
        clip_dim=load_image_encoder(clip).width,
        dim=width,
        feedforward=4 * width,
        heads=width // HEAD_WIDTH,
    )
    initialise(
        unet / "diffusion_pytorch_model.safetensors",
        out / "start.safetensors",
        head_dim=HEAD_WIDTH,
        size_dim=config["addition_time_embed_dim"],
        dtype=torch.float16,
        mixer=mixer,
        hint_widths=HINT_WIDTHS,
    )
    paths = {
        "base": base,
        "start": out / "start.safetensors",
        "clip": clip,
        "face_pack": pack,
        "shards": shards / "*.tar",
        "out": out / "run",
    }
    if lightning is not None:
        paths["lightning"] = lightning
    file = out / "train.yaml"
    values = {name: str(path.resolve()) for name, path in paths.items()} | dict(settings)
    file.write_text(json.dumps(values, indent=2), encoding="utf-8")  # JSON is YAML
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prepare the training of FaceSnap in the miniature.")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lightning", type=Path)
    options = parser.parse_args()
    models = options.models
    write_start(options.base, models / "clip", models / "identity", options.shards, options.out, options.lightning)
