"""Train the miniature's face detector and export it with the outputs of insightface's SCRFD.

    python -m facesnap_lab.miniature.face_detector --data DIR --out DIR

insightface passes each photo to a detector as a square of 640 pixels, ten for each pixel of the miniature. So the
network first averages blocks of 4×4 and has one detection cell per 32×32 pixels; SCRFD's two finer levels stay empty.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.identity.faces import NoFaceError, find_faces, load_pack
from facesnap_ext.landmarks.points72 import five_points
from facesnap_ext.photos import Photo
from facesnap_lab.miniature import dataset
from facesnap_lab.miniature.perception import degrade, export, fit, to_tensor, write_figures

STRIDE = 32
POOL = 4
CELLS = 640 // STRIDE
WIDTHS = (16, 32, 48)
CELL_VALUES = 15  # score, box, five points


class Detector(nn.Module):
    """Maps images, whose sides are multiples of 32, to [N,15,H/32,W/32].

    Each cell predicts the score's logit, the distances from its upper left corner to the sides of the box (left, top,
    right, bottom), and five points x, y relative to that corner, in units of 32 pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *WIDTHS), WIDTHS):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        # dilated convolutions widen the receptive field until it covers a face that fills the image
        self.context = nn.ModuleList(
            nn.Sequential(nn.Conv2d(WIDTHS[-1], WIDTHS[-1], 3, 1, d, d, bias=False), nn.BatchNorm2d(WIDTHS[-1]))
            for d in (1, 2, 4, 1)
        )
        self.head = nn.Conv2d(WIDTHS[-1], CELL_VALUES, 1)
        nn.init.constant_(self.head.bias, 0.0)
        self.head.bias.data[0] = -3.0

    def pooled(self, x: Tensor) -> Tensor:
        """Apply the network without its first average pooling."""
        x = self.body(x)
        for layer in self.context:
            x = F.relu(x + layer(x))
        return self.head(x)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.pooled(F.avg_pool2d(pictures, POOL))


class Scrfd(nn.Module):
    """A `Detector` with SCRFD's nine outputs: scores, boxes and points, each at strides 8, 16 and 32."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        rows = self.detector(pictures).permute(0, 2, 3, 1).reshape(-1, CELL_VALUES)
        rows = torch.cat([rows[:, :1].sigmoid(), rows[:, 1:]], 1)
        nothing = rows * 0
        rows_32 = torch.stack([rows, nothing], 1).reshape(-1, CELL_VALUES)  # SCRFD has two anchors per cell
        rows_16 = torch.cat([rows_32 * 0] * 4)
        rows_8 = torch.cat([rows_16] * 4)
        levels = (rows_8, rows_16, rows_32)
        return tuple(level[:, part] for part in (slice(0, 1), slice(1, 5), slice(5, 15)) for level in levels)


def place_on_canvases(
    pictures: np.ndarray, boxes: np.ndarray, points: np.ndarray, random: np.random.Generator, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place each image [N,S,S,3] on its own canvas.

    A quarter of the images fill the canvas, like a photo on its own. About a third fill the middle third of it, like
    the padding of `faces.find_faces`. The others have random sizes and positions. A quarter have a random background.

    Returns:
        Canvases [N,side,side,3] uint8, boxes [N,4] and points [N,5,2] on them.
    """
    import cv2

    own = pictures.shape[1]
    canvases, scales, corners = [], [], []
    for picture in pictures:
        kind, any_size = random.random(), side * np.exp(random.uniform(np.log(0.2), np.log(1.2)))
        size = side if kind < 0.25 else side / 3 if kind < 0.6 else any_size
        place = (side - size) / 2 * np.ones(2) if kind < 0.6 else random.uniform(-0.15 * size, side - 0.85 * size, 2)
        colour = (0, 0, 0) if kind < 0.75 else tuple(random.uniform(0, 255, 3))
        scale = size / own
        move = np.array([[scale, 0, place[0] + (scale - 1) / 2], [0, scale, place[1] + (scale - 1) / 2]])
        canvas = cv2.warpAffine(picture, move, (side, side), borderValue=colour)
        canvases.append(canvas)
        scales.append(scale)
        corners.append(place)
    scale, corner = np.array(scales), np.array(corners)
    moved_boxes = boxes * scale[:, None] + np.tile(corner, 2)
    return np.stack(canvases), moved_boxes, points * scale[:, None, None] + corner[:, None]


@dataclass(frozen=True, eq=False)
class Canvases:
    """Images at a quarter of insightface's square of 640 pixels, and their faces in units of the detector's cells."""

    pictures: Tensor  # [N,3,160,160] in -1…1
    boxes: Tensor  # [N,4]
    points: Tensor  # [N,5,2]


def draw_canvases(
    pictures: np.ndarray, boxes: np.ndarray, keypoints: np.ndarray, random: np.random.Generator
) -> Canvases:
    """Degrade images [N,S,S,3] uint8 and place them on canvases.

    Args:
        boxes, keypoints: [N,4] and [N,5,2] pixels.
    """
    units = 2 * STRIDE // POOL  # canvases are rendered at half of 640, then halved again
    canvases, on_canvas, points_on_canvas = place_on_canvases(
        degrade(pictures, random, 0.5), boxes, keypoints.astype(np.float64), random, CELLS * units
    )
    return Canvases(
        F.avg_pool2d(to_tensor(canvases), 2),
        torch.from_numpy(on_canvas / units).float(),
        torch.from_numpy(points_on_canvas / units).float(),
    )


