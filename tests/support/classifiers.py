"""Tiny image classifiers in transformers' layout, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


def make_classifier(folder: Path, labels=("normal", "nsfw"), image: int = 32, **config) -> Path:
    """Write a ViT with random weights, as transformers saves it, and return its folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=image,
        patch_size=8,
        id2label=dict(enumerate(labels)),
        initializer_range=0.4,
        **config,
    )
    model = transformers.ViTForImageClassification(settings)
    for parameter in model.parameters():  # biases and norms too, which would be 0 and 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    side = {"height": image, "width": image}
    transformers.ViTImageProcessor(size=side, image_mean=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


def make_decided(folder: Path, label: str, labels=("normal", "nsfw")) -> Path:
    """Write a classifier that gives this label to every image."""
    from safetensors.torch import load_file, save_file

    make_classifier(folder, labels)
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"].zero_()
    tensors["classifier.bias"] = torch.tensor([20.0 * (one == label) for one in labels])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def change_json(file: Path, **values) -> None:
    """Set values of a JSON file; None removes them."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
