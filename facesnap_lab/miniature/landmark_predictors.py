"""Compare the open face model with DECA and FLAME on people that no network was trained on.

    python -m facesnap_lab.miniature.landmark_predictors --people 100 --out out/landmark_predictors

Prints JSON. Each person is drawn in another person's pose and expression, once for each source of the 72 landmarks,
with the same tokens, prompt and noise. The judges are networks that are never used for conditioning.

The miniature has no detector of 68 landmarks. The open face model therefore reads the landmarks that DECA and FLAME
reconstruct of each photo, so that both predictors see the same mistakes, or the true ones with noise. Its mean face is
the miniature's, as for a detector whose mean is known.

Controls: "driving photo" draws the driving person's own landmarks, as FaceSnap did without DECA and FLAME, "mean face"
is the open face model without the person's shape, and "truth" projects the person's true head.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facesnap_ext.engine import Engine
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.identity.faces import Face
from facesnap_ext.identity.job_landmarks import in_output
from facesnap_ext.landmarks.open_face import Basis, fit, predict
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.photos import Photo
from facesnap_ext.settings.unit import Unit
from facesnap_lab.evaluation.pose_transfer import distance, eye_distance, miniature_heads, moved_and_scaled
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.dataset import SIDE
from facesnap_lab.miniature.measure import JUDGES, Judge, draw, likeness, photo, pose_error, random_prompt
from facesnap_lab.miniature.render import render
from facesnap_lab.miniature.shipped import Sampler
from facesnap_lab.miniature.world import person, scene
from facesnap_lab.sheet import Panel, sheet
from facesnap_lab.statistics import rounded_interval

REFERENCE = "DECA and FLAME"
METHODS = (
    REFERENCE,
    "open face model",
    "open face model, true points with 2 % noise",
    "driving photo",
    "mean face",
    "truth",
)
DIGITS = 4  # of the printed figures
NOISE = 0.02  # standard deviation in x and y, relative to the distance between the eyes


@dataclass(frozen=True, eq=False)
class Drawn:
    """One person's image with one source of landmarks.

    Attributes:
        likeness: each judge's cosine between this image and the reference; 0 without a face.
        pose_error: degrees between DECA's estimate in the image and the true pose of the driving photo; nan without a
            face.
        landmark_error: mean distance between the landmarks, moved and scaled to fit best, and the true ones, in % of
            the distance between the eyes.
    """

    picture: np.ndarray
    likeness: dict[str, float]
    pose_error: float
    landmark_error: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """One person's photo, the driving photo, and the images by method."""

    reference: np.ndarray
    driving: np.ndarray
    drawn: dict[str, Drawn]


