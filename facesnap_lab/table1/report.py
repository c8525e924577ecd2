"""The report of Table 1: results.json, table1.md, sheet.png, plot.png and curves.png."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facesnap_ext.files import atomic_write
from facesnap_lab.evaluation.draw import cost
from facesnap_lab.evaluation.report import TITLES as METRIC_TITLES
from facesnap_lab.evaluation.report import Column, people_sheet, plot
from facesnap_lab.markdown import interval_cell, markdown_table
from facesnap_lab.statistics import crossed_bootstrap
from facesnap_lab.table1.scores import FACESNAP, LIMITS, pictures, read_scores, weights_of
from facesnap_lab.table1.world import World

TITLES = {
    "copy": "copy of the reference",
    "stranger": "photo of another person",
    "no-person": "no person",
    "ip-adapter-face": "IP-Adapter, face embedding",
    "ip-adapter-plus": "IP-Adapter, CLIP tokens",
    "photomaker": "PhotoMaker",
    "consistentid": "ConsistentID",
    "pulid": "PuLID",
    "instantid": "InstantID",
    FACESNAP: "FaceSnap",
}
# CLIP-T, CLIP-face, FaceSim and FID in the paper's Table 1
PAPER: dict[str, tuple[float, float, float, float]] = {
    "photomaker": (30.5, 74.6, 61.7, 226.3),
    "consistentid": (31.1, 77.4, 64.8, 219.4),
    "ip-adapter-face": (33.2, 76.7, 67.6, 207.5),
    "ip-adapter-plus": (33.2, 76.7, 67.6, 207.5),
    "pulid": (33.0, 78.7, 72.5, 208.6),
    "instantid": (32.8, 78.9, 71.1, 208.9),
    FACESNAP: (32.6, 81.4, 73.6, 205.6),
}
HALF_WAY = 0.5  # from two people to one; a method that stays below has not been trained enough
CURVE_POINTS = 60


def results(world: World, out: Path, seeds: Sequence[int], methods: Sequence[str]) -> dict[str, Any]:
    """Collect all measurements for JSON; cosines are not multiplied by 100."""
    scores = {row: [read_scores(out, row, seed) for seed in seeds] for row in (*LIMITS, *methods)}
    values = {
        row: {metric: np.stack([one.by_person[metric] for one in found]) for metric in found[0].by_person}
        for row, found in scores.items()
    }
    seconds = json.loads((out / "seconds.json").read_text(encoding="utf-8"))
    stranger, copy = (values[row]["face_sim"].mean() for row in ("stranger", "copy"))
    rows = []
    for name, found in scores.items():
        if name in LIMITS:
            values[name] = {metric: column[:1] for metric, column in values[name].items()}  # the same for all seeds
        row: dict[str, Any] = {"name": name}
        row |= {metric: asdict(crossed_bootstrap(column)) for metric, column in values[name].items()}
        position = (values[name]["face_sim"] - stranger) / (copy - stranger)
        own = found[:1] if name in LIMITS else found
        row |= {"position": asdict(crossed_bootstrap(position)), "fid": [one.fid for one in own]}
        row |= {"faceless": [one.faceless for one in own]}
        row |= {"seconds": _ratio(seconds, name), "weights_mb": None, "gpu_memory": None}
        if name in methods:
            row["weights_mb"] = weights_of(out / f"seed-{seeds[0]}", name).stat().st_size / 1e6
            spent = cost(world.protocol.cases(), pictures(out, name, seeds[0]))
            row["gpu_memory"] = spent.memory if spent.memory_kind == "GPU" else None
        rows.append(row)
    return {
        "seeds": list(seeds),
        "people": len(world.protocol.identities),
        "images": len(world.protocol.cases()),
        "poses": len(world.protocol.poses),
        "prompts": len(world.protocol.prompts),
        "steps": world.train.steps,
        "images_per_step": world.train.batch_size * world.train.gradient_accumulation,
        "judges": world.judges.names,
        "rows": rows,
        "orders": _orders(values, {row["name"]: row["fid"] for row in rows}, methods) if FACESNAP in methods else [],
    }


def _ratio(seconds: Mapping[str, Sequence[float]], name: str) -> float | None:
    """Return the median of a row's seconds relative to the base alone, on the same images."""
    if name not in seconds:
        return None
    return float(np.median(np.array(seconds[name]) / np.array(seconds["no-person"])))


