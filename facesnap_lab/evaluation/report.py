"""The report of an evaluation: results.json, table.md, sheet.png and plot.png."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facesnap_ext import photos
from facesnap_ext.files import atomic_write
from facesnap_lab.evaluation.draw import Cost
from facesnap_lab.evaluation.measure import METRICS, Scores
from facesnap_lab.evaluation.protocol import Protocol, find_images
from facesnap_lab.markdown import markdown_table
from facesnap_lab.sheet import Panel, sheet
from facesnap_lab.statistics import bootstrap

TITLES = {"clip_t": "CLIP-T", "clip_face": "CLIP-face", "face_sim": "FaceSim"}
SHEET_PEOPLE = 8
DASH = "–"


def results(
    protocol: Protocol, judges: dict[str, str | None], methods: Sequence[Scores], costs: dict[str, Cost]
) -> dict[str, Any]:
    """Collect all measurements for JSON; cosines are not multiplied by 100.

    Args:
        judges: the networks' names. costs: by method name, where known.
    """
    rows = []
    for scores in methods:
        row: dict[str, Any] = {"name": scores.name}
        row |= {metric: asdict(interval) for metric, interval in scores.intervals.items()}
        row |= {"fid": scores.fid, "cost": asdict(costs[scores.name]) if scores.name in costs else None}
        row |= {"without_face": scores.without_face and list(scores.without_face)}
        row |= {"extra_images": scores.extra_images}
        names = [identity.name for identity in protocol.identities]
        row["by_person"] = {metric: dict(zip(names, column)) for metric, column in scores.by_person.items()}
        rows.append(row)
    return {
        "list": {
            "identities": len(protocol.identities),
            "poses": len(protocol.poses),
            "prompts": len(protocol.prompts),
            "images": len(protocol.cases()),
            "real_photos": sum(len(identity.real) for identity in protocol.identities),
            "seed": protocol.seed,
        },
        "judges": judges,
        "methods": rows,
        "differences": _differences(methods),
    }


def table(found: dict[str, Any]) -> str:
    """Format the paper's Table 1 in Markdown, cosines times 100 with intervals, followed by differences and notes."""
    rows = []
    for row in found["methods"]:
        cells = [_percent(row.get(metric)) for metric in METRICS]
        cells.append(DASH if row["fid"] is None else f"{row['fid']:.1f}")
        cells += _cost_cells(row["cost"])
        rows.append((row["name"], cells))
    lines = markdown_table(["CLIP-T↑", "CLIP-face↑", "FaceSim↑", "FID↓", "Time↓", "VRAM↓"], rows)
    first, *others = (row["name"] for row in found["methods"])
    if others:
        lines += ["", f"{first} minus each other method, on the same people:", ""]
        differences = found["differences"]
        lines += markdown_table(
            list(TITLES.values()),
            ((other, [_percent(differences[other].get(metric), sign="+") for metric in METRICS]) for other in others),
        )
    return "\n".join([*lines, "", *_notes(found), ""])


def write_report(
    out: Path, protocol: Protocol, judges: dict[str, str | None], methods: Sequence[Scores], costs: dict[str, Cost]
) -> dict[str, Any]:
    """Write the four files to `out` and return the `results`."""
    found = results(protocol, judges, methods, costs)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "results.json", (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode())
    _write(out / "table.md", table(found).encode())
    _save_png(out / "sheet.png", people_sheet(protocol, list(map(scored_column, methods))))
    if found["methods"][0].keys() & set(METRICS):
        _save_png(out / "plot.png", plot(found))
    return found


@dataclass(frozen=True)
class Column:
    """A method's images in a sheet. caption: of the image of a case, by its number."""

    title: str
    folder: Path
    caption: Callable[[int], str]


def scored_column(scores: Scores) -> Column:
    def caption(number: int) -> str:
        return ", ".join(f"{TITLES[metric]} {100 * column[number]:.0f}" for metric, column in scores.values.items())

    return Column(scores.name, scores.folder, caption)


