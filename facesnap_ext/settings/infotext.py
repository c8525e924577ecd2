"""Units as generation parameters of a picture, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any

from facesnap_ext import __version__
from facesnap_ext.photos import Photo
from facesnap_ext.settings.unit import Unit

MARK = "FaceSnap"  # the parameter that says that FaceSnap made the picture, and which version
DIGITS = 10  # of a photo's hash
PHOTOS = ("references", "driving", "mask")
FIELDS: dict[str, Field[Any]] = {field.name: field for field in fields(Unit) if field.name != "enabled"}


def to_infotext(units: Mapping[int, Unit]) -> dict[str, Any]:
    """The parameters of active units by their numbers: what is not as by default, photos by the first digits of their
    content's hash."""
    text: dict[str, Any] = {MARK: __version__} if units else {}
    for number, unit in units.items():
        for name, field in FIELDS.items():
            value = getattr(unit, name)
            if name == "weight" or value != field.default:  # the weight marks that the unit is there
                text[label(name, number)] = _to_text(value)
    return text


def from_infotext(parameters: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A unit's fields by name, photos left out; those that the text does not name by default.

    Args:
        parameters: as the host parses them, name and text. number: of the unit, from 1.

    Raises:
        ValueError: a value is no value of its field.
    """
    values: dict[str, Any] = {"enabled": MARK in parameters and label("weight", number) in parameters}
    for name, field in FIELDS.items():
        if name not in PHOTOS:
            text = parameters.get(label(name, number))
            values[name] = field.default if text is None else _from_text(text, field.default, name)
    return values


def label(name: str, number: int) -> str:
    """The parameter's name of a unit's field."""
    prefix = MARK if number == 1 else f"{MARK} {number}"
    return f"{prefix} {name.replace('_', ' ')}"


def _to_text(value: Any) -> Any:
    if isinstance(value, Photo):
        return value.digest[:DIGITS]
    if isinstance(value, tuple):
        return " ".join(str(_to_text(item)) for item in value)
    return value


def _from_text(text: Any, default: Any, name: str) -> Any:
    if isinstance(default, bool):
        return str(text) == "True"
    if isinstance(default, int):
        return int(text)
    if isinstance(default, float) or default is None:
        return float(text)
    if name == "blocks":
        return tuple(float(item) for item in str(text).split())
    return str(text)
