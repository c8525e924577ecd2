"""An untrained encoder with DECA's layout that outputs plausible faces, for tests.

DECA's weights may not be redistributed. This encoder has DECA's tensor names and codes, but small widths and random
weights. Its camera frames the stand-in head (`facesnap_lab.miniature.head`) as DECA frames a face. All codes vary
slightly and deterministically with the image, but independently of the face in it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.landmarks.deca import CODE_SIZES, IMAGE_SIZE, Deca, save_deca
from facesnap_lab.miniature.head import face_layout

WIDTHS = (4, 8, 12, 16)  # widths of the four levels; each has one block, whose output is four times as wide
HIDDEN = 64
FACE_IN_CROP = 0.70  # extent of the points, relative to the side of the crop
SPREADS = {
    "shape": 0.8,
    "tex": 0.1,
    "exp": 0.4,
    "pose": (0.06, 0.12, 0.03, 0.03, 0, 0),
    "cam": (0.2, 0.002, 0.002),
    "light": 0.1,
}


def stand_in_deca(seed: int = 0) -> dict[str, Tensor]:
    """Return a state dict of `Deca` with DECA's 236 codes.

    Across images, shape codes have a spread of 0.8 standard deviations, expression codes of 0.4, yaw of 0.12 radians
    and the camera's scale of 0.2 (about 2 %). The mouth is slightly open.
    """
    generator = torch.Generator().manual_seed(seed)
    deca = Deca(_shapes(), CODE_SIZES)
    for tensor in deca.parameters():
        if tensor.ndim > 1:
            tensor.data.normal_(std=(2 / tensor[0].numel()) ** 0.5, generator=generator)
    first, last = (layer for layer in deca.layers if isinstance(layer, nn.Linear))
    first.bias.data.zero_()
    images = _random_images(16, generator)
    with torch.no_grad():
        for norm in deca.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0  # use the statistics of these images
        deca.train()(images)
        deca.eval()
        outputs = deca.layers[:2](deca.encoder(images)) @ last.weight.T
        scale = _code_spreads() / outputs.std(0)
        last.weight *= scale[:, None]
        last.bias.copy_(_code_means() - outputs.mean(0) * scale)
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
    means["pose"][3] = 0.05  # rotation of the jaw in radians
    return torch.cat(list(means.values()))


def _code_spreads() -> Tensor:
    spreads = {name: torch.as_tensor(SPREADS[name]).expand(size) for name, size in CODE_SIZES.items()}
    return torch.cat(list(spreads.values()))


def _random_images(count: int, generator: torch.Generator) -> Tensor:
    """Return images [count,3,S,S] in 0…1 of smooth noise at various scales, contrasts and tints."""
    total = torch.zeros(count, 3, IMAGE_SIZE, IMAGE_SIZE)
    for cells in (2, 4, 8, 16, 32, 64):
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        weight = torch.rand(count, 1, 1, 1, generator=generator)
        total += weight * F.interpolate(noise, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    tint = torch.randn(count, 3, 1, 1, generator=generator)
    return torch.sigmoid(total + tint)
