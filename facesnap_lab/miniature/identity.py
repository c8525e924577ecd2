"""Train the miniature's face recognition networks with ArcFace: one that conditions, and two judges.

    python -m facesnap_lab.miniature.identity NAME --data DIR --out DIR

`identity` sees colours and conditions FaceSnap. `judge` sees grey values only, is trained on different people with a
different architecture, and is robust to generator artefacts. `judge_inner` sees grey values within an ellipse around
eyes, nose and mouth, without hair and outline. Source of the loss: Deng et al., "ArcFace" (2019).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.landmarks.points72 import five_points
from facesnap_lab.miniature import dataset
from facesnap_lab.miniature.perception import degrade, export, fit, to_tensor, warp, write_figures
from facesnap_lab.training.arcface import SIDE, TEMPLATE, similarity

SIZE = 512
JUDGE_SIZE = 128
LUMINANCE = (0.299, 0.587, 0.114)
INNER = ((28.0, 35.0), (15.5, 18.5))  # centre and radii of the ellipse in the crop at half resolution


@dataclass(frozen=True)
class Recipe:
    """The architecture and training settings of a network."""

    split: str  # split used for training
    seed: int
    widths: tuple[int, int, int]  # channels at 28, 14 and 7 pixels
    last: int  # channels before flattening
    grey: bool
    inner: bool
    degradation: float
    minutes: float
    batch: int = 128
    rate: float = 3e-3
    margin: float = 0.35
    scale: float = 32.0


RECIPES = {
    "identity": Recipe("train", 1, (32, 48, 96), 24, grey=False, inner=False, degradation=0.4, minutes=9),
    "judge": Recipe("judge", 2, (24, 64, 80), 20, grey=True, inner=False, degradation=1.0, minutes=7),
    "judge_inner": Recipe("judge", 3, (24, 48, 80), 20, grey=True, inner=True, degradation=0.6, minutes=4.5),
}


class FaceNetwork(nn.Module):
    """A network for aligned faces. Judges see grey values, whose mean and contrast are normalised over the inner face.

    Args:
        inner: the inner face [1,1,S,S].
        inner_only: whether a judge sees only the inner face.
    """

    def __init__(self, inner: Tensor, grey: bool, inner_only: bool) -> None:
        super().__init__()
        self.grey = grey
        self.register_buffer("luminance", torch.tensor(LUMINANCE).reshape(1, 3, 1, 1))
        self.register_buffer("weights", inner / inner.sum())
        self.register_buffer("mask", inner if inner_only else torch.ones_like(inner))

    def seen(self, faces: Tensor) -> Tensor:
        """Return what the network sees of RGB faces [N,3,S,S]: [N,1,S,S] if it sees grey values."""
        if not self.grey:
            return faces
        faces = (faces * self.luminance).sum(1, keepdim=True)
        faces = faces - (faces * self.weights).sum((2, 3), keepdim=True)
        faces = faces / ((faces * faces * self.weights).sum((2, 3), keepdim=True) + 1e-3).sqrt()
        return faces * self.mask


class Embedder(FaceNetwork):
    """Maps aligned faces [N,3,112,112], RGB in -1…1, to embeddings [N,512], not normalised."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(ellipse(*INNER, SIDE // 2), recipe.grey, recipe.inner)
        first, second, third = recipe.widths
        self.body = nn.Sequential(
            *conv_block(1 if recipe.grey else 3, first, 2),
            *conv_block(first, second, 2),
            Residual(second),
            *conv_block(second, third, 2),
            Residual(third),
            *conv_block(third, recipe.last, 1, kernel=1),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(recipe.last * 7 * 7, SIZE, bias=False),
            nn.BatchNorm1d(SIZE),
        )

    def forward(self, faces: Tensor) -> Tensor:
        return self.body(self.seen(F.avg_pool2d(faces, 2)))  # the world's faces have no finer detail


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*conv_block(width, width), nn.Conv2d(width, width, 3, 1, 1, bias=False))
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.layers(x)))


def conv_block(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.PReLU(outputs)]


def ellipse(centre: tuple[float, float], radii: tuple[float, float], side: int) -> Tensor:
    """Return a mask [1,1,side,side]: 1 inside, 0 outside, with an edge an eighth of a radius soft."""
    line = torch.arange(float(side)) + 0.5
    away = ((line - centre[0]) / radii[0]) ** 2 + ((line[:, None] - centre[1]) / radii[1]) ** 2
    return ((1 - away.sqrt()) * 8 + 0.5).clamp(0, 1)[None, None]