def detection_loss(detector: Detector, canvases: Canvases) -> Tensor:
    """Return the loss on canvases, which are on the detector's device."""
    boxes = canvases.boxes
    corners = torch.arange(CELLS, device=boxes.device).float()
    y, x = torch.meshgrid(corners, corners, indexing="ij")
    answer = detector.pooled(canvases.pictures)
    # a cell is positive if it contains the face's centre; cells nearby are ignored
    size = (boxes[:, 2:] - boxes[:, :2]).mean(1)[:, None, None]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    away_x = (x + 0.5 - middle[:, 0, None, None]).abs()
    away_y = (y + 0.5 - middle[:, 1, None, None]).abs()
    away = torch.maximum(away_x, away_y)
    inside = away <= torch.clamp(0.15 * size, min=0.5)
    near = away <= torch.clamp(0.35 * size, min=1.0)
    target = inside.float()
    scores = F.binary_cross_entropy_with_logits(answer[:, 0], target, reduction="none")
    hard = (answer[:, 0].sigmoid() - target).abs() ** 2  # focal loss
    score_loss = (scores * hard * (inside | ~near)).sum() / inside.sum()
    corner = torch.stack([x, y])[None]
    upper_left, lower_right = (part[:, :, None, None] for part in boxes.split(2, 1))
    marks = canvases.points.flatten(1)[:, :, None, None] - corner.repeat(1, 5, 1, 1)
    places = torch.cat([corner - upper_left, lower_right - corner, marks], 1)
    error = (answer[:, 1:] - places) / size[:, None]
    place_loss = (error.abs().mean(1) * inside / inside.sum((1, 2), keepdim=True).clamp(min=1)).sum() / len(boxes)
    return score_loss + 10 * place_loss


def train(
    data: Path, minutes: float, start: Path | None = None, batch: int = 24, rate: float = 3e-3, seed: int = 6
) -> tuple[Detector, int]:
    """Train the detector and return it with the number of steps.

    Args:
        start: an earlier state to continue at half the learning rate.
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    world = dataset.load(data / "train")
    keypoints = five_points(np.asarray(world.points))
    detector = Detector().train()
    if start is not None:
        detector.load_state_dict(torch.load(start, weights_only=True))
        rate /= 2

    def loss_of(done: float) -> Tensor:
        rows = np.sort(random.integers(0, len(world.pictures), batch))
        return detection_loss(detector, draw_canvases(world.pictures[rows], world.boxes[rows], keypoints[rows], random))

    steps = fit([detector], loss_of, minutes, rate)
    return detector.eval(), steps


def write(detector: Detector, path: Path) -> None:
    names: dict[str, dict[int, str]] = {"image": {2: "height", 3: "width"}}
    for what in ("score", "box", "points"):
        for stride in (8, 16, 32):
            names[f"{what}_{stride}"] = {0: f"cells_{stride}"}
    export(Scrfd(detector), torch.zeros(1, 3, 640, 640), path, names)


def evaluate(
    pack_folder: Path, pictures: np.ndarray, boxes: np.ndarray, keypoints: np.ndarray, count: int = 200
) -> dict[str, float]:
    """Measure `faces.find_faces` on `count` of the images [N,S,S,3] with the boxes [N,4] and keypoints [N,5,2].

    Returns:
        The shares of images in which the face was found, with more than one detection, and with detection only after
        padding. Also the mean overlap, and errors in pixels of the images. Only the first one if no face was found.
    """
    pack = load_pack(pack_folder)
    rows = np.linspace(0, len(pictures) - 1, count).astype(int)
    overlaps, errors, more, padded = [], [], 0, 0
    for row in rows:
        try:
            faces = find_faces(pack, Photo(np.array(pictures[row]), "test"))
        except NoFaceError:
            continue
        best = max(faces, key=lambda face: face.score)
        more += len(faces) > 1
        padded += best.padded
        overlaps.append(iou(best.box, boxes[row]))
        errors.append(np.linalg.norm(best.keypoints - keypoints[row], axis=1).mean())
    if not errors:
        return {"pictures": count, "found": 0.0}
    found = [value for value in overlaps if value > 0.5]
    return {
        "pictures": count,
        "found": len(found) / count,
        "more_than_one": more / count,
        "padded": padded / count,
        "overlap": float(np.mean(overlaps)),
        "points_error_px": float(np.mean(errors)),
        "points_error_px_worst": float(np.max(errors)),
    }


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over union of two boxes [4]."""
    inner = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return float(inner / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inner))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the miniature's face detector.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder whose `identity` has the recognition network")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--start", type=Path, help=".pt file of an earlier training run to continue")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trained, steps = train(arguments.data, arguments.minutes, arguments.start)
    torch.save(trained.state_dict(), arguments.out / "detector.pt")
    write(trained, arguments.out / "identity" / "detector.onnx")
    test = dataset.load(arguments.data / "test")
    measured = evaluate(arguments.out / "identity", test.pictures, test.boxes, five_points(np.asarray(test.points)))
    write_figures(arguments.out, "detector", {"steps": steps, **measured})
