"""What FFRNet costs beside the UNet and beside a ControlNet on both rows: FLOPs at SDXL's real size, and seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from facesnap_ext.ffrnet import FFRNet, FFRNetConfig

ROWS = 2  # conditional and unconditional
TEXT_TOKENS = 77
IDENTITY_TOKENS = 16
SHAPE: dict[str, Any] = {
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
}
SDXL_WIDTHS = (320, 640, 1280)
SMALL_WIDTHS, SMALL_PIXELS = (64, 128, 256), 512


def bench_ffrnet(repeats: int = 5) -> dict[str, Any]:
    """FLOPs and seconds of one CFG step.

    FLOPs are counted on the meta device at 1024² with SDXL's widths. Seconds are medians of networks that take turns in
    this process: with a GPU at full size in half precision, else at a fifth of the widths and 512².

    Returns:
        `flop_ratio`: FFRNet once (landmark embedding included) to the UNet's two rows. `flop_ratio_both_rows`: the same
        for a ControlNet, which runs on both. `seconds`: of one step each. `size`: of what was timed.
    """
    flops = count_flops()
    if torch.cuda.is_available():
        device, dtype, widths, pixels = torch.device("cuda"), torch.float16, SDXL_WIDTHS, 1024
    else:
        device, dtype, widths, pixels = torch.device("cpu"), torch.float32, SMALL_WIDTHS, SMALL_PIXELS
    with device:
        steps = _steps(widths, pixels, dtype, device)
    return {
        "flop_ratio": round(flops["ffrnet"] / flops["unet"], 4),
        "flop_ratio_both_rows": round(flops["controlnet_both_rows"] / flops["unet"], 4),
        "seconds": _take_turns(steps, repeats, device),
        "size": {"pixels": pixels, "widths": widths, "device": device.type, "dtype": str(dtype).split(".")[-1]},
    }


def count_flops(widths: tuple[int, ...] = SDXL_WIDTHS, pixels: int = 1024) -> dict[str, int]:
    """FLOPs of one CFG step of each network, counted on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    counted = {}
    with torch.device("meta"), torch.no_grad():
        for name, step in _steps(widths, pixels, torch.float32, torch.device("meta")).items():
            with FlopCounterMode(display=False) as counter:
                step()
            counted[name] = counter.get_total_flops()
    return counted


def _steps(
    widths: tuple[int, ...], pixels: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """One CFG step of each network, as a function without arguments."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    shape = {**SHAPE, "block_out_channels": widths, "attention_head_dim": tuple(width // 64 for width in widths)}
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    unet = UNet2DConditionModel(up_block_types=up, sample_size=pixels // 8, **shape)
    controlnet = ControlNetModel(**shape)
    config = FFRNetConfig.from_shapes({key: tuple(t.shape) for key, t in controlnet.state_dict().items()})
    ffrnet = FFRNet(config)
    for network in (unet, controlnet, ffrnet):
        network.eval().requires_grad_(False)
        if dtype != torch.float32:
            network.to(dtype)

    def random(*size: int) -> Tensor:
        return torch.rand(*size, device=device, dtype=dtype)

    x, picture = random(ROWS, 4, pixels // 8, pixels // 8), random(1, 3, pixels, pixels)
    text, tokens = random(ROWS, TEXT_TOKENS, 2048), random(ROWS, IDENTITY_TOKENS, 2048)
    added = {"text_embeds": random(ROWS, 1280), "time_ids": random(ROWS, 6)}
    timesteps = torch.full((ROWS,), 500.0, device=device)
    pictures = picture.expand(ROWS, -1, -1, -1)
    return {
        "unet": lambda: unet(x, timesteps, text, added_cond_kwargs=added),
        "ffrnet": lambda: ffrnet(
            x[:1], timesteps[:1], ffrnet.embed_tokens(tokens[:1]), ffrnet.embed_landmarks(picture)
        ),
        "controlnet_both_rows": lambda: controlnet(x, timesteps, tokens, pictures, added_cond_kwargs=added),
    }


def _take_turns(steps: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with torch.no_grad():
        for turn in range(repeats + 1):  # the first one warms up
            for name, step in steps.items():
                _wait_for(device)
                began = time.perf_counter()
                step()
                _wait_for(device)
                if turn:
                    seconds[name].append(time.perf_counter() - began)
    return {name: round(statistics.median(times), 4) for name, times in seconds.items()}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