def people_sheet(protocol: Protocol, columns: Sequence[Column]) -> Image.Image:
    """Show the first people: reference, driving photo, and each method's image, cycling through the poses."""
    cases = protocol.cases()
    found = [find_images(cases, column.folder) for column in columns]
    of_person = len(cases) // len(protocol.identities)
    rows = []
    for person, identity in enumerate(protocol.identities[:SHEET_PEOPLE]):
        number = person * of_person + person * (len(protocol.prompts) + 1) % of_person
        case = cases[number]
        row = [
            Panel(identity.name, _image(identity.references[0]), "reference"),
            Panel(case.pose.name, _image(case.pose.photo), "driving photo"),
        ]
        for column, images in zip(columns, found):
            row.append(Panel(column.title, _image(images[case.file]), column.caption(number)))
        rows.append(row)
    return sheet("Reference, driving photo, and the image of each method", rows)


def plot(found: dict[str, Any]) -> Image.Image:
    """Plot each metric by method, with its intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = found["methods"]
    measured = [metric for metric in METRICS if metric in rows[0]]
    with_fid = rows[0]["fid"] is not None
    count = len(measured) + with_fid
    figure = Figure(figsize=(3.2 * count, 1.6 + 0.45 * len(rows)), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, count, squeeze=False)[0]
    positions = np.arange(len(rows))[::-1]
    for axis, metric in zip(axes, measured):
        means = np.array([100 * row[metric]["mean"] for row in rows])
        bounds = [(row[metric]["low"], row[metric]["high"]) for row in rows]
        errors = [
            (0, 0) if low is None else (mean - 100 * low, 100 * high - mean) for mean, (low, high) in zip(means, bounds)
        ]
        axis.errorbar(means, positions, xerr=np.maximum(np.array(errors).T, 0), fmt="o", capsize=4)
        axis.set_title(f"{TITLES[metric]} ↑")
    if with_fid:
        axes[-1].plot([row["fid"] for row in rows], positions, "o")
        axes[-1].set_title("FID ↓")
    for i, axis in enumerate(axes):
        axis.set_yticks(positions, [row["name"] for row in rows] if i == 0 else [""] * len(rows))
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.margins(x=0.2)
        axis.grid(axis="x", alpha=0.3)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())


def _differences(methods: Sequence[Scores]) -> dict[str, Any]:
    """Subtract each other method from the first, paired by person."""
    first, *others = methods
    return {
        other.name: {
            metric: asdict(bootstrap(column - other.by_person[metric])) for metric, column in first.by_person.items()
        }
        for other in others
    }


def _notes(found: dict[str, Any]) -> list[str]:
    size, judges = found["list"], found["judges"]
    counts = f"{size['identities']} identities × {size['poses']} poses × {size['prompts']} prompts"
    features = judges["fid features"]
    fid = features and f"{features}, against {size['real_photos']} real photos; FID depends on both image counts"
    notes = [
        f"{counts} = {size['images']} images. Cosines are × 100. Brackets: bootstrap 95 % intervals over identities.",
        f"CLIP: {judges['clip'] or 'not measured'}. FaceSim: {judges['face recognition'] or 'not measured'}.",
        f"FID: {fid or 'not measured'}.",
    ]
    kinds = {"GPU": "torch's allocations on the GPU", "process": "the process, since no GPU was used"}
    for row in found["methods"]:
        if row["without_face"]:
            notes.append(f"{row['name']}: {len(row['without_face'])} images without a face, which count as 0.")
        if row["extra_images"]:
            notes.append(f"{row['name']}: {row['extra_images']} images are not in the list and were ignored.")
        if cost := row["cost"]:
            notes.append(
                f"{row['name']}: time is the median per image including preparation, on {cost['device']}; "
                f"memory is the peak of {kinds[cost['memory_kind']]}."
            )
    return [f"- {note}" for note in notes]


def _percent(interval: dict[str, float | None] | None, sign: str = "") -> str:
    if interval is None:
        return DASH
    mean = f"{100 * interval['mean']:{sign}.1f}"
    return mean if interval["low"] is None else f"{mean} ({100 * interval['low']:.1f} to {100 * interval['high']:.1f})"


def _cost_cells(cost: dict[str, Any] | None) -> list[str]:
    if cost is None:
        return [DASH, DASH]
    memory = cost["memory"]
    return [f"{cost['seconds']:.1f}s", DASH if memory is None else f"{memory / 1e9:.1f}GB"]


def _image(path: Path) -> Image.Image:
    return Image.fromarray(photos.from_path(path).pixels)


def _save_png(path: Path, image: Image.Image) -> None:
    with atomic_write(path) as part:
        image.save(part, format="PNG")


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as part:
        part.write_bytes(data)
