"""Train the miniature's landmark regressor: DECA's coarse encoder with small widths, for the miniature's head.

    python -m facesnap_lab.miniature.regressor --data DIR --out DIR

It is trained on rendered images with known codes. The loss is dominated by the positions of the 72 points, with a small
weight on the codes themselves. DECA is trained similarly, on photos with landmarks.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.landmarks.deca import Deca, crop_transform, load_deca, project, save_deca
from facesnap_ext.landmarks.flame import Flame, full_pose, posed_vertices, save_flame
from facesnap_ext.landmarks.points72 import POINT_TRIANGLES, POINT_WEIGHTS
from facesnap_ext.landmarks.predictor import load_predictor
from facesnap_lab.miniature import dataset
from facesnap_lab.miniature.perception import degrade, fit, to_tensor, warp, write_figures
from facesnap_lab.miniature.render import head
from facesnap_lab.miniature.world import EXPRESSION_CODES, SHAPE_CODES

IMAGE_SIZE = 64
CODE_SIZES = {"shape": SHAPE_CODES, "exp": EXPRESSION_CODES, "pose": 6, "cam": 3}
LEVELS = ((16, 1), (32, 2), (64, 2), (112, 2))  # width and number of blocks; a block's output is four times as wide
STEM, STEM_KERNEL, HIDDEN = 32, 7, 256
# loss per standard deviation of a code, in pixels of a point
CODE_LOSS_WEIGHTS = {"shape": 0.5, "exp": 0.3, "pose": 0.3, "cam": 0.3}


class FaceImages(Protocol):
    """Images of either edition with their ground truth."""

    @property
    def pictures(self) -> np.ndarray: ...  # [N,S,S,3] uint8 RGB

    @property
    def points(self) -> np.ndarray: ...  # [N,72,2] pixels

    @property
    def boxes(self) -> np.ndarray: ...  # [N,4] pixels

    @property
    def codes(self) -> np.ndarray: ...  # [N,37] in the camera of the image


def new_deca(image_size: int = IMAGE_SIZE) -> Deca:
    """Create an untrained encoder; its last layer has Kaiming initialisation."""
    shapes: dict[str, tuple[int, ...]] = {"encoder.conv1.weight": (STEM, 3, STEM_KERNEL, STEM_KERNEL)}
    for level, (width, blocks) in enumerate(LEVELS, 1):
        for block in range(blocks):
            name = f"encoder.layer{level}.{block}"
            shapes |= {f"{name}.conv1.weight": (width,), f"{name}.conv3.weight": (4 * width,)}
        shapes[f"encoder.layer{level}.0.downsample.0.weight"] = (4 * width,)
    shapes |= {"layers.0.weight": (HIDDEN, 4 * LEVELS[-1][0]), "layers.2.weight": (sum(CODE_SIZES.values()), HIDDEN)}
    return Deca(shapes, CODE_SIZES, image_size)


class LandmarkDecoder(nn.Module):
    """Computes the 72 points from codes, with a head reduced to the triangles they lie on; the result is exact.

    Args:
        flame: the head, on the CPU.
        device: of the codes.
    """

    def __init__(self, flame: Flame, device: torch.device | str = "cpu") -> None:
        super().__init__()
        corners = flame.faces[torch.from_numpy(POINT_TRIANGLES)].flatten()
        joints = len(flame.parents)

        def cut(directions: Tensor) -> Tensor:
            # a joint is a weighted mean of vertices at rest, so it moves with the codes like an additional vertex
            return torch.cat([directions[corners], torch.einsum("jv,v...->j...", flame.J_regressor, directions)])

        self.flame = Flame(
            v_template=cut(flame.v_template),
            shapedirs=cut(flame.shapedirs),
            expressiondirs=cut(flame.expressiondirs),
            posedirs=cut(flame.posedirs),
            J_regressor=torch.cat([torch.zeros(joints, len(corners)), torch.eye(joints)], 1),
            weights=cut(flame.weights),
            parents=flame.parents,
            faces=torch.arange(len(corners)).reshape(-1, 3),
        ).to(device)
        self.flame = replace(self.flame, parents=flame.parents)  # they are read one by one
        self.weights = torch.from_numpy(POINT_WEIGHTS).to(device)

    def forward(self, codes: Tensor) -> Tensor:
        """Map codes [N,37] to points [N,72,2] in the crop, -1…1."""
        shape, expression, pose, cam = codes.split(list(CODE_SIZES.values()), 1)
        vertices = posed_vertices(self.flame, shape, expression, full_pose(self.flame, pose))
        corners = vertices[:, : self.flame.faces.numel()].unflatten(1, (-1, 3))
        return project(torch.einsum("pk,npkc->npc", self.weights, corners), cam)


def codes_in_crop(codes: np.ndarray, transforms: np.ndarray, side: int, crop: int = IMAGE_SIZE) -> np.ndarray:
    """Convert codes [N,37] from the camera of the image, of `side` pixels, to the camera of DECA's crop.

    Args:
        transforms: [N,3,3] from `crop_transform`.
        crop: side of the crop in pixels.
    """
    scale = transforms[:, 0, 0] * side / crop
    # the image's centre in the crop; see `deca.to_photo`
    middle = (transforms[:, :2, 2] + transforms[:, :1, 0] * (side / 2 - 0.5)) / (crop / 2) - 1
    moved = codes.copy()
    moved[:, -3] *= scale
    moved[:, -2:] += middle * (1, -1) / moved[:, -3:-2]
    return moved


def jitter_boxes(boxes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Jitter boxes [N,4] like the output of a detector."""
    sizes = (boxes[:, 2:] - boxes[:, :2]).mean(1, keepdims=True)
    return boxes + sizes * (
        np.tile(random.normal(0, 0.03, (len(boxes), 2)), 2) + random.normal(0, 0.02, (len(boxes), 4))
    )


