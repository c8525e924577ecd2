"""Units as generation parameters of an image ("infotext"), and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from facesnap_ext import __version__
from facesnap_ext.landmarks.movements import EXPRESSIONS, MOVEMENTS, TURNS
from facesnap_ext.photos import Photo
from facesnap_ext.settings.unit import Unit, defaults, to_values, with_values

MARK = "FaceSnap"  # this parameter records that FaceSnap was used, and its version
STOPPED = f"{MARK} stopped"  # this parameter records where FaceSnap was not active
DIGITS = 10  # number of digits of a photo's hash in infotext
PHOTOS = ("references", "driving", "mask")
DEFAULTS = {name: default for name, default in defaults().items() if name != "enabled"}
OLD_NAMES = {  # names in the infotext of development versions
    "face_index": "face",
    "driving_face_index": "driving_face",
    "reference_mode": "several",
    "adapter_weight": "adapter",
    "ffrnet_interval": "every",
    "block_weights": "blocks",
    "region_scale": "grow",
    "redraw_strength": "redraw",
}
OLD_SLIDERS = {  # development versions had one slider for each of these groups, with the same meaning
    "brows": ("brow_inner", "brow_outer_left", "brow_outer_right"),
    "eyes": ("lid_left", "lid_right"),
}
_FORMER = OLD_NAMES | {name: old for old, names in OLD_SLIDERS.items() for name in names}
OLD_VALUES = {
    "reference_mode": {"mixed": "fused", "apart": "batch"},
    "region": {"everywhere": "image", "drawn": "mask"},
}


def to_infotext(units: Mapping[int, Unit], with_names: bool = True) -> dict[str, Any]:
    """The infotext parameters of active units, by unit number: settings in use that differ from their defaults.

    Photos are written as the first digits of their content hash.

    Args:
        with_names: whether to write the names of saved identities.
    """
    text: dict[str, Any] = {MARK: __version__} if units else {}
    for number, unit in units.items():
        values = to_values(in_use(unit))
        for name, default in DEFAULTS.items():
            if name == "identity" and not with_names:
                continue
            if name == "weight" or values[name] != default:  # the weight also marks the unit as present
                text[label(name, number)] = _to_text(values[name])
    return text


def in_use(unit: Unit) -> Unit:
    """Return a unit that makes the same image, with settings that have no effect at their defaults.

    Examples are the template of a pose that comes from a photo, and a mask for a region around the face.
    """
    custom = unit.expression_source == "custom"
    unused = {
        "template": unit.pose != "template",
        "saved_pose": unit.pose != "saved",
        **dict.fromkeys(TURNS, unit.pose != "sliders"),
        **dict.fromkeys(MOVEMENTS, not custom and (unit.pose, unit.expression_source) != ("sliders", "pose")),
        "expression": not custom,
        "expression_strength": not custom or not EXPRESSIONS[unit.expression],
        **dict.fromkeys(("driving", "driving_face_index"), not unit.uses_driving),
        "mask": unit.region != "mask",
        "region_scale": unit.region != "face",
    }
    return with_values(unit, {name: DEFAULTS[name] for name in unused if unused[name]})


def from_infotext(parameters: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A unit's settings by name, without photos; settings that are not in the infotext keep their defaults.

    Args:
        parameters: text by name, as parsed by the host. Names and values of earlier versions are understood.
        number: the unit's number, from 1.

    Raises:
        ValueError: a value does not fit its setting.
    """
    values: dict[str, Any] = {"enabled": MARK in parameters and label("weight", number) in parameters}
    for name, default in DEFAULTS.items():
        if name not in PHOTOS:
            text = parameters.get(label(name, number))
            if text is None and name in _FORMER:
                text = parameters.get(label(_FORMER[name], number))
            values[name] = default if text is None else _from_text(text, default, name)
    return values


def label(name: str, number: int) -> str:
    """The parameter name of a unit's setting."""
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
    if name == "block_weights":
        return tuple([float(item) for item in str(text).split()])
    return OLD_VALUES.get(name, {}).get(str(text), str(text))