def _orders(
    values: Mapping[str, Mapping[str, np.ndarray]], fid: Mapping[str, Sequence[float]], methods: Sequence[str]
) -> list[dict[str, Any]]:
    """Compare FaceSnap minus each rival, on the same people, with the paper's difference."""
    orders = []
    for rival in methods:
        if rival == FACESNAP:
            continue
        for position, metric in enumerate(METRIC_TITLES):
            paper = PAPER[FACESNAP][position] - PAPER[rival][position]
            gains = values[FACESNAP][metric] - values[rival][metric]
            orders.append(_order(rival, metric, asdict(crossed_bootstrap(gains)), paper, len(gains)))
        fids = np.array(fid[FACESNAP], float) - np.array(fid[rival], float)
        gain = {"mean": float(fids.mean()), "low": float(fids.min()), "high": float(fids.max())}
        orders.append(_order(rival, "fid", gain, PAPER[FACESNAP][3] - PAPER[rival][3], len(fids)))
    return orders


def _order(rival: str, metric: str, gain: Mapping[str, float | None], paper: float, seeds: int) -> dict[str, Any]:
    return {
        "rival": rival,
        "metric": metric,
        "gain": gain,
        "paper": paper,
        "outcome": outcome(gain["low"], gain["high"], paper, seeds),
    }


def outcome(low: float | None, high: float | None, paper: float, seeds: int) -> str:
    """Return whether FaceSnap's gain, by its interval, has the sign of the paper's. One seed decides nothing."""
    if seeds < 2 or low is None or high is None or low <= 0 <= high:
        return "not decided"
    return "as in the paper" if (low > 0) == (paper > 0) else "the opposite"


def markdown(found: Mapping[str, Any]) -> str:
    """Format the table, the orders and notes."""
    with_memory = any(row["gpu_memory"] for row in found["rows"])
    head = [*(f"{title}↑" for title in METRIC_TITLES.values()), "position↑", "FID↓", "time↓", "weights↓"]
    head += (["VRAM↓"] if with_memory else []) + ["paper: CLIP-T, CLIP-face, FaceSim, FID"]
    lines = ["# Table 1", "", *markdown_table(head, [_row(row, with_memory) for row in found["rows"]]), ""]
    if found["orders"]:
        lines += ["FaceSnap minus each rival, on the same people, and whether the order is the paper's:", ""]
        lines += markdown_table([*METRIC_TITLES.values(), "FID"], _order_rows(found["orders"]))
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in _notes(found)), ""])


def _row(row: Mapping[str, Any], with_memory: bool) -> tuple[str, list[str]]:
    cells = [interval_cell(row[metric]) for metric in METRIC_TITLES]
    cells.append(interval_cell(row["position"]) + " %")
    cells.append(f"{np.mean(row['fid']):.4g}" + (f" ±{np.std(row['fid'], ddof=1):.2g}" if len(row["fid"]) > 1 else ""))
    cells.append("" if row["seconds"] is None else f"× {row['seconds']:.2f}")
    cells.append("" if row["weights_mb"] is None else f"{row['weights_mb']:.1f} MB")
    if with_memory:
        cells.append("" if row["gpu_memory"] is None else f"{row['gpu_memory'] / 1e9:.1f} GB")
    cells.append(", ".join(f"{number:g}" for number in PAPER.get(row["name"], ())))
    return TITLES[row["name"]], cells


