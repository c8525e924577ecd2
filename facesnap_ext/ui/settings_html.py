"""The inputs of the settings in `page_settings`, as HTML. javascript/facesnap_settings.js connects them.

Every setting has an element with its id, as a component of gradio would. It contains the inputs, which have the
attribute `data-facesnap-setting`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from facesnap_ext.landmarks.movements import EXPRESSIONS, MOVEMENTS, SLIDERS, TURNS
from facesnap_ext.landmarks.poses import TEMPLATES
from facesnap_ext.settings.page_settings import PLACE, initial
from facesnap_ext.settings.unit import EXPRESSION_SOURCES, PASSES, PRESETS, RANGES, REFERENCE_MODES, REGIONS
from facesnap_ext.ui.markup import task_button

Ident = Callable[[str], str]
"""Makes an element id from a name."""

MODE_LABELS = {
    "fused": "same person, combined (fused)",
    "averaged": "same person, averaged",
    "batch": "different people: one image per photo (batch)",
}
POSE_LABELS = {
    "photo": "automatic",
    "saved": "saved pose",
    "sliders": "sliders",
    "own": "reference photo",
}
EXPRESSION_SOURCE_LABELS = {
    "pose": "same as the pose",
    "reference": "reference photo",
    "driving": "driving photo",
    "custom": "chosen below",
}
REGION_LABELS = {"image": "whole image", "face": "face", "mask": "painted mask"}
SLIDER_LABELS = {
    "weight": "Weight",
    **{name: slider.label for name, slider in SLIDERS.items()},
    "expression_strength": "Expression strength",
    "x": "Horizontal position (0 = left, 1 = right)",
    "y": "Vertical position (0 = top, 1 = bottom)",
    "size": "Face height (1 = image height)",
    "region_scale": "Region size (relative to the face)",
    "start": "Start (fraction of the steps)",
    "end": "End (fraction of the steps)",
    "ffrnet_interval": "Run FFRNet every n steps (1 = every step; 2 to 4 are faster)",
    "adapter_weight": "InstantID adapter weight (other files have no adapter)",
    "uncond_noise": "InstantID noise for the negative prompt (0 = off; 0.35 makes images look less burnt)",
    "redraw_strength": "Redraw small faces (denoising strength, 0 = off)",
}
STEPS = {
    **{name: slider.step for name, slider in SLIDERS.items()},
    **dict.fromkeys(("x", "y", "size", "start", "end"), 0.01),
    "region_scale": 0.1,
    "ffrnet_interval": 1,
}
STEP = 0.05
BLOCK_WEIGHTS_LABEL = (
    "Block weights: one per residual (10 for SDXL), shallow to deep, middle block last (empty = all 1)"
)
AUTOMATIC = (
    "<div class='facesnap-note facesnap-when-automatic'>The pose is taken from the driving photo if there is one; "
    "otherwise from the init image (in img2img) or, failing that, from the reference photo.</div>"
)
MIXED = (
    "<div class='facesnap-tools facesnap-when-mixed'><span class='facesnap-note'>The regions of several people "
    "each cover the whole image, so their faces are blended.</span>"
    "<button type='button' data-facesnap-side-by-side>Place them side by side</button></div>"
)
CARRY_OVER = (
    "<div class='facesnap-tools facesnap-carry-over' hidden><span class='facesnap-note'>FaceSnap is enabled "
    "in txt2img, but not here.</span><button type='button'>Copy photos and settings from txt2img</button></div>"
)
ICONS = {  # drawn in a square of 24 x 24
    "photo": "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15.5 9.5h.01",
    "saved": "M7 4h10v16l-5-4-5 4z",
    "sliders": "M4 7h16M4 12h16M4 17h16M9 5v4M15 10v4M8 15v4",
    "own": "M12 4a4 4 0 1 1 0 8a4 4 0 1 1 0-8M4 20c1-5 4-6 8-6s7 1 8 6",
}


def reference_mode(ident: Ident) -> str:
    """What several photos are used for."""
    choices = _choices(ident, "reference_mode", "Several photos", REFERENCE_MODES, MODE_LABELS)
    return f"<div class='facesnap-when-several'>{choices}</div>"


def identity(ident: Ident) -> str:
    """The list of saved people, once there is one."""
    people = _select(ident, "identity", "Saved person (instead of photos, or in addition to them)")
    return f"<div class='facesnap-when-saved-people'>{people}</div>"


def pose(ident: Ident) -> str:
    """The poses as a row of pictures, the sliders that turn the head, and the saved poses. With several people, a
    button above them."""
    first = _tile(ident, "pose", "photo", POSE_LABELS["photo"], ICONS["photo"], checked=True)
    templates = "".join(_tile(ident, "template", name, name, group="pose") for name in TEMPLATES)
    others = "".join(_tile(ident, "pose", name, POSE_LABELS[name], ICONS[name]) for name in ("saved", "sliders", "own"))
    tiles = f"{first}<div class='facesnap-contents' id='{ident('template')}'>{templates}</div>{others}"
    turns = "".join(_slider(ident, name) for name in TURNS)
    return (
        f"{MIXED}{_group(ident, 'pose', 'Pose', tiles, 'facesnap-tiles')}{AUTOMATIC}"
        f"<div id='{ident('sliders')}' class='facesnap-sliders facesnap-when-sliders'>{turns}</div>"
        f"<div class='facesnap-form facesnap-when-saved'>{_select(ident, 'saved_pose', 'Saved pose')}"
        f"{task_button('delete_pose', 'Delete pose', ident=ident('delete_pose'))}</div>"
    )


def strength(ident: Ident) -> str:
    """The weight, and the presets of weight, start and end."""
    return f"{_slider(ident, 'weight')}{_presets(ident)}"


def _presets(ident: Ident) -> str:
    """The presets of weight, start and end, and "custom", which the page chooses if they differ from all presets."""
    choices = [*PRESETS, "custom"]
    radios = "".join(
        f"<label{' hidden' if name == 'custom' else ''}><input type='radio' name='{ident('preset')}' value='{name}'"
        f"{' checked' if name == 'faithful' else ''}><span>{name}</span></label>"
        for name in choices
    )
    values = escape(json.dumps(PRESETS), quote=True)
    return _group(ident, "preset", "Preset", radios, "facesnap-choices", f" data-facesnap-presets='{values}'")


def canvas(ident: Ident) -> str:
    """The canvas, which the page adds to the first element, with its caption and the buttons that undo what it sets."""
    return (
        f"<div class='facesnap-canvas' data-ids='{ident('{}')}'></div>"
        "<div class='facesnap-note facesnap-hint'>Pose preview. Drag the face to move it, a corner to resize it, and a "
        "circle to turn or tilt it.</div>"
        "<div class='facesnap-tools'>"
        "<span class='facesnap-note facesnap-when-placed'>Position and size are not taken from the pose.</span>"
        "<button type='button' class='facesnap-when-placed' data-facesnap-reset='place'>Reset position</button>"
        "<button type='button' class='facesnap-when-posed' data-facesnap-reset='pose'>Reset pose</button></div>"
    )


def advanced(ident: Ident) -> str:
    """Everything that a first image does not need, in groups that open and close, and all of it closed at first."""
    sources = _choices(ident, "expression_source", "Expression from", EXPRESSION_SOURCES, EXPRESSION_SOURCE_LABELS)
    named = "".join(_tile(ident, "expression", name, name) for name in EXPRESSIONS)
    expression = (
        f"{sources}<div class='facesnap-when-custom'>"
        f"{_group(ident, 'expression', 'Named expression', named, 'facesnap-tiles')}"
        f"{_slider(ident, 'expression_strength')}</div>"
        f"<div id='{ident('movements')}' class='facesnap-sliders facesnap-when-moved'>"
        f"{''.join(_slider(ident, name) for name in MOVEMENTS)}</div>"
    )
    place = (
        f"{_checkbox(ident, 'placed', 'Set position and size (off = taken from the pose)')}"
        f"<div class='facesnap-sliders'>{''.join(_slider(ident, name) for name in PLACE)}</div>"
    )
    region = (
        f"{_choices(ident, 'region', 'Apply to', REGIONS, REGION_LABELS)}"
        f"<div class='facesnap-when-face'>{_slider(ident, 'region_scale')}</div>"
    )
    names = ("start", "end", "adapter_weight", "uncond_noise", "redraw_strength", "ffrnet_interval")
    sampling = (
        f"<div class='facesnap-sliders'>{''.join(_slider(ident, name) for name in names)}</div>"
        f"{_checkbox(ident, 'cond_only', 'Apply to the positive prompt only (cond)')}"
        f"{_choices(ident, 'hires', 'Hires. fix passes', PASSES, {})}"
        f"{_text(ident, 'block_weights', BLOCK_WEIGHTS_LABEL)}"
    )
    saving = (
        f"<div class='facesnap-form'><label id='{ident('pose_name')}'><span>Name for saving this pose</span>"
        " <input type='text' data-facesnap-field='name' autocomplete='off'></label>"
        f"{task_button('save_pose', 'Save pose and expression', ident=ident('save_pose'))}</div>"
    )
    groups = (
        _details(ident, "expression_part", "Expression", expression)
        + _details(ident, "place", "Face position and size", place)
        + _details(ident, "region_part", "Region", region)
        + _details(ident, "sampling", "Sampling", sampling)
    )
    model = _select(ident, "model", "FaceSnap file (empty = the only file found)")
    return _details(ident, "advanced", "Advanced", groups + saving + model)


def _details(ident: Ident, name: str, title: str, content: str) -> str:
    return f"<details id='{ident(name)}' class='facesnap-part'><summary>{title}</summary>{content}</details>"


def _group(ident: Ident, name: str, title: str, content: str, kind: str, attributes: str = "") -> str:
    """A group of radio buttons."""
    return (
        f"<fieldset id='{ident(name)}' class='facesnap-group' role='radiogroup'{attributes}>"
        f"<legend>{title}</legend><div class='{kind}'>{content}</div></fieldset>"
    )


def _choices(ident: Ident, name: str, title: str, values: Sequence[str], labels: Mapping[str, str]) -> str:
    radios = "".join(
        f"<label>{_radio(ident(name), name, value, value == initial()[name])}<span>{labels.get(value, value)}</span>"
        "</label>"
        for value in values
    )
    return _group(ident, name, title, radios, "facesnap-choices")


def _radio(group: str, setting: str, value: str, checked: bool) -> str:
    state = " checked" if checked else ""
    return f"<input type='radio' name='{group}' value='{value}' data-facesnap-setting='{setting}'{state}>"


def _tile(
    ident: Ident, setting: str, value: str, label: str, icon: str = "", group: str = "", checked: bool | None = None
) -> str:
    """A radio button with a picture: an icon, or a drawing that the page adds. `group` is the setting that it shares
    its group with."""
    if checked is None:
        checked = not group and value == initial()[setting]
    picture = f"<svg viewBox='0 0 24 24' aria-hidden='true'><path d='{icon}'></path></svg>" if icon else ""
    radio = _radio(ident(group or setting), setting, value, checked)
    return f"<label class='facesnap-tile' data-value='{value}'>{picture}{radio}<span>{label}</span></label>"


def _slider(ident: Ident, name: str) -> str:
    low, high = RANGES[name]
    attributes = (
        f"min='{low}' max='{high}' step='{STEPS.get(name, STEP)}' value='{_number(initial()[name])}' "
        f"aria-labelledby='{ident(name)}_label' data-facesnap-setting='{name}'"
    )
    return (
        f"<div id='{ident(name)}' class='facesnap-slider'><span id='{ident(name)}_label'>{SLIDER_LABELS[name]}</span>"
        f"<input type='number' {attributes}><input type='range' {attributes}></div>"
    )


def _checkbox(ident: Ident, name: str, label: str) -> str:
    box = f"<input type='checkbox' data-facesnap-setting='{name}'>"
    return f"<div id='{ident(name)}' class='facesnap-check'><label>{box}<span>{label}</span></label></div>"


def _text(ident: Ident, name: str, label: str) -> str:
    entry = f"<input type='text' data-facesnap-setting='{name}'>"
    return f"<div id='{ident(name)}' class='facesnap-text'><label><span>{label}</span>{entry}</label></div>"


def _select(ident: Ident, name: str, label: str) -> str:
    """A list whose choices the page adds, because they change; see `ui.tasks.lists`."""
    choices = f"<select data-facesnap-setting='{name}'><option value=''></option></select>"
    return f"<div id='{ident(name)}' class='facesnap-text'><label><span>{label}</span>{choices}</label></div>"


def _number(value: Any) -> str:
    return f"{value:g}"
