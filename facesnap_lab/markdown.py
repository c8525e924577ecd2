"""Tables and figures as reports print them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """The lines of a table: a row for each title and its cells, below `head`, which has no word for the titles."""
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    return lines + [f"| {title} | {' | '.join(cells)} |" for title, cells in rows]


def interval_cell(value: Mapping[str, float | None], sign: str = "") -> str:
    """Mean, interval over people and, where there are several seeds, spread, all × 100; `sign` "+" shows it always."""
    cell = f"{100 * value['mean']:{sign}.1f}"
    if value["low"] is not None:
        cell += f" ({100 * value['low']:{sign}.1f} to {100 * value['high']:{sign}.1f})"
    return cell if value.get("spread") is None else f"{cell} ±{100 * value['spread']:.1f}"
