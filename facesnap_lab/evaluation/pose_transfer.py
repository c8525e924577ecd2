"""Measure how well 72 points carry one person's pose and expression over to another person's face.

    python -m facesnap_lab.evaluation.pose_transfer --pairs 200

Prints JSON. The people are random heads whose true points are known, so nothing has to be detected: a photo is the
projection of the true points plus Gaussian noise. For each pair, the source has one near-frontal photo, or several, and
the driver one turned up to 50 degrees. The truth is the source's head with the driver's expression and pose. Errors are
mean distances of points in % of the distance between the source's eyes: `error` after the prediction has been moved and
scaled to fit the truth best, because no photo shows how large a head really is, and `unaligned` without that.

`miniature` heads are the procedural ones of the first miniature, with their own mean face in the basis, as for a
detector whose mean is known. Their shapes and expressions are not those of the basis. `basis` heads are drawn from the
open face model itself, so the model can represent them exactly and the result is an upper bound. `--heads FILE` adds
heads of another morphable model: a safetensors file with `mean` [72,3], `shape` [72,3,K] per standard deviation and
`expression` [72,3,M] for full movements, in any unit, x to the right, y up and z to the viewer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from facesnap_ext.landmarks.flame import full_pose, posed_vertices
from facesnap_ext.landmarks.open_face import Basis, OpenPose, face_points, fit, load_basis, predict
from facesnap_ext.landmarks.points72 import LEFT_EYE, RIGHT_EYE, points_on
from facesnap_ext.landmarks.poses import rotation
from facesnap_lab.miniature import world
from facesnap_lab.miniature.render import head
from facesnap_lab.statistics import bootstrap

NOISE = (0.0, 0.01, 0.02, 0.03)  # standard deviation in x and y, relative to the distance between the eyes
SOURCE_ANGLES = (20, 10, 8)  # largest yaw, pitch and roll of a reference photo in degrees
DRIVING_ANGLES = (50, 20, 15)
SCALE = 200.0  # pixels per face height
EXPRESSIONS_PRESENT = 0.3  # share of a morphable model's movements that a face of `--heads` or of the basis shows

Head = Callable[[int, int], np.ndarray]
"""(person, expression) → the points [72,3] of that person with that expression, in face heights."""


@dataclass(frozen=True)
class Heads:
    """A source of people.

    Attributes:
        points: the points of a person with an expression.
        basis: the open face model with the mean face of these heads.
    """

    points: Head
    basis: Basis


@dataclass(frozen=True)
class Photo:
    """A photo of one person: measured points [72,2] in pixels, measured points with depth [72,3], and the camera."""

    points: np.ndarray
    solid: np.ndarray
    turn: np.ndarray  # [3,3]


def miniature_heads() -> Heads:
    """Return the miniature's test people, whose jaws turn about a joint."""
    flame = head()
    neutral = torch.zeros(1, world.SHAPE_CODES), torch.zeros(1, world.EXPRESSION_CODES), torch.zeros(1, 6)

    def on_mesh(shape: torch.Tensor, expression: torch.Tensor, pose: torch.Tensor) -> np.ndarray:
        vertices = posed_vertices(flame, shape, expression, full_pose(flame, pose))
        return points_on(vertices, flame.faces)[0].double().numpy()

    align = _alignment(on_mesh(*neutral))

    def points(person: int, expression: int) -> np.ndarray:
        who = world.person("test", person)
        scene = world.scene(world.person("test", 10_000 + expression), 0)
        pose = torch.tensor(scene.pose[None], dtype=torch.float32)
        pose[:, :3] = 0  # the camera turns instead
        codes = (torch.tensor(values[None], dtype=torch.float32) for values in (who.shape, scene.codes))
        return align(on_mesh(*codes, pose))

    return Heads(points, replace(load_basis(), mean=align(on_mesh(*neutral))))


def basis_heads() -> Heads:
    """Return random people of the open face model itself."""
    basis = load_basis()
    return Heads(_linear(basis.mean, basis.shape, basis.expression, basis.spread), basis)


def heads_from(path: Path) -> Heads:
    """Return random people of another morphable model; see the module's docstring."""
    from safetensors.numpy import load_file

    figures = {name: values.astype(np.float64) for name, values in load_file(path).items()}
    align = _alignment(figures["mean"])
    mean, origin = align(figures["mean"]), align(np.zeros((72, 3)))

    def directions(name: str) -> np.ndarray:
        return np.stack([align(one) - origin for one in np.moveaxis(figures[name], 2, 0)], axis=2)

    spread = np.full(figures["expression"].shape[2], 0.3)
    return Heads(_linear(mean, directions("shape"), directions("expression"), spread), replace(load_basis(), mean=mean))


def _linear(mean: np.ndarray, shape: np.ndarray, expression: np.ndarray, spread: np.ndarray) -> Head:
    def points(person: int, face: int) -> np.ndarray:
        modes = np.random.default_rng([1, person]).normal(size=shape.shape[2])
        random = np.random.default_rng([2, face])
        present = random.random(len(spread)) < EXPRESSIONS_PRESENT
        return mean + shape @ modes + expression @ (present * np.abs(random.normal(size=len(spread))) * 2 * spread)

    return points


