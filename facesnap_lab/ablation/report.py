"""The report of an ablation: results.json, ablation.md and sheet.png."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facesnap_ext.files import atomic_write
from facesnap_lab.ablation.editions import FIRST, Edition
from facesnap_lab.ablation.pictures import Subject
from facesnap_lab.ablation.rows import MIXER, Row, distinct, reference_rows
from facesnap_lab.markdown import interval_cell, markdown_table
from facesnap_lab.sheet import Panel, sheet
from facesnap_lab.statistics import bootstrap, crossed_bootstrap, seeds_for_difference

SHEET_PEOPLE = 8
TO_UNSEEN = {"face_sim_unseen": "judge", "inner_unseen": "inner-face judge"}
ENOUGH_SEEDS, ENOUGH_PEOPLE = 3, 200
RESOLUTION = 0.02  # a smaller difference between rows does not matter


@dataclass(frozen=True, eq=False)
class Scores:
    """The judges' scores by row name, for images of S seeds of the same P people.

    values: cosines [S,P] by metric. fid: [S]. faceless: [S] numbers of images without a face, which count as 0.
    """

    values: dict[str, dict[str, np.ndarray]]
    fid: dict[str, np.ndarray]
    faceless: dict[str, np.ndarray]


def estimate(values: np.ndarray, over_seeds: bool = False) -> dict[str, Any]:
    """Summarise values [S,P].

    Args:
        over_seeds: whether the interval is over people and seeds, and not over people alone.

    Returns:
        The mean with its bootstrap 95 % interval, the mean of each seed, and their standard deviation (None for a
        single seed).
    """
    interval = crossed_bootstrap(values) if over_seeds else bootstrap(values.mean(axis=0))
    return asdict(interval) | _over_seeds(values.mean(axis=1))


def _over_seeds(means: np.ndarray) -> dict[str, Any]:
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else None
    return {"seeds": [float(mean) for mean in means], "spread": spread}


def differences(scores: Scores, pairs: Iterable[tuple[Row, Row]], over_seeds: bool = False) -> list[dict[str, Any]]:
    """Return the second row of each pair minus the first, paired by person and seed."""
    found = []
    for first, second in pairs:
        a, b = scores.values[first.name], scores.values[second.name]
        gains = {metric: estimate(b[metric] - a[metric], over_seeds) for metric in a}
        found.append({"from": first.name, "to": second.name, **gains})
    return found


def verdicts(scores: Scores, edition: Edition) -> list[dict[str, Any]]:
    """Compare the predictions with the scores.

    Returns:
        For each prediction whose rows were measured, the difference; whether it is confirmed, refuted or not decided,
        by its interval over people and seeds; and how many seeds would distinguish the measured difference, or
        `RESOLUTION` if that is larger, from zero (None for a single seed).
    """
    found = []
    for prediction in edition.predictions:
        if prediction.higher not in scores.values or prediction.lower not in scores.values:
            continue
        higher, lower = (scores.values[name][prediction.metric] for name in (prediction.higher, prediction.lower))
        gain = estimate(higher - lower, over_seeds=True)
        seeds = None
        if gain["spread"] is not None:
            seeds = seeds_for_difference(gain["spread"], max(RESOLUTION, abs(gain["mean"])))
        outcome = "not decided"
        if gain["spread"] is not None and not gain["low"] <= 0 <= gain["high"]:
            outcome = "confirmed" if gain["mean"] > 0 else "refuted"
        found.append({**asdict(prediction), "difference": gain, "outcome": outcome, "seeds": seeds})
    return found


def results(
    about: dict[str, Any],
    references: Sequence[int],
    scores: Scores,
    limits: dict[str, dict[str, np.ndarray]],
    edition: Edition = FIRST,
) -> dict[str, Any]:
    """Collect all measurements for JSON; cosines are not scaled.

    Args:
        about: `seeds`, `people` and other facts about the run. limits: by name and metric [P].
    """
    rows = {}
    for row in _among(scores.values, edition.rows(references)):
        fid = scores.fid[row.name]
        measured = scores.values[row.name]
        rows[row.name] = {metric: estimate(values, edition.over_seeds) for metric, values in measured.items()}
        rows[row.name] |= {"fid": {"mean": float(fid.mean()), **_over_seeds(fid)}}
        rows[row.name] |= {"training": row.training.name, "without_face": scores.faceless[row.name].tolist()}
    return {
        "about": about,
        "rows": rows,
        **{
            table.key: differences(scores, pairwise(_among(scores.values, table.rows)), edition.over_seeds)
            for table in edition.tables
        },
        "references": differences(scores, _reference_pairs(scores.values, references)),
        "predictions": verdicts(scores, edition),
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


def markdown(found: dict[str, Any], references: Sequence[int], edition: Edition = FIRST) -> str:
    """Format the tables."""
    lines, columns = ["# Ablations", ""], edition.columns
    for table in edition.tables:
        rows = _among(found["rows"], table.rows)
        if not rows:
            continue
        lines += [f"## {table.title}", ""]
        head = [*columns.values(), "FID", "paper: CLIP-face", "paper: FaceSim", "paper: FID"]
        lines += markdown_table(head, ((row.title, _cells(found, row, columns, with_paper=True)) for row in rows))
        if found[table.key]:
            lines += ["", "Gain of each row over the row above, on the same people:", ""]
            lines += markdown_table(list(columns.values()), _gains(found[table.key], rows, columns))
        lines.append("")
    lines += _prediction_lines(found, edition)
    rows = _among(found["rows"], reference_rows(references)) if edition.with_references else []
    if rows:
        lines += ["## Number of references", "", "Likeness to photos that were not used as references:", ""]
        lines += markdown_table(list(TO_UNSEEN.values()), ((row.title, _cells(found, row, TO_UNSEEN)) for row in rows))
    if found["references"]:
        lines += ["", "Gains, on the same people:", ""]
        lines += markdown_table(list(TO_UNSEEN.values()), _gains(found["references"], rows, TO_UNSEEN))
    lines += ["", "## Limits", ""]
    limits = [(name, [interval_cell(row[metric]) for metric in columns]) for name, row in found["limits"].items()]
    lines += markdown_table(list(columns.values()), limits)
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(found, edition)), ""])


def _prediction_lines(found: dict[str, Any], edition: Edition) -> list[str]:
    """Return a table of the predictions, or nothing if none was made."""
    if not found["predictions"]:
        return []
    tables = [{row.name: row.title for row in table.rows} for table in edition.tables]
    rows = []
    for one in found["predictions"]:
        titles = next(table for table in tables if {one["higher"], one["lower"]} <= table.keys())
        seeds = "unknown" if one["seeds"] is None else str(one["seeds"])
        cells = [edition.columns[one["metric"]], interval_cell(one["difference"], "+"), one["outcome"], seeds]
        rows.append((f"{titles[one['higher']]} over {titles[one['lower']]}", cells))
    return ["## Predictions", "", *markdown_table(["measured by", "difference", "outcome", "seeds needed"], rows), ""]


def _cells(found: dict[str, Any], row: Row, named: Mapping[str, str], with_paper: bool = False) -> list[str]:
    measured = found["rows"][row.name]
    cells = [interval_cell(measured[metric]) for metric in named]
    if with_paper:
        fid = measured["fid"]
        spread = "" if fid["spread"] is None else f" ±{fid['spread']:.3g}"
        cells += [f"{fid['mean']:.4g}{spread}", *(f"{number:g}" for number in row.paper or ())]
        cells += ["" for _ in range(0 if row.paper else 3)]
    return cells


def _gains(
    gains: Sequence[dict[str, Any]], rows: Sequence[Row], named: Mapping[str, str]
) -> list[tuple[str, Sequence[str]]]:
    titles = {row.name: row.title for row in rows}
    return [
        (f"{titles[gain['to']]} over {titles[gain['from']]}", [interval_cell(gain[metric], "+") for metric in named])
        for gain in gains
    ]


def _notes(found: dict[str, Any], edition: Edition) -> list[str]:
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
        *edition.notes,
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
    subject_of: Callable[[int], Subject],
    image_path: Callable[[Row, int], Path],
    scores: Scores,
    people: int,
    edition: Edition = FIRST,
) -> Image.Image:
    """Show the first people: reference, driving photo, and the first seed's image of each row of the tables."""
    panels = []
    for index in range(min(people, SHEET_PEOPLE)):
        subject = subject_of(index)
        panels.append([Panel(f"Person {index}", Image.fromarray(subject.references[0]), "reference")])
        panels[-1].append(Panel("Driving photo", Image.fromarray(subject.driving), subject.prompt.split(",")[0]))
        for row in _among(scores.values, _sheet_rows(edition)):
            likeness = 100 * scores.values[row.name][next(iter(edition.columns))][0, index]
            panels[-1].append(Panel(row.title, Image.open(image_path(row, index)), f"judge {likeness:.0f}"))
    return sheet("Reference, driving photo, and the image of each row", panels)


def _sheet_rows(edition: Edition) -> list[Row]:
    """Return the distinct rows of all tables. The Mixer, which ends each table, has its title in the first one."""
    first, *others = edition.tables
    return distinct((*(row for table in others for row in table.rows if row.name != MIXER.name), *first.rows))


def write_report(
    out: Path,
    found: dict[str, Any],
    references: Sequence[int],
    sheet_image: Image.Image,
    edition: Edition = FIRST,
) -> None:
    """Write the three files atomically."""
    data = io.BytesIO()
    sheet_image.save(data, format="PNG")
    for name, content in (
        ("results.json", (json.dumps(found, indent=2) + "\n").encode()),
        ("ablation.md", markdown(found, references, edition).encode()),
        ("sheet.png", data.getvalue()),
    ):
        with atomic_write(out / name) as part:
            part.write_bytes(content)
