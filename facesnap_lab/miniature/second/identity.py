"""The second edition's recognition networks, trained with ArcFace: one that conditions, and three judges.

`identity` sees colours and conditions FaceSnap. `judge` and `judge_inner` measure FaceSim: they see grey values only
and are trained on other people, with other architectures; `judge_inner` sees only an ellipse around eyes, nose and
mouth. A class of these three is a person, whose look changes between images, so hair and glasses do not help. Each
crop gets a random white balance. A quarter of those of `identity` lose their colours, and a quarter of them their
details: otherwise skin, iris, brows and moles would suffice to tell people apart, and little of the shape would be
learned.

`details` measures CLIP-face and conditions nothing. Its classes are the looks of each person, so that the same face
with a different beard or frame is a different class, and its crop contains all of the hair.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.landmarks.points72 import five_points
from facesnap_lab.miniature.identity import (
    SIZE,
    FaceNetwork,
    Residual,
    aligned,
    conv_block,
    ellipse,
    margin_loss,
    reduce_dimension,
    write,
)
from facesnap_lab.miniature.perception import degrade_tensor
from facesnap_lab.miniature.second.dataset import PEOPLE, SHOTS, World
from facesnap_lab.miniature.second.loop import CPU, Compute, fit, load_state, prepared
from facesnap_lab.miniature.second.world import SHOTS_PER_LOOK
from facesnap_lab.training.arcface import SIDE

LOOKS = SHOTS // SHOTS_PER_LOOK
GAIN = (0.72, 1.3)  # range of each channel's random gain
JITTER = 0.8  # standard deviation of the detector's points, for all five together and for each of them
JUDGE_SIZE = 128
INNER = ((56.0, 70.0), (31.0, 37.0))  # centre and radii of the ellipse in the crop
BLUR = 7  # pixels of a crop that are averaged: moles, irises and the outlines of brows disappear, the proportions stay
PATCH = 4  # side of a cell of the first convolution in pixels


@dataclass(frozen=True)
class Recipe:
    """The architecture and training settings of a network."""

    split: str  # split used for training
    seed: int
    widths: tuple[int, int, int]  # channels at 28, 14 and 7 pixels
    last: int  # channels before flattening
    degradation: float
    grey: bool = False
    inner: bool = False
    looks: bool = False  # whether a class is a look of a person instead of a person
    gain: tuple[float, float] = GAIN
    colourless: float = 0.0  # share of the images that lose their colours, so that shape has to suffice
    blurred: float = 0.0  # share of the images that lose their details, for the same reason
    zoom: float = 1.0  # of the aligned crop; below 1, it shows more than the face
    steps: int = 4000
    batch: int = 64
    rate: float = 2e-3
    margin: float = 0.35
    scale: float = 32.0


RECIPES = {
    "identity": Recipe("train", 1, (32, 64, 96), 24, 0.4, gain=(0.6, 1.6), colourless=0.25, blurred=0.25, steps=12000),
    "judge": Recipe("judge", 2, (24, 72, 80), 20, 0.8, grey=True),
    "judge_inner": Recipe("judge", 3, (24, 48, 80), 20, 0.6, grey=True, inner=True),
    "details": Recipe("judge", 4, (32, 64, 80), 24, 0.4, looks=True, gain=(0.95, 1.05), zoom=0.75),
}


class Embedder(FaceNetwork):
    """Maps aligned faces [N,3,112,112], RGB in -1…1, to embeddings [N,512], not normalised."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(ellipse(*INNER, SIDE), recipe.grey, recipe.inner)
        first, second, third = recipe.widths
        colours = 1 if recipe.grey else 3
        self.body = nn.Sequential(
            nn.Conv2d(colours, first, 2 * PATCH - 1, PATCH, PATCH - 1, bias=False),
            nn.BatchNorm2d(first),
            nn.PReLU(first),
            Residual(first),
            *conv_block(first, second, 2),
            Residual(second),
            *conv_block(second, third, 2),
            Residual(third),
            *conv_block(third, recipe.last, 1, kernel=1),
            nn.Flatten(),
            nn.Linear(recipe.last * 7 * 7, SIZE, bias=False),
            nn.BatchNorm1d(SIZE),
        )

    def forward(self, faces: Tensor) -> Tensor:
        return self.body(self.seen(faces))