def compare(sampler: Sampler, people: int, progress: Callable[[str], None] = print) -> list[Comparison]:
    """Draw each of the test split's first people with every method."""
    judges = {name: Judge(name) for name in JUDGES}
    compared = []
    with tempfile.TemporaryDirectory() as folder:
        files = shipped.write_models(Path(folder))
        engine = Engine(lambda: files)
        encoders, basis = engine.encoders(files), miniature_heads().basis
        for index in range(people):
            driver = (index + people // 2) % people
            compared.append(_compare_one(sampler, engine, encoders, basis, judges, index, driver))
            if len(compared) % 10 == 0:
                progress(f"{len(compared)} of {people}")
    return compared


def _compare_one(
    sampler: Sampler,
    engine: Engine,
    encoders: Encoders,
    basis: Basis,
    judges: dict[str, Judge],
    index: int,
    driver: int,
) -> Comparison:
    random = np.random.default_rng([0, index])
    reference, _ = photo("test", index, 0)
    driving, truth = photo("test", driver, 1)
    photos = Photo(reference, "Reference"), Photo(driving, "Driving photo")
    prepared = engine.prepare(Unit(enabled=True, references=photos[:1], driving=photos[1]), SIDE, SIDE)
    prompt = random_prompt(random)
    own = {name: judge.embedding(reference) for name, judge in judges.items()}
    landmarks = landmarks_by_method(encoders, basis, prepared.references[0], prepared.driving, index, driver)
    true_points = landmarks["truth"].points
    drawn = {}
    for name, found in landmarks.items():
        conditioning = replace(prepared.conditioning, landmarks=found)
        picture = draw(sampler, prompt, index, replace(prepared, conditioning=conditioning))
        error = distance(moved_and_scaled(found.points, true_points), true_points)
        drawn[name] = Drawn(
            picture,
            {kind: likeness(own[kind], judge.embedding(picture)) for kind, judge in judges.items()},
            pose_error(encoders, picture, truth),
            100 * error / eye_distance(true_points),
        )
    return Comparison(reference, driving, drawn)


def landmarks_by_method(
    encoders: Encoders, basis: Basis, source: Face, driving: Face, index: int, driver: int
) -> dict[str, Landmarks]:
    """Return the landmarks in the output image, by method.

    Args:
        basis: the open face model with the mean face of the miniature.
        source, driving: the faces in the person's photo 0 and in the driving person's photo 1.
        index, driver: numbers of the two people in the test split.
    """
    codes = encoders.codes(source)
    detected = [encoders.landmarks(encoders.codes(face).shape, face).points for face in (source, driving)]
    random = np.random.default_rng([1, index])
    noisy = []
    for number, shot in ((index, 0), (driver, 1)):
        who = person("test", number)
        points = render([who], [scene(who, shot)], SIDE)[0].points
        noisy.append(points + random.normal(0, NOISE * eye_distance(points), points.shape))
    posed = replace(person("test", driver), shape=person("test", index).shape)
    true_head = render([posed], [scene(person("test", driver), 1)], SIDE)[0].points

    def fitted(points: Sequence[np.ndarray]) -> np.ndarray:
        shape, _ = fit(basis, points[:1])
        return predict(basis, shape, fit(basis, points[1:])[1][0])

    def placed(points: np.ndarray) -> Landmarks:
        return in_output(Landmarks(points.astype(np.float32), SIDE, SIDE), driving, SIDE, SIDE)

    pose = fit(basis, detected[1:])[1][0]
    points = (
        encoders.landmarks(codes.shape, driving).points,
        fitted(detected),
        fitted(noisy),
        detected[1],
        predict(basis, None, pose),
        true_head,
    )
    return dict(zip(METHODS, map(placed, points)))


def summary(compared: Sequence[Comparison]) -> dict[str, Any]:
    """Return the mean of each figure by method with its bootstrap 95 % interval over people, and the same for the
    difference from DECA and FLAME, person by person."""

    def column(method: str, figure: Callable[[Drawn], float]) -> np.ndarray:
        return np.array([figure(one.drawn[method]) for one in compared])

    figures: dict[str, Callable[[Drawn], float]] = {
        **{name: partial(_likeness, judge=name) for name in JUDGES},
        "pose_error_degrees": lambda drawn: drawn.pose_error,
        "landmark_error_percent": lambda drawn: drawn.landmark_error,
    }
    result: dict[str, Any] = {"people": len(compared)}
    for method in METHODS:
        result[method] = {}
        for name, figure in figures.items():
            values, reference = column(method, figure), column(REFERENCE, figure)
            result[method][name] = rounded_interval(values, DIGITS)
            if method != REFERENCE:
                result[method][f"{name}_difference"] = rounded_interval(values - reference, DIGITS)
        result[method]["without_a_face"] = int(np.isnan(column(method, figures["pose_error_degrees"])).sum())
    return result


def _likeness(drawn: Drawn, judge: str) -> float:
    return drawn.likeness[judge]


def comparison_sheet(compared: Sequence[Comparison]) -> Image.Image:
    """Show each reference and driving photo next to the images of every method."""
    rows = []
    for one in compared:
        row = [
            Panel("", Image.fromarray(one.reference), "reference"),
            Panel("", Image.fromarray(one.driving), "driving"),
        ]
        for name, drawn in one.drawn.items():
            row.append(Panel(f"{drawn.likeness['judge']:.2f}", Image.fromarray(drawn.picture), name))
        rows.append(row)
    return sheet("Sources of the landmarks, with the judge's likeness", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the open face model with DECA and FLAME in the miniature.")
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("out/landmark_predictors"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    compared = compare(shipped.few_step_sampler(), options.people)
    comparison_sheet(compared[:12]).save(options.out / "sheet.png")
    result = summary(compared)
    (options.out / "figures.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
