"""The second edition's DECA: codes of shape, expression and pose from crops of 96 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from facesnap_ext.landmarks.deca import Deca, save_deca
from facesnap_ext.landmarks.flame import save_flame
from facesnap_lab.miniature.regressor import (
    CODE_SIZES,
    CropBatch,
    LandmarkDecoder,
    code_statistics,
    codes_loss,
    draw_crops,
    evaluate,
    new_deca,
    predict_codes,
)
from facesnap_lab.miniature.second.dataset import World
from facesnap_lab.miniature.second.loop import CPU, Compute, fit, load_state, prepared
from facesnap_lab.miniature.second.render import head
from facesnap_lab.training.data import on_device

CROP = 96
STEPS, BATCH, RATE, SEED = 5000, 96, 2e-3, 4
POINTS, EXPRESSION = 1.0, 0.8  # the gate: error of the 72 points in pixels, and correlation of the expression's codes


class Trainee(torch.nn.Module):
    """The encoder, and the statistics of its codes, which must not change as images are added."""

    mean: Tensor
    spread: Tensor

    def __init__(self, statistics: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.deca = new_deca(CROP)
        for name, values in zip(("mean", "spread"), statistics):
            self.register_buffer(name, values)


def train(world: World, out: Path, *, minutes: float, compute: Compute = CPU) -> tuple[Deca, int]:
    """Train or resume the encoder, and return it on the CPU with the number of its steps."""
    torch.manual_seed(SEED)
    decoder = LandmarkDecoder(head(), compute.device)
    model = Trainee(code_statistics(world, CROP)).to(compute.device).train()

    def draw(step: int) -> CropBatch:
        random = np.random.default_rng([SEED, step])
        rows = np.sort(random.integers(0, len(world.codes), BATCH * compute.batch))
        return draw_crops(world, rows, CROP, random)

    batch_of = prepared(draw, compute.threads)

    def loss_of(step: int) -> Tensor:
        batch = on_device(batch_of(step), compute.device)
        return codes_loss(model.deca, decoder, (model.mean, model.spread), batch)

    done = fit(model, loss_of, out, steps=STEPS, minutes=minutes, rate=RATE, decay=0.02, compute=compute)
    load_state(out, model)
    model.cpu()
    predict_codes(model.deca, (model.mean, model.spread))
    return model.deca.eval(), done


def write_flame(file: Path) -> None:
    """Write the second edition's head, which replaces FLAME."""
    save_flame(file, vars(head()), "FaceSnap's miniature head")


def measure(deca: Deca, out: Path, test: World, every: int = 6) -> dict[str, Any]:
    """Write DECA and the head to the folder, and return the figures of FaceSnap's predictor with them."""
    tensors = {key: tensor.detach() for key, tensor in deca.half().state_dict().items()}
    save_deca(out / "deca.safetensors", tensors, "FaceSnap's miniature world", CODE_SIZES, CROP)
    write_flame(out / "flame.safetensors")
    figures: dict[str, Any] = evaluate(
        out / "deca.safetensors", out / "flame.safetensors", test, LandmarkDecoder(head()), every
    )
    figures["passed"] = bool(figures["error_px"] <= POINTS and figures["expression_correlation"] >= EXPRESSION)
    return figures