def _order_rows(orders: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    rows = []
    for rival in dict.fromkeys(order["rival"] for order in orders):
        cells = []
        for order in orders:
            if order["rival"] == rival:
                gain = order["gain"]
                text = f"{gain['mean']:+.3g}" if order["metric"] == "fid" else interval_cell(gain, "+")
                cells.append(f"{text}: {order['outcome']}")
        rows.append((TITLES[rival], cells))
    return rows


def _notes(found: Mapping[str, Any]) -> list[str]:
    judges = found["judges"]
    notes = [
        (
            f"{found['people']} people, {found['images']} images per row and seed, in {found['poses']} poses and "
            f"{found['prompts']} prompts; {len(found['seeds'])} seeds of the training. Cosines are × 100. Brackets: "
            "bootstrap 95 % intervals over people and seeds. FID: mean and standard deviation over seeds; its order is "
            "decided if all seeds agree. One seed decides no order."
        ),
        (
            f"Every method was trained for {found['steps']} steps of {found['images_per_step']} images, with the same "
            "images in the same order."
        ),
        (
            f"FaceSim: {judges['face recognition']}. CLIP-face: {judges['clip face']}. CLIP-T: {judges['clip']}. "
            f"FID: {judges['fid features']}. Compare them between rows, not with the paper's values."
        ),
        (
            "Position: FaceSim, scaled so that a photo of another person is 0 % and a copy of the reference is 100 %. "
            "Time: median relative to the base alone; photos are encoded beforehand, and methods take turns. Weights: "
            "size of the file."
        ),
        "Only InstantID and FaceSnap can set the pose; the other methods are measured as they are, as in the paper.",
    ]
    for row in found["rows"]:
        images = found["images"] * len(row["faceless"])
        if count := sum(row["faceless"]):
            notes.append(f"{TITLES[row['name']]}: {count} of {images} images have no face and count as 0.")
        if row["name"] not in LIMITS and row["position"]["mean"] < HALF_WAY:
            notes.append(f"{TITLES[row['name']]} is below 50 %, so its budget was too small.")
    return notes


def curves(out: Path, seed: int, methods: Sequence[str]) -> Image.Image:
    """Plot the losses of each method's training, averaged over about `CURVE_POINTS` parts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axis, tag in zip(figure.subplots(1, 2), ("diffusion", "id")):
        for method in methods:
            steps, losses = logged(out / f"seed-{seed}" / method / "logs", f"loss/{tag}")
            parts = [part for part in np.array_split(np.arange(len(steps)), CURVE_POINTS) if len(part)]
            axis.plot([steps[part].mean() for part in parts], [losses[part].mean() for part in parts])
        axis.set_title(f"loss, {tag}")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.legend([TITLES[method] for method in methods], loc="outside right center")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())


def logged(folder: Path, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of a TensorBoard scalar, empty if it was not logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
    return np.array([one.step for one in found]), np.array([one.value for one in found])


def write_report(world: World, out: Path, seeds: Sequence[int], methods: Sequence[str]) -> Path:
    """Write the five files, and return the table's path."""
    found = results(world, out, seeds, methods)
    plotted = [
        {**row, "name": TITLES[row["name"]], "fid": float(np.mean(row["fid"]))}
        for row in found["rows"]
        if row["name"] not in LIMITS
    ]
    cases = world.protocol.cases()
    columns = [
        Column(TITLES[name], pictures(out, name, seeds[0]), lambda number: cases[number].prompt.name)
        for name in ("no-person", *methods)
    ]
    images = {
        "sheet.png": people_sheet(world.protocol, columns),
        "plot.png": plot({"methods": plotted}),
        "curves.png": curves(out, seeds[0], methods),
    }
    for name, image in images.items():
        with atomic_write(out / name) as part:
            image.save(part, format="PNG")
    for name, text in (("results.json", json.dumps(found, indent=2) + "\n"), ("table1.md", markdown(found))):
        with atomic_write(out / name) as part:
            part.write_text(text, encoding="utf-8")
    return out / "table1.md"
