"""Units and conditionings by the flat names of the API, whichever dataclass holds the setting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from facesnap_ext.conditioning import Conditioning
from facesnap_ext.settings.unit import STRENGTH_NAMES, Unit, from_values, with_values


def make_unit(enabled: bool = True, references: tuple[Any, ...] = (), **values: Any) -> Unit:
    """An enabled unit with these settings."""
    return from_values({"enabled": enabled, "references": references, **values})


def changed(one: Any, **values: Any) -> Any:
    """A unit or a conditioning with some settings changed."""
    if isinstance(one, Unit):
        return with_values(one, values)
    assert isinstance(one, Conditioning)
    strength = {name: values.pop(name) for name in STRENGTH_NAMES if name in values}
    return replace(one, strength=replace(one.strength, **strength), **values)