def code_statistics(world: FaceImages, crop: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the codes in the camera of DECA's crop, [37] each."""
    sample = np.arange(0, len(world.codes), 9)
    moves = np.stack([crop_transform(box, crop) for box in world.boxes[sample]])
    usual = torch.from_numpy(codes_in_crop(np.array(world.codes[sample]), moves, world.pictures.shape[1], crop)).float()
    # the jaw turns about one axis only: without a floor, its other two axes would get unbounded weights
    return usual.mean(0), usual.std(0).clamp_min(1e-3)


@dataclass(frozen=True, eq=False)
class CropBatch:
    """Crops of faces, their codes, and for each another crop of the batch."""

    crops: Tensor  # [N,3,S,S] in 0…1
    codes: Tensor  # [N,37] in the camera of the crop
    others: Tensor  # [N] int64, a permutation


def draw_crops(world: FaceImages, rows: np.ndarray, size: int, random: np.random.Generator) -> CropBatch:
    """Degrade and crop the images in the rows, with the errors of a detector.

    Args:
        size: side of a crop in pixels.
    """
    boxes = jitter_boxes(world.boxes[rows], random)
    moves = np.stack([crop_transform(box, size) for box in boxes])
    crops = (to_tensor(warp(degrade(world.pictures[rows], random, 0.4), moves[:, :2], size)) + 1) / 2
    codes = torch.from_numpy(codes_in_crop(world.codes[rows], moves, world.pictures.shape[1], size)).float()
    return CropBatch(crops, codes, torch.from_numpy(random.permutation(len(rows))))


def codes_loss(deca: Deca, decoder: LandmarkDecoder, statistics: tuple[Tensor, Tensor], batch: CropBatch) -> Tensor:
    """Return the loss of an encoder that predicts standard deviations from the mean.

    Args:
        statistics: from `code_statistics`. All arguments are on the same device.
    """
    (mean, spread), target, swap = statistics, batch.codes, batch.others
    weights = torch.cat([torch.full((count,), CODE_LOSS_WEIGHTS[name]) for name, count in CODE_SIZES.items()])
    with torch.autocast(target.device.type, torch.bfloat16):
        answer = deca.layers(deca.encoder(batch.crops))
    answer = answer.float()
    # compare each face with its own shape and with another person's, so that the camera cannot compensate for a wrong
    # shape
    ours, true = (
        torch.cat([found, torch.cat([found[swap, :SHAPE_CODES], found[:, SHAPE_CODES:]], 1)])
        for found in (mean + spread * answer, target)
    )
    error = (deca.image_size / 2) * (decoder(ours) - decoder(true))
    codes = answer - (target - mean) / spread
    return F.smooth_l1_loss(error, torch.zeros_like(error), beta=0.5) + (weights.to(codes) * codes**2).mean()


@torch.no_grad()
def predict_codes(deca: Deca, statistics: tuple[Tensor, Tensor]) -> None:
    """Change the last layer, which predicts standard deviations from the mean, to predict the codes themselves."""
    mean, spread = statistics
    last = deca.layers[2]
    last.weight *= spread[:, None]
    last.bias.copy_(mean + spread * last.bias)


def train(
    data: Path, minutes: float, start: Path | None = None, batch: int = 128, rate: float = 2e-3, seed: int = 4
) -> tuple[Deca, int]:
    """Train the encoder and return it with the number of steps.

    Args:
        start: file of an earlier training run to continue at half the learning rate.
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    world = dataset.load(data / "train")
    decoder, statistics = LandmarkDecoder(head()), code_statistics(world, IMAGE_SIZE)
    deca = new_deca().train()
    if start is not None:
        deca.load_state_dict(load_deca(start).state_dict())
        rate /= 2
        mean, spread = statistics
        with torch.no_grad():  # converts codes to standard deviations
            deca.layers[2].weight /= spread[:, None]
            deca.layers[2].bias.sub_(mean).div_(spread)

    def loss_of(done: float) -> Tensor:
        rows = np.sort(random.integers(0, len(world.pictures), batch))
        return codes_loss(deca, decoder, statistics, draw_crops(world, rows, IMAGE_SIZE, random))

    steps = fit([deca], loss_of, minutes, rate)
    predict_codes(deca, statistics)
    return deca.eval(), steps


def evaluate(
    deca_file: Path, flame_file: Path, test: FaceImages, decoder: LandmarkDecoder, every: int = 3
) -> dict[str, float]:
    """Measure errors on every third image of unseen people with FaceSnap's own predictor, in pixels of the image.

    `swapped_px` puts one person's shape into another's pose and expression: the error of the prediction, and for
    comparison the error with the driving person's shape or the mean shape.
    """
    predictor = load_predictor(deca_file, flame_file)
    rows = np.arange(0, len(test.pictures), every)
    boxes = jitter_boxes(test.boxes[rows], np.random.default_rng(0))
    found = predictor.encode_batch([np.array(picture) for picture in test.pictures[rows]], list(boxes))
    points = np.stack([predictor.predict(codes, codes).points for codes in found])
    errors = np.linalg.norm(points - test.points[rows], axis=-1)
    shapes, truth = torch.stack([codes.shape for codes in found]).numpy(), test.codes[rows, :SHAPE_CODES]
    expressions = torch.stack([codes.expression for codes in found]).numpy()
    expressed = test.codes[rows, SHAPE_CODES : SHAPE_CODES + EXPRESSION_CODES]
    poses = torch.stack([codes.pose for codes in found]).numpy()[:, :3]
    turned = test.codes[rows, SHAPE_CODES + EXPRESSION_CODES :][:, :3]
    others = np.roll(np.arange(len(rows)), len(rows) // 8)  # another person
    driving = [found[other] for other in others]
    mean_face = replace(found[0], shape=torch.zeros(SHAPE_CODES))
    swapped, same, usual = (
        np.stack([predictor.predict(a, b).points for a, b in zip(sources, driving)])
        for sources in (found, driving, [mean_face] * len(found))
    )
    codes = np.concatenate([truth, test.codes[rows][others][:, SHAPE_CODES:]], 1)
    expected = (decoder(torch.from_numpy(codes)).numpy() + 1) * (test.pictures.shape[1] / 2)
    return {
        "pictures": len(rows),
        "error_px": float(errors.mean()),
        "error_px_95": float(np.percentile(errors.mean(1), 95)),
        "swapped_px": _distance(swapped, expected),
        "swapped_px_with_driving_shape": _distance(same, expected),
        "swapped_px_with_mean_shape": _distance(usual, expected),
        "shape_correlation": _correlation(shapes, truth),
        "shape_correlations": [round(_correlation(a, b), 2) for a, b in zip(shapes.T, truth.T)],
        "expression_correlation": _correlation(expressions, expressed),
        "rotation_error_degrees": float(np.degrees(np.abs(poses - turned).mean())),
    }


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b, axis=-1).mean())


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the miniature's landmark regressor.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--start", type=Path, help="file of an earlier training run to continue")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trained, steps = train(arguments.data, arguments.minutes, arguments.start)
    file, flame_file = arguments.out / "deca.safetensors", arguments.out / "flame.safetensors"
    tensors = {key: tensor.detach() for key, tensor in trained.half().state_dict().items()}
    save_deca(file, tensors, "FaceSnap's miniature world", CODE_SIZES, IMAGE_SIZE)
    save_flame(flame_file, vars(head()), "FaceSnap's miniature head")
    measured = evaluate(file, flame_file, dataset.load(arguments.data / "test"), LandmarkDecoder(head()))
    write_figures(arguments.out, "deca", {"steps": steps, "code_sizes": json.dumps(CODE_SIZES), **measured})
