"""The report of an ablation: results.json, ablation.md and sheet.png."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facesnap_ext.files import atomic_write
from facesnap_lab.ablation.pictures import Subject
from facesnap_lab.ablation.rows import MIXER, TABLE_2, TABLE_3, Row, all_rows, distinct, reference_rows
from facesnap_lab.markdown import interval_cell, markdown_table
from facesnap_lab.sheet import Panel, sheet
from facesnap_lab.statistics import bootstrap

SHEET_PEOPLE = 8
TO_REFERENCE = {"face_sim": "judge", "inner": "inner-face judge", "clip_face": "CLIP-face"}
TO_UNSEEN = {"face_sim_unseen": "judge", "inner_unseen": "inner-face judge"}
ENOUGH_SEEDS, ENOUGH_PEOPLE = 3, 200


@dataclass(frozen=True, eq=False)
class Scores:
    """The judges' scores by row name, for images of S seeds of the same P people.

    values: cosines [S,P] by metric. fid: [S]. faceless: [S] numbers of images without a face, which count as 0.
    """

    values: dict[str, dict[str, np.ndarray]]
    fid: dict[str, np.ndarray]
    faceless: dict[str, np.ndarray]


def estimate(values: np.ndarray) -> dict[str, Any]:
    """Summarise values [S,P].

    Returns:
        The mean with its bootstrap 95 % interval over people (averaged over seeds), the mean of each seed, and their
        standard deviation (None for a single seed).
    """
    return asdict(bootstrap(values.mean(axis=0))) | _over_seeds(values.mean(axis=1))


def _over_seeds(means: np.ndarray) -> dict[str, Any]:
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else None
    return {"seeds": [float(mean) for mean in means], "spread": spread}


def differences(scores: Scores, pairs: Iterable[tuple[Row, Row]]) -> list[dict[str, Any]]:
    """Return the second row of each pair minus the first, paired by person and seed."""
    found = []
    for first, second in pairs:
        a, b = scores.values[first.name], scores.values[second.name]
        gains = {metric: estimate(b[metric] - a[metric]) for metric in a}
        found.append({"from": first.name, "to": second.name, **gains})
    return found


def results(
    about: dict[str, Any], references: Sequence[int], scores: Scores, limits: dict[str, dict[str, np.ndarray]]
) -> dict[str, Any]:
    """Collect all measurements for JSON; cosines are not scaled.

    Args:
        about: `seeds`, `people` and other facts about the run. limits: by name and metric [P].
    """
    rows = {}
    for row in _among(scores.values, all_rows(references)):
        fid = scores.fid[row.name]
        rows[row.name] = {metric: estimate(values) for metric, values in scores.values[row.name].items()}
        rows[row.name] |= {"fid": {"mean": float(fid.mean()), **_over_seeds(fid)}}
        rows[row.name] |= {"training": row.training.name, "without_face": scores.faceless[row.name].tolist()}
    return {
        "about": about,
        "rows": rows,
        "table_2": differences(scores, pairwise(_among(scores.values, TABLE_2))),
        "table_3": differences(scores, pairwise(_among(scores.values, TABLE_3))),
        "references": differences(scores, _reference_pairs(scores.values, references)),
        "limits": {
            name: {metric: asdict(bootstrap(values)) for metric, values in row.items()} for name, row in limits.items()
        },
    }


def _among(names: Container[str], rows: Iterable[Row]) -> list[Row]:
    """Select the rows whose names are present; an ablation may cover only some."""
    return [row for row in rows if row.name in names]


def _reference_pairs(names: Container[str], counts: Sequence[int]) -> list[tuple[Row, Row]]:
    """Pair averaged with fused, and one reference with several, if both rows are present."""
    pairs = []
    for count in counts:
        if count > 1:
            averaged, fused = reference_rows([count])
            pairs.append((averaged, fused))
            if 1 in counts:
                pairs.append((MIXER, fused))
    return [pair for pair in pairs if len(_among(names, pair)) == 2]


def markdown(found: dict[str, Any], references: Sequence[int]) -> str:
    """Format the tables."""
    lines = ["# Ablations", ""]
    for title, key, rows in (
        ("Table 2: Facial Attribute Mixer", "table_2", TABLE_2),
        ("Table 3: FFRNet and spatial control", "table_3", TABLE_3),
    ):
        rows = _among(found["rows"], rows)
        if not rows:
            continue
        lines += [f"## {title}", ""]
        head = [*TO_REFERENCE.values(), "FID", "paper: CLIP-face", "paper: FaceSim", "paper: FID"]
        lines += markdown_table(head, ((row.title, _cells(found, row, TO_REFERENCE)) for row in rows))
        if found[key]:
            lines += ["", "Gain of each row over the row above, on the same people:", ""]
            lines += markdown_table(list(TO_REFERENCE.values()), _gains(found[key], rows, TO_REFERENCE))
        lines.append("")
    rows = _among(found["rows"], reference_rows(references))
    if rows:
        lines += ["## Number of references", "", "Likeness to photos that were not used as references:", ""]
        lines += markdown_table(list(TO_UNSEEN.values()), ((row.title, _cells(found, row, TO_UNSEEN)) for row in rows))
    if found["references"]:
        lines += ["", "Gains, on the same people:", ""]
        lines += markdown_table(list(TO_UNSEEN.values()), _gains(found["references"], rows, TO_UNSEEN))
    lines += ["", "## Limits", ""]
    limits = [(name, [interval_cell(row[metric]) for metric in TO_REFERENCE]) for name, row in found["limits"].items()]
    lines += markdown_table(list(TO_REFERENCE.values()), limits)
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(found)), ""])


def _cells(found: dict[str, Any], row: Row, named: dict[str, str]) -> list[str]:
    measured = found["rows"][row.name]
    cells = [interval_cell(measured[metric]) for metric in named]
    if row.paper and named is TO_REFERENCE:
        fid = measured["fid"]
        spread = "" if fid["spread"] is None else f" ±{fid['spread']:.3g}"
        cells += [f"{fid['mean']:.4g}{spread}", *(f"{number:g}" for number in row.paper)]
    return cells


def _gains(
    gains: Sequence[dict[str, Any]], rows: Sequence[Row], named: dict[str, str]
) -> list[tuple[str, Sequence[str]]]:
    titles = {row.name: row.title for row in rows}
    return [
        (f"{titles[gain['to']]} over {titles[gain['from']]}", [interval_cell(gain[metric], "+") for metric in named])
        for gain in gains
    ]


def _notes(found: dict[str, Any]) -> list[str]:
    about = found["about"]
    seeds, people = len(about["seeds"]), about["people"]
    budget = f"{about['steps']} steps of {about['images_per_step']} images"
    distances = f"{about['pair_distance_mm']:.2f} mm; for any two people it is {about['mean_distance_mm']:.2f} mm"
    notes = [
        (
            f"{people} held-out people of the miniature world, {seeds} seeds. Every row generates one image of each "
            "person, from the same reference, driving photo, prompt and noise."
        ),
        f"Each training run: {budget}. Rows that differ only at inference share a training run.",
        (
            "Cosines × 100 to the reference; an image without a face counts as 0. Brackets contain bootstrap 95 % "
            "intervals over people; ± is the standard deviation between seeds."
        ),
        (
            "The judges are never used for conditioning. CLIP-face and FID use the same CLIP that conditions the "
            "images, so compare them between rows, not with the paper's values."
        ),
        (
            "Each person is driven by someone with a differently shaped face: at rest, the mean distance between the "
            f"points of the two is {distances}."
        ),
    ]
    if seeds < ENOUGH_SEEDS or people < ENOUGH_PEOPLE:
        notes.insert(0, f"Too little data for conclusions: use {ENOUGH_SEEDS} seeds and {ENOUGH_PEOPLE} people.")
    for name, row in found["rows"].items():
        if sum(row["without_face"]):
            notes.append(f"'{name}': {sum(row['without_face'])} of {seeds * people} images have no face.")
    return notes


def people_sheet(
    subject_of: Callable[[int], Subject], image_path: Callable[[Row, int], Path], scores: Scores, people: int
) -> Image.Image:
    """Show the first people: reference, driving photo, and the first seed's image of each row of the tables."""
    panels = []
    for index in range(min(people, SHEET_PEOPLE)):
        subject = subject_of(index)
        panels.append([Panel(f"Person {index}", Image.fromarray(subject.references[0]), "reference")])
        panels[-1].append(Panel("Driving photo", Image.fromarray(subject.driving), subject.prompt.split(",")[0]))
        for row in _among(scores.values, distinct((*TABLE_3[:-1], *TABLE_2))):
            likeness = 100 * scores.values[row.name]["face_sim"][0, index]
            panels[-1].append(Panel(row.title, Image.open(image_path(row, index)), f"judge {likeness:.0f}"))
    return sheet("Reference, driving photo, and the image of each row", panels)


def write_report(out: Path, found: dict[str, Any], references: Sequence[int], sheet_image: Image.Image) -> None:
    """Write the three files atomically."""
    data = io.BytesIO()
    sheet_image.save(data, format="PNG")
    for name, content in (
        ("results.json", (json.dumps(found, indent=2) + "\n").encode()),
        ("ablation.md", markdown(found, references).encode()),
        ("sheet.png", data.getvalue()),
    ):
        with atomic_write(out / name) as part:
            part.write_bytes(content)
