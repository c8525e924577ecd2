"""Axes of the host's X/Y/Z plot. A value stays with the cell's own copy of the job, never in settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.settings.unit import RANGES, Unit, from_script_args

PREFIX = "[FaceSnap] "
PLOT = ("xyz_grid.py", "xyz_grid")  # ends of its module's name, by host
NUMBERS = ("weight", "adapter", "start", "end", "every", "yaw", "pitch")


def add_axes(identities: Callable[[], Sequence[str]]) -> None:
    """Add the axes to the plot's script, if the host has it; may be called again.

    Args:
        identities: the names of the saved ones.
    """
    for module in _plots():
        for axis in _axes(module.AxisOption, identities):
            if all(axis.label != there.label for there in module.axis_options):
                module.axis_options.append(axis)


def with_axes(p: Any, units: Mapping[int, Unit]) -> dict[int, Unit]:
    """The enabled units of a job with the values that the plot gave to its cell, all of them with the same; those who
    then have nothing to do are left out.

    Raises:
        FaceSnapError: there is no reference of that number.
    """
    values = getattr(p, "facesnap_axes", {})
    given = {number: _with_values(unit, values) for number, unit in units.items()}
    return {number: unit for number, unit in given.items() if unit.active}


def _with_values(unit: Unit, values: dict[str, Any]) -> Unit:
    values = dict(values)
    if (number := values.pop("reference", None)) is not None:
        if not 1 <= number <= len(unit.references):
            raise FaceSnapError(
                f"The plot asks for reference {number}, and there are {len(unit.references)}; give numbers from 1."
            )
        values["references"] = (unit.references[number - 1],)
    if "identity" in values:
        values.setdefault("references", ())  # this person alone
    if {"yaw", "pitch"} & set(values):
        values["pose"] = "sliders"
    return replace(unit, **values)


def _axes(option: Any, identities: Callable[[], Sequence[str]]) -> list[Any]:
    numbers = [
        option(PREFIX + name, type(getattr(Unit, name)), _apply(name), confirm=_in_range(name)) for name in NUMBERS
    ]
    return [
        *numbers,
        option(PREFIX + "reference", int, _apply("reference"), confirm=_are_there),
        option(PREFIX + "identity", str, _apply("identity"), choices=lambda: list(identities())),
    ]


def _apply(name: str) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, value: Any, values: Any) -> None:
        # a new dictionary: the plot's copies of a job share what the job had
        p.facesnap_axes = {**getattr(p, "facesnap_axes", {}), name: value}

    return apply


def _in_range(name: str) -> Callable[[Any, Sequence[float]], None]:
    low, high = RANGES[name]

    def confirm(p: Any, values: Sequence[float]) -> None:
        for value in values:
            if not low <= value <= high:
                raise FaceSnapError(f"FaceSnap's {name} is {value:g} in the plot; give numbers from {low} to {high}.")

    return confirm


def _are_there(p: Any, numbers: Sequence[int]) -> None:
    """Ask before the plot begins: it swallows the errors of its cells and leaves them empty."""
    for script in p.scripts.alwayson_scripts:
        if script.title() == "FaceSnap":
            units = from_script_args(p.script_args[script.args_from : script.args_to])
            for number in numbers:
                for unit in units.values():
                    _with_values(unit, {"reference": number})


def _plots() -> list[Any]:
    from modules import scripts

    modules = [data.module for data in scripts.scripts_data if data.script_class.__module__.endswith(PLOT)]
    return [module for module in modules if hasattr(module, "axis_options")]
