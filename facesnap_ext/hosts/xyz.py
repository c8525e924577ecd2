"""Axes of the host's X/Y/Z plot: one for every setting of a person except the photos, which cannot be typed into a
plot.

A value is stored in the cell's copy of the job and never changes the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.movements import MOVEMENTS, TURNS
from facesnap_ext.landmarks.poses import TEMPLATES
from facesnap_ext.photos import Photo
from facesnap_ext.regions import region_of
from facesnap_ext.settings.infotext import DEFAULTS, PHOTOS
from facesnap_ext.settings.page_settings import block_weights
from facesnap_ext.settings.script_args import check_intervals, from_script_args
from facesnap_ext.settings.unit import CHOICES, Unit, short_repr, with_values

PREFIX = "[FaceSnap] "
PLOT = ("xyz_grid.py", "xyz_grid")  # endings of the plot module's name in different hosts
SETTINGS = tuple([name for name in DEFAULTS if name not in PHOTOS])  # for `enabled`, use the weight 0
IMPLIED = {  # what a setting belongs to, and switches on unless another axis does
    "template": ("pose", "template"),
    "saved_pose": ("pose", "saved"),
    **dict.fromkeys(TURNS, ("pose", "sliders")),
    "expression": ("expression_source", "custom"),
    "expression_strength": ("expression_source", "custom"),
    "region_scale": ("region", "face"),
}
SWITCHES = ("True", "False")

Choices = Callable[[], Sequence[str]]


def add_axes(names: Mapping[str, Choices]) -> None:
    """Add the axes to the plot's script, if the host has it; may be called again.

    Args:
        names: functions that return the installed files' names for the settings "identity", "model" and "saved_pose".
    """
    for module in _plots():
        for axis in _axes(module.AxisOption, names):
            if all(axis.label != other.label for other in module.axis_options):
                module.axis_options.append(axis)


def with_axes(p: Any, units: Mapping[int, Unit]) -> dict[int, Unit]:
    """A job's enabled units with the plot's values for its cell, which apply to all units. Units that become inactive
    are left out.

    Raises:
        FaceSnapError: there is no reference with the plot's number, or a person's start is not before the end.
    """
    values = getattr(p, "facesnap_axes", {})
    changed = {number: _with_axis_values(unit, values) for number, unit in units.items()}
    check_intervals(changed)
    return {number: unit for number, unit in changed.items() if unit.active}


def _with_axis_values(unit: Unit, axis_values: Mapping[str, Any]) -> Unit:
    values = dict(axis_values)
    if (number := values.pop("reference", None)) is not None:
        values["references"] = (_numbered("reference", number, unit.references),)
    if (number := values.pop("driving", None)) is not None:
        several = unit.driving if isinstance(unit.driving, tuple) else (unit.driving,) if unit.driving else ()
        values["driving"] = _numbered("driving photo", number, several)
    if "identity" in values:
        values.setdefault("references", ())  # the saved identity alone
    for name, (setting, value) in IMPLIED.items():
        if name in values:
            values.setdefault(setting, value)
    source = values.get("expression_source", unit.expression_source)
    if MOVEMENTS.keys() & values and source != "custom":
        values.setdefault("pose", "sliders")  # movements are otherwise not used
    return with_values(unit, values)


def _numbered(kind: str, number: int, photos: Sequence[Photo]) -> Photo:
    if not 1 <= number <= len(photos):
        raise FaceSnapError(
            f"The plot uses {kind} {number}, but the number of {kind}s is {len(photos)}; use the number of an existing "
            f"{kind}, counted from 1."
        )
    return photos[number - 1]


def _axes(option: Any, names: Mapping[str, Choices]) -> list[Any]:
    fixed = {name: _always(choices) for name, choices in {**CHOICES, "template": tuple(TEMPLATES)}.items()}
    switches = {name: _always(SWITCHES) for name in SETTINGS if isinstance(DEFAULTS[name], bool)}
    # a plot shows one image per cell; the axis "reference" selects the photos one by one
    fixed["reference_mode"] = _always([mode for mode in CHOICES["reference_mode"] if mode != "batch"])
    choices = {**fixed, **switches, **names}
    axes = [option(PREFIX + name, int, _apply(name), confirm=_confirm(name)) for name in ("reference", "driving")]
    for name in SETTINGS:
        confirm = _confirm(name, choices.get(name))
        axes.append(
            option(
                PREFIX + name.replace("_", " "), _type(name), _apply(name), confirm=confirm, choices=choices.get(name)
            )
        )
    return axes


def _type(name: str) -> type:
    """The type to which the plot converts a value's text; `x`, `y` and `size` have the default None."""
    kind = type(DEFAULTS[name])
    return kind if kind is int else float if kind in (float, type(None)) else str


def _always(choices: Sequence[str]) -> Choices:
    return lambda: list(choices)


def _value(name: str, value: Any) -> Any:
    """The value of a setting for a value of an axis."""
    if name == "block_weights":
        return block_weights(value)
    return value == "True" if name in SETTINGS and isinstance(DEFAULTS[name], bool) else value


def _apply(name: str) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, value: Any, values: Any) -> None:
        # a new dictionary, because the plot's copies of a job share their attributes
        p.facesnap_axes = {**getattr(p, "facesnap_axes", {}), name: _value(name, value)}

    return apply


def _confirm(name: str, choices: Choices | None = None) -> Callable[[Any, Sequence[Any]], None]:
    """A check before the plot begins, because it swallows the errors of its cells and leaves them empty."""

    def confirm(p: Any, values: Sequence[Any]) -> None:
        units = list(_units(p).values())
        if not units:
            raise FaceSnapError(
                f"The plot has the axis [FaceSnap] {name}, but FaceSnap is off; turn it on, or choose another axis."
            )
        known = None if choices is None else choices()
        for value in values:
            if known is not None and value not in known:
                names = ", ".join(filter(None, known))
                advice = f"use {names}" if names else "none exists yet; save or install one first"
                raise FaceSnapError(f"FaceSnap's {name} is {short_repr(value)} in the plot; {advice}.")
            for unit in units:
                changed = _with_axis_values(unit, {name: _value(name, value)})
                if name == "region" and changed.region == "mask":
                    region_of(changed, None)  # raises an error if nothing is painted

    return confirm


def _units(p: Any) -> dict[int, Unit]:
    """The enabled units of the job from which the plot starts."""
    for script in p.scripts.alwayson_scripts:
        if script.title() == "FaceSnap":
            return from_script_args(p.script_args[script.args_from : script.args_to])
    return {}


def _plots() -> list[Any]:
    from modules import scripts

    modules = [data.module for data in scripts.scripts_data if data.script_class.__module__.endswith(PLOT)]
    return [module for module in modules if hasattr(module, "axis_options")]
