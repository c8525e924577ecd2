"""The API accepts exactly what its schema and docs/api.md describe."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.poses import TEMPLATES
from facesnap_ext.settings.schema import unit_schema
from facesnap_ext.settings.script_args import from_script_args
from facesnap_ext.settings.unit import CHOICES, RANGES, Unit, defaults, to_values

DOCS = Path(__file__).parents[3] / "docs" / "api.md"
SCHEMA = unit_schema()["properties"]


def parsed(values: dict) -> Unit:
    """The unit that results from a JSON request with these values for one person."""
    return from_script_args([json.loads(json.dumps(values))])[1]


@pytest.fixture(scope="module")
def image() -> str:
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_the_schema_lists_exactly_the_settings_of_a_unit():
    assert list(SCHEMA) == list(defaults())
    assert not unit_schema()["additionalProperties"]


def test_the_schemas_defaults_are_used_if_nothing_is_sent():
    assert parsed({name: schema["default"] for name, schema in SCHEMA.items()}) == parsed({}) == Unit(enabled=True)


def test_numbers_are_accepted_exactly_in_their_range():
    for name, (low, high) in RANGES.items():
        assert (SCHEMA[name]["minimum"], SCHEMA[name]["maximum"]) == (low, high), name
    for name, schema in SCHEMA.items():
        if schema["type"] == "integer":
            ends = [schema["minimum"], schema.get("maximum", 99)]
            assert [to_values(parsed({name: end}))[name] for end in ends] == ends
            for wrong in (ends[0] - 1, *([ends[1] + 1] if "maximum" in schema else [])):
                with pytest.raises(FaceSnapError, match=name):
                    parsed({name: wrong})


def test_every_choice_is_accepted():
    for name, choices in {**CHOICES, "template": TEMPLATES}.items():
        assert SCHEMA[name]["enum"] == list(choices), name
        assert [to_values(parsed({name: choice}))[name] for choice in SCHEMA[name]["enum"]] == list(choices)


@given(st.lists(st.floats(0, 2), max_size=20))
def test_block_weights_are_accepted_exactly_in_the_allowed_range(weights):
    """How many there must be depends on the FaceSnap file."""
    assert parsed({"block_weights": weights}).strength.block_weights == tuple(weights)
    low, high = SCHEMA["block_weights"]["items"]["minimum"], SCHEMA["block_weights"]["items"]["maximum"]
    for beyond in (low - 0.1, high + 0.1):
        with pytest.raises(FaceSnapError, match="block_weights"):
            parsed({"block_weights": [beyond] * 10})


def test_images_are_text_or_null(image):
    for name, schema in SCHEMA.items():
        if "image file" in str(schema):
            many = schema["type"] == "array"
            assert to_values(parsed({name: [image] if many else image}))[name], name
            if "array" in schema["type"]:
                assert len(to_values(parsed({name: [image, image]}))[name]) == 2, name
            assert not to_values(parsed({name: schema["default"]}))[name], name


def table() -> dict[str, list[str]]:
    """The rows of the table of settings in docs/api.md, by name."""
    rows = re.findall(r"^\| `(\w+)` \|(.+)\|$", DOCS.read_text("utf-8").partition("## Responses")[0], re.M)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def described(schema: dict) -> tuple[str, str, str]:
    """A setting's type, values and default, as written in the table."""
    kinds = [
        kind for kind in ([schema["type"]] if isinstance(schema["type"], str) else schema["type"]) if kind != "null"
    ]
    kind = "image" if "image file" in str(schema) else kinds[0]
    if schema["type"] == "array":
        kind = f"list of {'images' if kind == 'image' else 'numbers'}"
    values = ""
    if "enum" in schema:
        values = ", ".join(f"`{choice}`" for choice in schema["enum"])
    elif schema["type"] == "array" and "minimum" in schema["items"]:
        values = f"{schema['items']['minimum']} … {schema['items']['maximum']} each"
    elif "maximum" in schema:
        values = f"{schema['minimum']} … {schema['maximum']}"
    elif "minimum" in schema:
        values = f"from {schema['minimum']}"
    return kind, values, f"`{json.dumps(schema['default'])}`"


def test_the_table_in_the_docs_matches_the_schema():
    rows = table()
    assert list(rows) == list(SCHEMA)
    for name, schema in SCHEMA.items():
        *documented, meaning = rows[name]
        assert tuple(documented) == described(schema), f"docs/api.md describes {name} incorrectly"
        assert meaning, f"docs/api.md does not say what {name} means"


def test_examples_in_the_docs_use_existing_settings():
    text = DOCS.read_text("utf-8")
    bodies = [json.loads(body) for body in re.findall(r"```json\n(.+?)```", text, re.S)]
    people = [person for body in bodies for person in body["alwayson_scripts"]["FaceSnap"]["args"]]
    assert people
    for person in people:
        assert set(person) <= set(SCHEMA)
        assert parsed({name: value for name, value in person.items() if "image file" not in str(SCHEMA[name])})
