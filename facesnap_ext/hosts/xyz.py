"""Axes of the host's X/Y/Z plot. A value stays with the cell's own copy of the job and never reaches the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.settings.script_args import from_script_args
from facesnap_ext.settings.unit import RANGES, Unit, defaults, with_values

PREFIX = "[FaceSnap] "
PLOT = ("xyz_grid.py", "xyz_grid")  # endings of the plot module's name, by host
NUMBERS = ("weight", "adapter_weight", "start", "end", "ffrnet_interval", "yaw", "pitch")


def add_axes(identities: Callable[[], Sequence[str]]) -> None:
    """Add the axes to the plot's script, if the host has it; may be called again.

    Args:
        identities: returns the names of the saved identities.
    """
    for module in _plots():
        for axis in _axes(module.AxisOption, identities):
            if all(axis.label != other.label for other in module.axis_options):
                module.axis_options.append(axis)


def with_axes(p: Any, units: Mapping[int, Unit]) -> dict[int, Unit]:
    """A job's enabled units with the values that the plot gave to its cell, the same for all of them. Units that are
    then inactive are left out.

    Raises:
        FaceSnapError: there is no reference with the number given in the plot.
    """
    values = getattr(p, "facesnap_axes", {})
    changed = {number: _with_axis_values(unit, values) for number, unit in units.items()}
    return {number: unit for number, unit in changed.items() if unit.active}


def _with_axis_values(unit: Unit, axis_values: Mapping[str, Any]) -> Unit:
    values = dict(axis_values)
    if (number := values.pop("reference", None)) is not None:
        if not 1 <= number <= len(unit.references):
            raise FaceSnapError(
                f"The plot uses reference {number}, but the number of references is {len(unit.references)}; use the "
                "number of an existing reference, counted from 1."
            )
        values["references"] = (unit.references[number - 1],)
    if "identity" in values:
        values.setdefault("references", ())  # only the saved identity
    if {"yaw", "pitch"} & set(values):
        values["pose"] = "sliders"
    return with_values(unit, values)


def _axes(option: Any, identities: Callable[[], Sequence[str]]) -> list[Any]:
    numbers = [
        option(PREFIX + name.replace("_", " "), type(defaults()[name]), _apply(name), confirm=_in_range(name))
        for name in NUMBERS
    ]
    return [
        *numbers,
        option(PREFIX + "reference", int, _apply("reference"), confirm=_references_exist),
        option(PREFIX + "identity", str, _apply("identity"), choices=lambda: list(identities())),
    ]


def _apply(name: str) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, value: Any, values: Any) -> None:
        # a new dictionary, because the plot's copies of a job share their attributes
        p.facesnap_axes = {**getattr(p, "facesnap_axes", {}), name: value}

    return apply


def _in_range(name: str) -> Callable[[Any, Sequence[float]], None]:
    low, high = RANGES[name]

    def confirm(p: Any, values: Sequence[float]) -> None:
        for value in values:
            if not low <= value <= high:
                raise FaceSnapError(f"FaceSnap's {name} is {value:g} in the plot; use numbers from {low} to {high}.")

    return confirm


def _references_exist(p: Any, numbers: Sequence[int]) -> None:
    """Check before the plot begins, because it swallows the errors of its cells and leaves them empty."""
    for script in p.scripts.alwayson_scripts:
        if script.title() == "FaceSnap":
            units = from_script_args(p.script_args[script.args_from : script.args_to])
            for number in numbers:
                for unit in units.values():
                    _with_axis_values(unit, {"reference": number})


def _plots() -> list[Any]:
    from modules import scripts

    modules = [data.module for data in scripts.scripts_data if data.script_class.__module__.endswith(PLOT)]
    return [module for module in modules if hasattr(module, "axis_options")]
