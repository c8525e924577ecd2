"""The settings that the page keeps as JSON in one hidden text box per person.

Their controls are plain HTML inputs, which `ui.settings_html` draws and javascript/facesnap_settings.js keeps in step
with the text box: dozens of gradio's components would delay the page noticeably.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.movements import SLIDERS
from facesnap_ext.landmarks.poses import TEMPLATES
from facesnap_ext.settings.unit import BLOCK_WEIGHTS_RULE, defaults, short_repr

PLACE = {name: getattr(TEMPLATES["front"], name) for name in ("x", "y", "size")}
"""Initial values of position and size. They are used only if `placed` is true."""
NAMES = (
    *("face_index", "reference_mode", "identity", "weight", "model"),
    *("pose", "template", "saved_pose", "driving_face_index"),
    *(*SLIDERS, "expression_source", "expression", "expression_strength"),
    *("placed", *PLACE, "start", "end", "cond_only", "hires", "block_weights", "region", "region_scale"),
    *("redraw_strength", "adapter_weight", "ffrnet_interval", "uncond_noise"),
)
"""The names of the API, and `placed`, which says whether position and size are set."""


def on_page(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings by their API names to the values of the page's inputs. Settings of other controls are left
    out."""
    values = {**values, "placed": any(values[name] is not None for name in PLACE)}
    values |= {name: initial for name, initial in PLACE.items() if values[name] is None}
    values["block_weights"] = " ".join(map(str, values["block_weights"]))
    return {name: values[name] for name in NAMES}


def initial() -> dict[str, Any]:
    """Return the values of the inputs on a new page."""
    return on_page(defaults())


def to_text(values: Mapping[str, Any]) -> str:
    """Return what the hidden text box contains for settings by their API names, with numbers as JavaScript writes
    them: 20 and not 20.0."""
    shown = on_page(values)
    whole = {name: int(value) for name, value in shown.items() if isinstance(value, float) and value.is_integer()}
    return json.dumps(shown | whole)


def parse(text: str | None) -> dict[str, Any]:
    """Return the settings in the hidden text box by their API names. An empty text means the defaults.

    The text is untrusted, because any client can send it. Ranges and choices are checked by `Unit`.

    Raises:
        FaceSnapError: the text is not an object in JSON, or contains other names.
    """
    try:
        values = json.loads(text) if text else {}
    except (TypeError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise FaceSnapError(
            f"FaceSnap's settings on the page are {short_repr(text)}, which is not an object in JSON; reload the page."
        )
    if unknown := sorted(set(values) - set(NAMES)):
        raise FaceSnapError(f"FaceSnap's page has no setting named {short_repr(unknown[0])}; reload the page.")
    values = {name: value for name, value in values.items() if value is not None}  # an emptied input
    placed = values.pop("placed", False)
    if not isinstance(placed, bool):
        raise FaceSnapError(f"FaceSnap's placed is {short_repr(placed)}; it must be true or false.")
    if not placed:
        values |= dict.fromkeys(PLACE)
    if isinstance(weights := values.get("block_weights"), str):
        values["block_weights"] = block_weights(weights)
    return values


def block_weights(text: str) -> tuple[float, ...]:
    """The block weights in a text, separated by spaces or commas.

    Raises:
        FaceSnapError: the text contains anything other than numbers.
    """
    try:
        return tuple([float(number) for number in text.replace(",", " ").split()])
    except ValueError:
        raise FaceSnapError(f"FaceSnap's block_weights are {short_repr(text)}; use {BLOCK_WEIGHTS_RULE}.") from None