def _alignment(mean: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the similarity transform that brings a mean face closest to that of the basis."""
    target = load_basis("ict").mean
    centre, target_centre = mean.mean(axis=0), target.mean(axis=0)
    left, sizes, right = np.linalg.svd((target - target_centre).T @ (mean - centre))
    turn = left @ right
    scale = sizes.sum() / ((mean - centre) ** 2).sum()
    return lambda points: scale * (points - centre) @ turn.T + target_centre


def eye_distance(points: np.ndarray) -> float:
    """Return the distance between the centres of the eyes."""
    return float(np.linalg.norm(points[LEFT_EYE].mean(axis=0) - points[RIGHT_EYE].mean(axis=0)))


def take(points: np.ndarray, angles: Sequence[float], noise: float, random: np.random.Generator) -> Photo:
    """Photograph a head [72,3] from a random direction within yaw, pitch and roll of at most `angles` degrees."""
    yaw, pitch, roll = (float(random.uniform(-angle, angle)) for angle in angles)
    turn = rotation(yaw, pitch, roll)
    solid = SCALE * points @ turn.T
    solid = solid + random.normal(0, noise * eye_distance(points) * SCALE, solid.shape)
    return Photo(solid[:, :2] * (1, -1), solid, turn)


def project(points: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Project a head [72,3] into a photo without noise: [72,2] pixels."""
    return SCALE * (points @ turn.T)[:, :2] * (1, -1)


def turned_rigidly(source: Photo, own: OpenPose, driving: Photo, pose: OpenPose) -> np.ndarray:
    """Return the source's measured points with their depth, turned and scaled to the driving photo's pose: [72,2]."""
    solid = (source.solid - source.solid.mean(axis=0)) / own.scale @ own.rotation @ pose.rotation.T
    return driving.points.mean(axis=0) + pose.scale * solid[:, :2] * (1, -1)


def measure(heads: Heads, noise: float, pairs: int, photos: Sequence[int] = (1, 3)) -> dict[str, dict[str, float]]:
    """Measure all methods on random pairs of people.

    Args:
        photos: numbers of reference photos to fit together.

    Returns:
        For each method the mean `error` in % of the distance between the eyes, `low` and `high` of its 95 % interval
        over pairs, and the mean error `unaligned`; see the module's docstring.
    """
    basis = heads.basis
    errors: dict[str, list[tuple[float, float]]] = {}
    for pair in range(pairs):
        random = np.random.default_rng([3, pair])
        source, driver, face = 2 * pair, 2 * pair + 1, 1000 + pair
        references = [
            take(heads.points(source, 100 * pair + 5000 + k), SOURCE_ANGLES, noise, random) for k in range(max(photos))
        ]
        driving = take(heads.points(driver, face), DRIVING_ANGLES, noise, random)
        true_head = heads.points(source, face)
        truth, unit = project(true_head, driving.turn), SCALE * eye_distance(true_head) / 100
        pose = fit(basis, [driving.points])[1][0]
        own = fit(basis, [references[0].points])[1][0]
        predicted = {
            "driving photo's own points": driving.points,
            "source turned rigidly": turned_rigidly(references[0], own, driving, pose),
            "mean face": predict(basis, None, pose),
        }
        for count in photos:
            shape = fit(basis, [photo.points for photo in references[:count]])[0]
            name = "open face model" if count == 1 else f"open face model, {count} photos"
            predicted[name] = predict(basis, shape, pose)
        for name, points in predicted.items():
            both = (distance(moved_and_scaled(points, truth), truth) / unit, distance(points, truth) / unit)
            errors.setdefault(name, []).append(both)
    results = {}
    for name, values in errors.items():
        aligned, unaligned = np.array(values).T
        interval = bootstrap(aligned)
        figures = (interval.mean, interval.low, interval.high, float(unaligned.mean()))
        results[name] = dict(zip(("error", "low", "high", "unaligned"), (round(value or 0.0, 3) for value in figures)))
    return results


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean distance of points [72,2]."""
    return float(np.linalg.norm(a - b, axis=1).mean())


def moved_and_scaled(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return points [72,2] moved and scaled to the least squared distance from the target."""
    centred, goal = points - points.mean(axis=0), target - target.mean(axis=0)
    return centred * float((centred * goal).sum() / (centred**2).sum()) + target.mean(axis=0)


def milliseconds_per_photo(photos: int, repeats: int = 50) -> float:
    """Return the shortest time of a joint fit, which other load on the machine affects least, per photo."""
    basis, random = load_basis(), np.random.default_rng(0)
    taken = [take(face_points(basis), DRIVING_ANGLES, 0.02, random).points for _ in range(photos)]
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        fit(basis, taken)
        times.append(time.perf_counter() - began)
    return min(times) * 1000 / photos


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure pose transfer on synthetic heads.")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of people for each kind of head (default: 200)")
    parser.add_argument("--heads", type=Path, help="safetensors file of another morphable model's 72 points")
    options = parser.parse_args()
    sources = {"miniature": miniature_heads(), "basis": basis_heads()}
    if options.heads:
        sources[options.heads.stem] = heads_from(options.heads)
    errors = {
        name: {f"{noise:.0%}": measure(heads, noise, options.pairs) for noise in NOISE}
        for name, heads in sources.items()
    }
    speed = {str(count): round(milliseconds_per_photo(count), 2) for count in (1, 4, 16)}
    print(json.dumps({"pairs": options.pairs, "errors": errors, "milliseconds_per_photo": speed}, indent=2))


if __name__ == "__main__":
    main()
