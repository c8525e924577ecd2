"""`Unit` as JSON Schema for the API's clients, generated from the dataclasses."""

from __future__ import annotations

from typing import Any, get_type_hints

from facesnap_ext.landmarks.poses import TEMPLATES
from facesnap_ext.photos import Photo
from facesnap_ext.settings.unit import CHOICES, PARTS, RANGES, Unit, defaults

IMAGE = {"type": "string", "description": "an image file in base64, plain or as a data URL"}
_TYPES: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": 0},
    float: {"type": "number"},
    str: {"type": "string"},
    Photo: IMAGE,
    float | None: {"type": ["number", "null"]},
    Photo | tuple[Photo, ...] | None: {**IMAGE, "type": ["string", "array", "null"], "items": IMAGE},
    Photo | None: {**IMAGE, "type": ["string", "null"]},
    tuple[Photo, ...]: {"type": "array", "items": IMAGE},
    tuple[float, ...]: {"type": "array", "items": {"type": "number"}},
}


def unit_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of one dictionary in the script's `args`."""
    types = get_type_hints(Unit)
    for part in PARTS.values():
        types |= get_type_hints(part)
    properties = {name: {**_TYPES[types[name]], "default": default} for name, default in defaults().items()}
    for name, (low, high) in RANGES.items():
        properties[name] |= {"minimum": low, "maximum": high}
    for name, choices in {**CHOICES, "template": TEMPLATES}.items():
        properties[name]["enum"] = list(choices)
    for name in ("references", "block_weights"):
        properties[name]["default"] = []
    weight = {"type": "number", "minimum": 0, "maximum": 2}
    properties["block_weights"]["items"] = weight  # one weight per residual of the FaceSnap file
    properties["enabled"]["default"] = True  # a person in the request is enabled unless the client says otherwise
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "FaceSnap: one person in the image",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