def alignment(keypoints: np.ndarray) -> np.ndarray:
    """Return insightface's similarity transforms [N,2,3] from images with five points [N,5,2] to 112-pixel crops."""
    turn, source, target = similarity(torch.from_numpy(keypoints).double(), torch.tensor(TEMPLATE, dtype=torch.float64))
    return torch.cat([turn, target[:, None] - turn @ source.transpose(1, 2)], -1).numpy()


def aligned(pictures: np.ndarray, keypoints: np.ndarray, zoom: float = 1.0) -> Tensor:
    """Align images [N,S,S,3] uint8 by their five points [N,5,2] to [N,3,112,112] in -1…1.

    Args:
        zoom: scale about the centre of insightface's crop.
    """
    transforms = zoom * alignment(keypoints)
    transforms[:, :, 2] += (1 - zoom) * (SIDE - 1) / 2
    return to_tensor(warp(pictures, transforms, SIDE))


def margin_loss(embeddings: Tensor, centres: Tensor, people: Tensor, margin: float, scale: float) -> Tensor:
    """Return ArcFace's loss: the angle to the sample's own class centre is increased by `margin` radians."""
    cosines = F.normalize(embeddings) @ F.normalize(centres).T
    own = cosines.gather(1, people[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
    wide = torch.cos(torch.acos(own) + margin)
    wide = torch.where(own > math.cos(math.pi - margin), wide, own - margin * math.sin(margin))
    return F.cross_entropy(scale * cosines.scatter(1, people[:, None], wide), people)


def train(name: str, data: Path, minutes: float | None = None, start: Path | None = None, vae: Path | None = None):
    """Train a network and return it with its class centres and the number of steps.

    Args:
        start: an earlier state to continue at a fifth of the learning rate.
        vae: a diffusers folder; half of each batch is passed through this VAE.
    """
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    random = np.random.default_rng(recipe.seed)
    world = dataset.load(data / recipe.split)
    pictures, keypoints = world.pictures, five_points(np.asarray(world.points))
    people = torch.from_numpy(np.array(world.people))
    network = Embedder(recipe).train()
    centres = nn.Embedding(int(people.max()) + 1, SIZE)
    if start is not None:
        state = torch.load(start, weights_only=True)
        network.load_state_dict(state["network"])
        centres.load_state_dict(state["centres"])
    codec = _codec(vae) if vae is not None else None

    def loss_of(done: float) -> Tensor:
        rows = np.sort(random.integers(0, len(pictures), recipe.batch))
        batch, points = np.array(pictures[rows]), keypoints[rows]
        points = points + random.normal(0, 0.6, points.shape) + random.normal(0, 0.6, (len(rows), 1, 2))
        mirrored = random.random(len(rows)) < 0.5
        batch[mirrored] = batch[mirrored][:, :, ::-1]
        points[mirrored] = points[mirrored][:, [1, 0, 2, 4, 3]] * (-1, 1) + (batch.shape[2], 0)
        if codec is not None:
            batch[::2] = codec(batch[::2])
        faces = aligned(degrade(batch, random, recipe.degradation), points)
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = network(faces)
        margin = recipe.margin * (1 if start is not None else min(1, done / 0.3))
        return margin_loss(embeddings.float(), centres.weight, people[rows], margin, recipe.scale)

    rate = recipe.rate * (0.2 if start is not None else 1)
    steps = fit([network, centres], loss_of, minutes or recipe.minutes, rate)
    return network.eval(), centres, steps


def _codec(folder: Path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)

    @torch.no_grad()
    def through(pictures: np.ndarray) -> np.ndarray:
        again = vae.decode(vae.encode(to_tensor(pictures)).latent_dist.mean).sample
        return ((again.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()

    return through


@torch.no_grad()
def embed(network: nn.Module, pictures: np.ndarray, keypoints: np.ndarray) -> Tensor:
    """Embed images as [N,512], normalised."""
    parts = range(0, len(pictures), 128)
    return F.normalize(torch.cat([network(aligned(pictures[i : i + 128], keypoints[i : i + 128])) for i in parts]))


def verification(embeddings: Tensor, people: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Measure how well cosines separate pairs of the same person from pairs of different people.

    The threshold is chosen on one half of the pairs and tested on the other. `rank_1` looks up one image of each person
    in a gallery that has one other image of each person.
    """
    random = np.random.default_rng(seed)
    names, first, counts = np.unique(people, return_index=True, return_counts=True)
    rows = [random.permutation(np.arange(f, f + c)) for f, c in zip(first, counts)]
    same = np.array([(r[i], r[j]) for r in rows for i in range(6) for j in range(i)])
    left = np.arange(len(same))
    others = (random.integers(1, len(names), len(left)) + np.searchsorted(names, people[same[:, 0]])) % len(names)
    different = np.array([(a, random.choice(rows[b])) for a, b in zip(same[:, 0], others)])
    ours, theirs = ((embeddings[p[:, 0]] * embeddings[p[:, 1]]).sum(1).numpy() for p in (same, different))
    halves = np.arange(len(ours)) % 2 == 0
    thresholds = np.linspace(-1, 1, 401)
    right = [((ours[halves] > t).mean() + (theirs[halves] <= t).mean()) / 2 for t in thresholds]
    threshold = float(thresholds[int(np.argmax(right))])
    accuracy = ((ours[~halves] > threshold).mean() + (theirs[~halves] <= threshold).mean()) / 2
    ranked = np.sort(theirs)
    auc = (np.searchsorted(ranked, ours, "left") + np.searchsorted(ranked, ours, "right")).mean() / 2 / len(ranked)
    gallery, probes = embeddings[[r[0] for r in rows]], embeddings[[r[1] for r in rows]]
    rank_1 = ((probes @ gallery.T).argmax(1) == torch.arange(len(rows))).float().mean().item()
    return {
        "people": len(names),
        "pairs": 2 * len(ours),
        "accuracy": float(accuracy),
        "auc": float(auc),
        "threshold": threshold,
        "rank_1": rank_1,
        "same": float(ours.mean()),
        "different": float(theirs.mean()),
    }


def evaluate(network: nn.Module, data: Path, vae: Path | None = None) -> dict[str, float]:
    """Run `verification` on unseen people with their true landmarks, and again through a VAE if there is one."""
    test = dataset.load(data / "test")
    pictures, keypoints, people = np.array(test.pictures), five_points(np.asarray(test.points)), np.array(test.people)
    clean = embed(network, pictures, keypoints)
    figures = verification(clean, people)
    if vae is not None:
        codec = _codec(vae)
        again = np.concatenate([codec(pictures[i : i + 64]) for i in range(0, len(pictures), 64)])
        seen = embed(network, again, keypoints)
        figures |= {f"{key}_through_vae": verification(seen, people)[key] for key in ("accuracy", "auc", "same")}
        figures["itself_through_vae"] = (clean * seen).sum(1).mean().item()
    return figures


@torch.no_grad()
def reduce_dimension(network: nn.Module, embeddings: Tensor, size: int) -> None:
    """Reduce embeddings to the `size` principal directions of the embeddings [N,512].

    The last layer takes up half of the file, and the other directions hardly affect cosines.
    """
    *_, linear, norm = network.body
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    _, directions = torch.linalg.eigh(embeddings.T @ embeddings)
    directions = directions[:, -size:]
    narrow = nn.Linear(linear.in_features, size)
    narrow.weight.copy_(directions.T @ (scale[:, None] * linear.weight))
    narrow.bias.copy_(directions.T @ (norm.bias - scale * norm.running_mean))
    network.body = nn.Sequential(*list(network.body)[:-2], narrow)


def write(network: nn.Module, path: Path) -> None:
    """Export the network as a recognition model of an insightface pack."""
    example = torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    export(network, example, path, {"face": {0: "faces"}, "embedding": {0: "faces"}})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a face recognition network of the miniature.")
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--start", type=Path, help=".pt file of an earlier training run to continue")
    parser.add_argument("--vae", type=Path, help="VAE that half of the training images pass through")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trained, centres, steps = train(arguments.name, arguments.data, arguments.minutes, arguments.start, arguments.vae)
    arguments.out.mkdir(parents=True, exist_ok=True)
    state = {"network": trained.state_dict(), "centres": centres.state_dict()}
    torch.save(state, arguments.out / f"{arguments.name}.pt")
    if RECIPES[arguments.name].grey:  # a judge
        people = dataset.load(arguments.data / RECIPES[arguments.name].split)
        rows = slice(None, None, 8)
        seen = embed(trained, np.array(people.pictures[rows]), five_points(np.array(people.points[rows])))
        reduce_dimension(trained, seen, JUDGE_SIZE)
        write(trained, arguments.out / f"{arguments.name}.onnx")
    else:
        write(trained, arguments.out / arguments.name / "recognition.onnx")
    write_figures(arguments.out, arguments.name, {"steps": steps, **evaluate(trained, arguments.data, arguments.vae)})
