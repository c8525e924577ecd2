"""`Unit` as the API's clients see it, in JSON Schema, made from the dataclass."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

from facesnap_ext.landmarks.poses import TEMPLATES
from facesnap_ext.photos import Photo
from facesnap_ext.settings.unit import BLOCKS, CHOICES, RANGES, Unit

PICTURE = {"type": "string", "description": "a picture file in base64, plain or as a data URL"}
_TYPES: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": 0},
    float: {"type": "number"},
    str: {"type": "string"},
    Photo: PICTURE,
    float | None: {"type": ["number", "null"]},
    Photo | None: {**PICTURE, "type": ["string", "null"]},
    tuple[Photo, ...]: {"type": "array", "items": PICTURE},
    tuple[float, ...]: {"type": "array", "items": {"type": "number"}},
}


def unit_schema() -> dict[str, Any]:
    """What one dictionary in the script's `args` may hold (JSON Schema, draft 2020-12)."""
    types = get_type_hints(Unit)
    properties = {field.name: {**_TYPES[types[field.name]], "default": field.default} for field in fields(Unit)}
    for name, (low, high) in RANGES.items():
        properties[name] |= {"minimum": low, "maximum": high}
    for name, choices in {**CHOICES, "template": TEMPLATES}.items():
        properties[name]["enum"] = list(choices)
    for name in ("references", "blocks"):
        properties[name]["default"] = []
    blocks = {"type": "number", "minimum": 0, "maximum": 2}
    properties["blocks"] |= {"items": blocks, "anyOf": [{"maxItems": 0}, {"minItems": BLOCKS, "maxItems": BLOCKS}]}
    properties["enabled"]["default"] = True  # to send a person is to want one
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "FaceSnap: one person in the picture",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
