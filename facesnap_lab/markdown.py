"""Markdown tables and their cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """Return the lines of a table with one row per title; `head` names the columns that follow the title column."""
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    return lines + [f"| {title} | {' | '.join(cells)} |" for title, cells in rows]


def interval_cell(value: Mapping[str, float | None], sign: str = "") -> str:
    """Format mean, interval and, if known, spread over seeds, all × 100; `sign` "+" also marks positive values."""
    cell = f"{100 * value['mean']:{sign}.1f}"
    if value["low"] is not None:
        cell += f" ({100 * value['low']:{sign}.1f} to {100 * value['high']:{sign}.1f})"
    return cell if value.get("spread") is None else f"{cell} ±{100 * value['spread']:.1f}"