class Classifier(nn.Module):
    """A network with ArcFace's class centres, which are needed for training only."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.network = Embedder(recipe)
        self.centres = nn.Embedding(PEOPLE[recipe.split] * (LOOKS if recipe.looks else 1), SIZE)


def training_crops(recipe: Recipe, pictures: np.ndarray, keypoints: np.ndarray, random: np.random.Generator) -> Tensor:
    """Align images like `aligned`, with the errors of a detector, half of them mirrored, degraded and tinted."""
    count, side = pictures.shape[:2]
    points = keypoints + random.normal(0, JITTER, keypoints.shape) + random.normal(0, JITTER, (count, 1, 2))
    mirrored = random.random(count) < 0.5
    pictures[mirrored] = pictures[mirrored][:, :, ::-1]
    points[mirrored] = points[mirrored][:, [1, 0, 2, 4, 3]] * (-1, 1) + (side, 0)
    faces = degrade_tensor(aligned(pictures, points, recipe.zoom), random, recipe.degradation)
    gain = np.exp(random.uniform(*np.log(recipe.gain), (count, 3, 1, 1)))
    faces = ((faces.clamp(-1, 1) + 1) * torch.from_numpy(gain).float()).clamp(max=2) - 1
    blurred = torch.from_numpy(random.random(count) < recipe.blurred)
    if blurred.any():
        coarse = F.avg_pool2d(faces[blurred], BLUR)
        faces[blurred] = F.interpolate(coarse, size=SIDE, mode="bilinear", align_corners=False)
    colourless = torch.from_numpy(random.random(count) < recipe.colourless)
    faces[colourless] = faces[colourless].mean(1, keepdim=True)
    return faces


def classes(world: World, looks: bool) -> Tensor:
    """Return the class of each image: its person, or its person and look."""
    people = torch.from_numpy(np.array(world.people))
    return people * LOOKS + torch.from_numpy(np.array(world.looks)) if looks else people


def train(
    name: str, world: World, out: Path, *, minutes: float, recipe: Recipe | None = None, compute: Compute = CPU
) -> tuple[Embedder, int]:
    """Train or resume a network on the images of its split that exist so far.

    Returns:
        The network on the CPU, and the number of its steps.
    """
    recipe = recipe or RECIPES[name]
    torch.manual_seed(recipe.seed)
    model, device = Classifier(recipe).to(compute.device), torch.device(compute.device)
    keypoints, targets = five_points(np.asarray(world.points)), classes(world, recipe.looks)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng([recipe.seed, step])
        rows = np.sort(random.integers(0, len(targets), recipe.batch * compute.batch))
        return training_crops(recipe, np.array(world.pictures[rows]), keypoints[rows], random), targets[rows]

    batch_of = prepared(draw, compute.threads)

    def loss_of(step: int) -> Tensor:
        faces, people = (part.to(device) for part in batch_of(step))
        with torch.autocast(device.type, torch.bfloat16):
            embeddings = model.network(faces)
        margin = recipe.margin * min(1, step / (0.2 * recipe.steps))
        return margin_loss(embeddings.float(), model.centres.weight, people, margin, recipe.scale)

    plan: dict[str, Any] = {"steps": recipe.steps, "minutes": minutes, "rate": recipe.rate, "decay": 0.02}
    steps = fit(model.train(), loss_of, out, **plan, compute=compute)
    load_state(out, model)
    return model.network.cpu().eval(), steps


@torch.no_grad()
def embed(network: nn.Module, pictures: np.ndarray, keypoints: np.ndarray, zoom: float = 1.0) -> Tensor:
    """Embed images as [N,512], normalised, on the CPU."""
    device = next(network.parameters()).device
    parts = [slice(i, i + 128) for i in range(0, len(pictures), 128)]
    crops = (aligned(np.array(pictures[p]), keypoints[p], zoom) for p in parts)
    return F.normalize(torch.cat([network(part.to(device)).cpu() for part in crops]))


def export(name: str, network: Embedder, world: World, out: Path) -> None:
    """Write the network as `recognition.onnx`. A judge is first reduced to `JUDGE_SIZE` dimensions, in place."""
    if name != "identity":
        seen = embed(network, world.pictures[::8], five_points(np.array(world.points[::8])), RECIPES[name].zoom)
        reduce_dimension(network, seen, JUDGE_SIZE)
    write(network, out / "recognition.onnx")
