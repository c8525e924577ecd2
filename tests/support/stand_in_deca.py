"""An untrained encoder in DECA's layout that answers with a sensible face, for tests and the demo.

DECA's weights may not be passed on. This one has DECA's keys and codes at small widths and random weights. Its camera
frames the stand-in head (`head.py`) as DECA's frames a face; all codes vary a little with the picture, in a way that is
the same each time but has nothing to do with the face in it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.landmarks.deca import CODE_SIZES, IMAGE_SIZE, Deca, save_deca
from facesnap_lab.miniature.head import face_layout

WIDTHS = (4, 8, 12, 16)  # of the four levels, each of one block; a block's output is four times as wide
HIDDEN = 64
FACE_IN_CROP = 0.70  # the points' extent over the crop's side
SPREADS = {
    "shape": 0.8,
    "tex": 0.1,
    "exp": 0.4,
    "pose": (0.06, 0.12, 0.03, 0.03, 0, 0),
    "cam": (0.2, 0.002, 0.002),
    "light": 0.1,
}


def stand_in_deca(seed: int = 0) -> dict[str, Tensor]:
    """A state dict of `Deca` with DECA's 236 codes.

    Over pictures of all kinds the shape codes vary by 0.8 standard deviations, the expression by 0.4, the head's yaw by
    0.12 radians, the camera by 2 %; the mouth is slightly open.
    """
    generator = torch.Generator().manual_seed(seed)
    deca = Deca(_shapes(), CODE_SIZES)
    for tensor in deca.parameters():
        if tensor.ndim > 1:
            tensor.data.normal_(std=(2 / tensor[0].numel()) ** 0.5, generator=generator)
    first, last = (layer for layer in deca.layers if isinstance(layer, nn.Linear))
    first.bias.data.zero_()
    pictures = _pictures(16, generator)
    with torch.no_grad():
        for norm in deca.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0  # the statistics become those of the pictures
        deca.train()(pictures)
        deca.eval()
        wanted_mean, wanted_spread = _code_means(), _code_spreads()
        answers = deca.layers[:2](deca.encoder(pictures)) @ last.weight.T
        scale = wanted_spread / answers.std(0)
        last.weight *= scale[:, None]
        last.bias.copy_(wanted_mean - answers.mean(0) * scale)
    return {key: tensor.detach() for key, tensor in deca.state_dict().items()}


def write_stand_in_deca(path: Path, seed: int = 0) -> None:
    """Write `stand_in_deca` as a converted DECA file."""
    save_deca(path, stand_in_deca(seed), f"FaceSnap's untrained stand-in encoder, seed {seed}")


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"encoder.conv1.weight": (WIDTHS[0], 3, 7, 7)}
    for level, width in enumerate(WIDTHS, 1):
        block = f"encoder.layer{level}.0"
        shapes |= {f"{block}.{name}.weight": (width,) for name in ("conv1", "downsample.0")}
        shapes[f"{block}.conv3.weight"] = (4 * width,)
    return shapes | {"layers.0.weight": (HIDDEN, 4 * WIDTHS[-1]), "layers.2.weight": (sum(CODE_SIZES.values()), HIDDEN)}


def _code_means() -> Tensor:
    low, high = face_layout().min(0), face_layout().max(0)
    scale = 2 * FACE_IN_CROP / (high - low).mean()
    means = {name: torch.zeros(size) for name, size in CODE_SIZES.items()}
    means["cam"] = torch.tensor([scale, *-(low + high) / 2])
    means["pose"][3] = 0.05  # radians that the jaw hangs down
    return torch.cat(list(means.values()))


def _code_spreads() -> Tensor:
    spreads = {name: torch.as_tensor(SPREADS[name]).expand(size) for name, size in CODE_SIZES.items()}
    return torch.cat(list(spreads.values()))


def _pictures(count: int, generator: torch.Generator) -> Tensor:
    """[count,3,S,S] in 0…1: blurred noise of all sizes, contrasts and tints."""
    total = torch.zeros(count, 3, IMAGE_SIZE, IMAGE_SIZE)
    for cells in (2, 4, 8, 16, 32, 64):
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        weight = torch.rand(count, 1, 1, 1, generator=generator)
        total += weight * F.interpolate(noise, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    tint = torch.randn(count, 3, 1, 1, generator=generator)
    return torch.sigmoid(total + tint)
