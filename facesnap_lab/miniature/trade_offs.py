"""Measure the trade-offs of settings: presets, FFRNet intervals, and FFRNet in 8 bits, on the same people and noise.

    python -m facesnap_lab.miniature.trade_offs --people 100 --out out/trade-offs

Writes `trade-offs.json`, `trade-offs.md` and a sheet with the same people in each row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facesnap_ext.settings.strength import Strength
from facesnap_ext.settings.unit import PRESETS, RANGES
from facesnap_ext.weights.compress import compress
from facesnap_lab.markdown import interval_cell, markdown_table
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.measure import Portrait, caption_accuracy, measure
from facesnap_lab.miniature.shipped import Sampler
from facesnap_lab.sheet import Panel, sheet
from facesnap_lab.statistics import bootstrap

ROWS: dict[str, dict[str, Any]] = {
    **{name: {"strength": Strength(weight, start=start, end=end)} for name, (weight, start, end) in PRESETS.items()},
    **{
        f"FFRNet every {interval} steps": {"strength": Strength(ffrnet_interval=interval)}
        for interval in range(2, int(RANGES["ffrnet_interval"][1]) + 1)
    },
}
SHEET_PEOPLE = 8


def measure_rows(sampler: Sampler, people: int, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Portrait]]:
    """Run `measure` with each row's settings and print the row's name before it starts."""
    measured = {}
    for name, settings in rows.items():
        print(name)
        measured[name] = measure(sampler, people, **settings)
    return measured


def results(measured: Mapping[str, Sequence[Portrait]]) -> dict[str, dict[str, Any]]:
    """Summarise each row.

    Returns:
        By row: the judge's likeness to the reference (cosine) and its difference from the first row's on the same
        people, both with bootstrap 95 % intervals over people. Also the mean angle between the head pose and the
        driving scene's, and how often CLIP recognises the prompt's words.
    """
    first = _likeness(next(iter(measured.values())))
    found = {}
    for name, portraits in measured.items():
        values = _likeness(portraits)
        angles = np.array([portrait.pose_error for portrait in portraits])
        found[name] = {
            "likeness": asdict(bootstrap(values)),
            "difference": asdict(bootstrap(values - first)),
            "pose_error_degrees": round(float(np.nanmean(angles)), 2),
            "without_a_face": int(np.isnan(angles).sum()),
            "words_found": caption_accuracy(portraits)["words_found"],
        }
    return found


def markdown(found: Mapping[str, Mapping[str, Any]]) -> str:
    first, words = next((name, list(row["words_found"])) for name, row in found.items())
    rows = []
    for name, row in found.items():
        difference = "" if name == first else interval_cell(row["difference"], "+")
        parts = [f"{100 * part:.0f} %" for part in row["words_found"].values()]
        rows.append((name, [interval_cell(row["likeness"]), difference, f"{row['pose_error_degrees']}°", *parts]))
    return "\n".join([*markdown_table(["likeness", f"minus {first}", "head pose error", *words], rows), ""])


def write(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write the JSON and Markdown files next to `path`, and print the table."""
    path.with_suffix(".json").write_text(json.dumps(found, indent=2), encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))


def people_sheet(measured: Mapping[str, Sequence[Portrait]]) -> Image.Image:
    """Show the same people in each row, references first."""
    shown = next(iter(measured.values()))[:SHEET_PEOPLE]
    rows = [[Panel("reference", Image.fromarray(portrait.reference), "") for portrait in shown]]
    rows += [
        [Panel(name, Image.fromarray(one.picture), f"{one.similarity:.2f}") for one in portraits[:SHEET_PEOPLE]]
        for name, portraits in measured.items()
    ]
    return sheet("The same people, prompts and noise with different settings", rows)


def _likeness(portraits: Sequence[Portrait]) -> np.ndarray:
    return np.array([portrait.similarity for portrait in portraits])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure the trade-offs of settings.")
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument(
        "--steps", type=int, help="sample the base model in this many steps instead of the few-step model in 8"
    )
    parser.add_argument("--out", type=Path, default=Path("out/trade-offs"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sampler = shipped.few_step_sampler()
    if options.steps:
        sampler = replace(shipped.base_sampler(), steps=options.steps)
    light = options.out / "8-bits.safetensors"
    compress(shipped.FACESNAP, light, fp8=True)
    measured = measure_rows(sampler, options.people, {**ROWS, "FFRNet in 8 bits": {"model": light}})
    people_sheet(measured).save(options.out / "trade-offs.png")
    write(results(measured), options.out / "trade-offs")
