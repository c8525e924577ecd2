"""Tiny weight files of many kinds, with the keys of real ones."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(shape) for key, shape in shapes.items()}


LDM_UNET = {
    "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (8, 768),
    "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
}
SDXL = {
    **LDM_UNET,
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (8, 2048),
    "model.diffusion_model.label_emb.0.0.weight": (8, 2816),
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (9, 8),
}
CONTROLNET = {
    "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, 768),
}

# by kind: the keys and shapes by which real files are recognised
KINDS = {
    "SDXL": {**SDXL, "conditioner.embedders.1.model.ln_final.weight": (8,)},
    "SDXL_REFINER": {
        **SDXL,
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (8, 1280),
        "model.diffusion_model.label_emb.0.0.weight": (8, 2560),
    },
    "SD15": LDM_UNET,
    "SD2": {**LDM_UNET, "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (8, 1024)},
    "SD15_CONTROLNET": CONTROLNET,
    "SD2_CONTROLNET": {**CONTROLNET, "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, 1024)},
    "SDXL_CONTROLNET": {**CONTROLNET, "add_embedding.linear_1.weight": (8, 2816)},
    "SDXL_CONTROLNET_LDM": {
        "control_model.input_hint_block.0.weight": (16, 3, 3, 3),
        "control_model.label_emb.0.0.weight": (8, 2816),
    },
    "CONTROL_LORA": {"lora_controlnet": (0,), "input_hint_block.0.weight": (16, 3, 3, 3)},
    "SDXL_UNET": {
        "down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
        "conv_norm_out.weight": (8,),
        "add_embedding.linear_1.weight": (8, 2816),
    },
    "OTHER_UNET": {"down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3), "conv_norm_out.weight": (8,)},
    "LORA": {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (4, 8)},
    "INSTANTID_ADAPTER": {
        "image_proj.latents": (1, 16, 1280),
        "image_proj.proj_in.weight": (1280, 512),
        "ip_adapter.1.to_k_ip.weight": (640, 2048),
    },
    "IP_ADAPTER": {"image_proj.proj.weight": (8192, 1024), "ip_adapter.1.to_k_ip.weight": (320, 2048)},
    "CLIP_VISION": {"vision_model.embeddings.patch_embedding.weight": (1280, 3, 14, 14)},
    "CLIP_TEXT": {"text_model.embeddings.token_embedding.weight": (49408, 8)},
    "IMAGE_CLASSIFIER": {"vit.embeddings.cls_token": (1, 1, 768), "classifier.weight": (2, 768)},
    "VAE": {"decoder.conv_in.weight": (512, 4, 3, 3)},
    "DECA_ORIGINAL": {"E_flame.encoder.conv1.weight": (64, 3, 7, 7), "E_detail.encoder.conv1.weight": (64, 3, 7, 7)},
    "UNKNOWN": {"weight": (3,)},
}


def write(path: Path, shapes: dict[str, tuple[int, ...]], form: str = "safetensors", **metadata: str) -> Path:
    if form.startswith("torch"):
        torch.save({"state_dict": tensors(shapes)}, path, _use_new_zipfile_serialization=form == "torch")
    else:
        save_file(tensors(shapes), path, metadata or None)
    return path
