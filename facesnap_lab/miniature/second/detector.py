"""The second edition's face detector: the first edition's network, trained on images of 128 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from facesnap_ext.landmarks.points72 import five_points
from facesnap_lab.miniature.face_detector import Canvases, Detector, detection_loss, draw_canvases, evaluate, write
from facesnap_lab.miniature.second.dataset import World
from facesnap_lab.miniature.second.loop import CPU, Compute, fit, load_state, prepared
from facesnap_lab.training.data import on_device

STEPS, BATCH, RATE, SEED = 2000, 24, 3e-3, 6
FOUND, POINTS = 0.99, 2.0  # the gate: share of faces that are found, and error of the five points in pixels
IMAGES = 200  # for measuring


def train(world: World, out: Path, *, minutes: float, compute: Compute = CPU) -> tuple[Detector, int]:
    """Train or resume the detector, and return it on the CPU with the number of its steps."""
    torch.manual_seed(SEED)
    keypoints = five_points(np.asarray(world.points))
    detector = Detector().to(compute.device).train()

    def draw(step: int) -> Canvases:
        random = np.random.default_rng([SEED, step])
        rows = np.sort(random.integers(0, len(keypoints), BATCH * compute.batch))
        return draw_canvases(world.pictures[rows], world.boxes[rows], keypoints[rows], random)

    batch_of = prepared(draw, compute.threads)

    def loss_of(step: int) -> Tensor:
        return detection_loss(detector, on_device(batch_of(step), compute.device))

    done = fit(detector, loss_of, out, steps=STEPS, minutes=minutes, rate=RATE, decay=0.02, compute=compute)
    load_state(out, detector)
    return detector.cpu().eval(), done


def measure(detector: Detector, pack: Path, test: World) -> dict[str, Any]:
    """Write the detector into the pack, and return the figures of FaceSnap's detection with it.

    Args:
        pack: folder with `recognition.onnx`.
    """
    write(detector, pack / "detector.onnx")
    figures: dict[str, Any] = evaluate(pack, test.pictures, test.boxes, five_points(np.asarray(test.points)), IMAGES)
    figures["passed"] = bool(figures["found"] >= FOUND and figures["points_error_px"] <= POINTS)
    return figures
