"""Shared parts of training the miniature's perception networks: the loop, image processing, ONNX export and figures.

Each network has its own module with a command: `identity`, `face_detector`, `regressor`, `clip_pair`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.files import atomic_write

OPSET = 13  # supported by onnxruntime 1.17 and every insightface version


def fit(
    modules: Iterable[nn.Module], loss_of: Callable[[float], Tensor], minutes: float, rate: float, decay: float = 0.02
) -> int:
    """Train for a given time with AdamW: the learning rate rises over the first 5 % and falls to zero along a cosine.

    Args:
        loss_of: draws a batch and returns its loss; its argument is the training progress, 0…1.

    Returns:
        The number of steps.
    """
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=decay)
    began, step, total = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, done / 0.05 + 0.02) * (0.5 + 0.5 * math.cos(math.pi * done))
        loss = loss_of(done)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        step, total = step + 1, total + loss.item()
        if step % 100 == 0:
            print(f"{step} steps, {done:.0%}, loss {total / 100:.4f}", flush=True)
            total = 0.0
    return step


def to_tensor(pictures: np.ndarray) -> Tensor:
    """Convert [N,S,S,3] uint8 RGB to [N,3,S,S] in -1…1, the range of insightface's networks and of VAEs."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def warp(pictures: np.ndarray, transforms: np.ndarray, side: int) -> np.ndarray:
    """Warp images [N,H,W,3] uint8 to [N,side,side,3] by transforms [N,2,3] of pixel indices; black outside."""
    import cv2

    return np.stack([cv2.warpAffine(picture, move, (side, side)) for picture, move in zip(pictures, transforms)])


def degrade(pictures: np.ndarray, random: np.random.Generator, strength: float) -> np.ndarray:
    """Degrade images [N,S,S,3] uint8 as `degrade_tensor` does."""
    degraded = degrade_tensor(to_tensor(pictures), random, strength)
    return ((degraded.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()


def degrade_tensor(x: Tensor, random: np.random.Generator, strength: float) -> Tensor:
    """Degrade images [N,3,S,S] in -1…1 like cameras and codecs: brightness, contrast, blur, blocks and noise.

    Strength 1 resembles a poor VAE or JPEG; 0.3 is hardly visible. S is a multiple of 8. The result is not clipped.
    """
    count, side = len(x), x.shape[-1]

    def each(low: float, high: float, images: int = count) -> Tensor:
        return torch.from_numpy(random.uniform(low, high, (images, 1, 1, 1)).astype(np.float32))

    def change(share: float, amount: Tensor, changed: Callable[[Tensor], Tensor]) -> None:
        """Move a share of the images towards what they would change to; the others are not computed."""
        chosen = torch.from_numpy(random.random(count) < share)
        if chosen.any():
            x[chosen] += amount[chosen] * (changed(x[chosen]) - x[chosen])

    def coarser(part: Tensor) -> Tensor:
        return F.interpolate(F.avg_pool2d(part, 2), size=side, mode="bilinear", align_corners=False)

    def blocky(part: Tensor) -> Tensor:
        return _quantised(part, each(0.02, 0.5, len(part)))

    def noisy(part: Tensor) -> Tensor:
        return part + torch.from_numpy(random.standard_normal(part.shape, dtype=np.float32))

    x = x * (1 + strength * each(-0.3, 0.3)) + strength * each(-0.2, 0.2)
    change(0.7, strength * each(0, 1), _blurred)
    if strength > 0.5:
        change(0.3, each(0, 1), coarser)
        change(0.5, each(1, 1), blocky)
    change(0.7, strength * each(0, 0.09), noisy)
    return x


def _blurred(x: Tensor) -> Tensor:
    """Average over 3×3 pixels, separably, which is faster than pooling."""
    wide = F.pad(x, (1, 1, 1, 1), mode="replicate")
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    return (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9


def _quantised(x: Tensor, step: Tensor) -> Tensor:
    """Quantise 8×8 blocks in JPEG's cosine basis, with steps that grow with frequency."""
    k = torch.arange(8.0)
    basis = torch.cos(math.pi * k[:, None] * (2 * k + 1) / 16) * torch.where(k == 0, 0.5**0.5, 1.0)[:, None] / 2
    blocks = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8))
    waves = torch.einsum("fy,nchywx,gx->nchfwg", basis, blocks, basis)
    steps = step[..., None, None] * (1 + 0.35 * (k[:, None, None] + k))
    waves = (waves / steps).round() * steps
    return torch.einsum("fy,nchfwg,gx->nchywx", basis, waves, basis).reshape(x.shape)


def export(network: nn.Module, example: Tensor, path: Path, names: dict[str, dict[int, str]]) -> None:
    """Export a network as ONNX, with weights in half precision that the runtime casts back at load time.

    Args:
        names: names of the input and then the outputs, each with its dynamic axes.
    """
    import warnings

    import onnx
    from onnx import helper, numpy_helper

    path.parent.mkdir(parents=True, exist_ok=True)
    inputs, *outputs = names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the newer exporter needs an additional package
        torch.onnx.export(
            network.eval(),
            (example,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=[inputs],
            output_names=outputs,
            dynamic_axes=names,
        )
    model = onnx.load(str(path))
    casts = []
    for index, tensor in enumerate(model.graph.initializer):
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.size > 256:
            half = numpy_helper.from_array(array.astype(np.float16), f"{tensor.name}.half")
            casts.append(helper.make_node("Cast", [half.name], [tensor.name], to=onnx.TensorProto.FLOAT))
            model.graph.initializer[index].CopyFrom(half)
    for i, node in enumerate([*casts, *model.graph.node]):
        node.name = f"node{i}"  # insightface interprets names that begin with Sub and Mul
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def write_figures(folder: Path, name: str, figures: dict[str, Any]) -> None:
    """Write a network's figures to `quality.json` in the folder and keep those of other networks."""
    file = folder / "quality.json"
    all_figures = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    all_figures[name] = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
    with atomic_write(file) as part:
        part.write_text(json.dumps(all_figures, indent=2) + "\n", encoding="utf-8")
    print(name, json.dumps(all_figures[name]), flush=True)
