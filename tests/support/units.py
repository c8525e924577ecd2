"""Create and change units and conditionings by the API's flat names, whichever dataclass holds a setting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from facesnap_ext.conditioning import Conditioning
from facesnap_ext.settings.unit import PART_NAMES, Unit, from_values, with_values


def make_unit(enabled: bool = True, references: tuple[Any, ...] = (), **values: Any) -> Unit:
    """Return a unit with these settings, enabled by default."""
    return from_values({"enabled": enabled, "references": references, **values})


def changed(one: Any, **values: Any) -> Any:
    """Return a copy of a unit or a conditioning with some settings changed."""
    if isinstance(one, Unit):
        return with_values(one, values)
    assert isinstance(one, Conditioning)
    strength = {name: values.pop(name) for name in PART_NAMES["strength"] if name in values}
    return replace(one, strength=replace(one.strength, **strength), **values)
