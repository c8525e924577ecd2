"""Distil the second edition's base to four steps as a LoRA: the few-step model that L_id samples with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facesnap_lab.miniature.distil import Distillation
from facesnap_lab.miniature.second.base import captions_of
from facesnap_lab.miniature.second.loop import CPU, Compute, fit, load_state
from facesnap_lab.miniature.second.render import SIDE
from facesnap_lab.miniature.shipped import Sampler, load_sdxl, with_lora

STEPS, BATCH, RATE, RANK = 1200, 8, 5e-4, 16
FILE = "lightning.safetensors"
SCALE = 1.0  # the base's guidance is part of what the LoRA has learned


def train(pipe: Any, latents: Tensor, out: Path, *, minutes: float, compute: Compute = CPU) -> int:
    """Train or resume the LoRA on the latents of the training split, write it as `out/lightning.safetensors`, and
    return the number of steps."""
    torch.manual_seed(0)
    pipe.to(compute.device)
    distillation = Distillation(pipe, latents, captions_of("train", range(len(latents))), SIDE, RANK, bf16=True)

    def loss_of(step: int) -> Tensor:
        return distillation.loss(BATCH * compute.batch, torch.Generator().manual_seed(step))

    plan: dict[str, Any] = {"steps": STEPS, "minutes": minutes, "rate": RATE, "decay": 0.0}
    steps = fit(distillation.student, loss_of, out, **plan, compute=compute)
    load_state(out, distillation.student)
    distillation.save(out / FILE)
    return steps


def load_few_step(stages: Path, device: str | torch.device = "cpu") -> Sampler:
    """Load the base in the folder of all stages with the LoRA."""
    pipe = load_sdxl(stages / "base" / "pipeline").to(device)
    return with_lora(pipe, stages / "lightning" / FILE, SCALE)
