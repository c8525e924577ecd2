"""The contents of the accordion: the status of the model files and the controls of each person.

The events of the controls are answered by `ui.callbacks`. style.css hides controls that have no effect, and
javascript/facesnap_page.js connects the controls to the canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from facesnap_ext.engine import Engine
from facesnap_ext.identity.predictors import predictor_title
from facesnap_ext.landmarks.movements import EXPRESSIONS, MOVEMENTS, SLIDERS, TURNS
from facesnap_ext.landmarks.poses import TEMPLATES
from facesnap_ext.settings.infotext import from_infotext
from facesnap_ext.settings.script_args import UI_ORDER
from facesnap_ext.settings.unit import (
    EXPRESSION_SOURCES,
    PASSES,
    POSES,
    PRESETS,
    RANGES,
    REGIONS,
    defaults,
)
from facesnap_ext.ui import callbacks, people, reference_photos, starter
from facesnap_ext.ui.errors import problem
from facesnap_ext.ui.uploads import accept_only_uploads
from facesnap_ext.weights.model_files import ModelFiles

Controls = dict[str, Any]
"""The components of one person by name. The names are from `UI_ORDER`, or from the element ids for other components."""

Ident = Callable[[str], str]
"""Makes an element id from a name."""

PLACE = {name: getattr(TEMPLATES["front"], name) for name in ("x", "y", "size")}
"""Initial values of the sliders for position and size. They are used only if `placed` is checked."""

PART_LABELS = {
    "facesnap": "FaceSnap",
    "face_pack": "face model pack",
    "clip": "CLIP",
    "deca": "DECA",
    "flame": "FLAME",
}
POSE_LABELS = {
    "photo": "driving photo",
    "template": "template",
    "sliders": "sliders",
    "saved": "saved pose",
    "own": "reference photo",
}
EXPRESSION_SOURCE_LABELS = {
    "pose": "as in the pose",
    "reference": "reference photo",
    "driving": "driving photo",
    "custom": "chosen below",
}
REGION_LABELS = {"image": "whole image", "face": "face", "mask": "painted mask"}
SLIDER_LABELS = {
    **{name: slider.label for name, slider in SLIDERS.items()},
    "expression_strength": "Strength of the expression",
    "x": "Horizontal position (0 = left, 1 = right)",
    "y": "Vertical position (0 = top, 1 = bottom)",
    "size": "Face height (1 = image height)",
    "region_scale": "Region size (relative to the face)",
    "weight": "Weight",
    "start": "Start (fraction of the steps)",
    "end": "End (fraction of the steps)",
    "ffrnet_interval": "Run FFRNet every n steps (1 = every step; 2 to 4 are faster)",
    "adapter_weight": "InstantID adapter weight (other files have no adapter)",
    "uncond_noise": "InstantID noise on the negative side (0 = off; 0.35 reduces burnt images)",
    "redraw_strength": "Redraw small faces (denoising strength, 0 = off)",
}


def status(files: ModelFiles) -> str:
    """HTML that lists the model files that were found and those that are missing."""
    names = {"facesnap": ", ".join(sorted(files.facesnap))}
    names |= {part: path.name for part in PART_LABELS if part != "facesnap" and (path := getattr(files, part))}
    found = "; ".join(f"{PART_LABELS[part]}: {name}" for part, name in names.items() if name)
    lines = [f"Model files found: {escape(found or 'none')}"]
    if not starter.missing(files) and (missing := [PART_LABELS[part] for part in files.missing()]):
        lines.append(problem(f"Missing: {', '.join(missing)}. Open Model files below to see where to get them."))
    lines.append(f"Landmarks: {predictor_title(files)}")
    return "<br>".join(lines)


def model_choices(files: ModelFiles) -> list[str]:
    """The names of the FaceSnap files, preceded by an empty choice that selects the only file."""
    return ["", *sorted(files.facesnap)]


def person_controls(
    enabled: Any, files: ModelFiles, identities: Sequence[str], engine: Callable[[], Engine], ident: Ident
) -> list[Any]:
    """Create the controls of one person and connect their events.

    Args:
        enabled: the checkbox that enables the person.
        identities: names of the saved identities.

    Returns:
        The components in the order of `UI_ORDER`.
    """
    controls: Controls = {"enabled": enabled}
    with gr.Row():
        with gr.Column():
            reference_photos.add_controls(controls, ident)
            people.add_controls(controls, identities, ident)
        with gr.Column():
            _pose_controls(controls, callbacks.pose_choices(files.folder), ident)
            _region_controls(controls, ident)
            gr.HTML(f"<div class='facesnap-canvas' data-ids='{ident('{}')}'></div>", elem_id=ident("canvas"))
    _pose_sliders(controls, ident)
    _place_controls(controls, ident)
    _canvas_data(controls, ident)
    _strength_controls(controls, ident)
    _advanced_controls(controls, files, ident)
    _connect_canvas(controls, engine)
    _connect_driving(controls, engine)
    reference_photos.connect(controls, engine)
    people.connect(controls, engine)
    _connect_saved_poses(controls, engine)
    return [controls[name] for name in UI_ORDER]


def _slider(controls: Controls, ident: Ident, name: str, step: float, value: float | None = None) -> None:
    low, high = RANGES[name]
    initial = defaults()[name] if value is None else value
    controls[name] = gr.Slider(low, high, initial, step=step, label=SLIDER_LABELS[name], elem_id=ident(name))


def _radio(
    controls: Controls, ident: Ident, name: str, label: str, choices: Sequence[Any], value: str, **options: Any
) -> None:
    controls[name] = gr.Radio(choices, value=value, label=label, elem_id=ident(name), **options)


def _labelled(names: Sequence[str], labels: Mapping[str, str]) -> list[tuple[str, str]]:
    """Choices in gradio's format: pairs of label and value."""
    return [(labels[name], name) for name in names]


def _pose_controls(controls: Controls, poses: Sequence[str], ident: Ident) -> None:
    _radio(controls, ident, "pose", "Pose", _labelled(POSES, POSE_LABELS), "photo")
    with gr.Column(elem_classes="facesnap-when-photo"):
        controls["driving"] = gr.Image(
            label="Driving photo for pose and expression (optional)",
            type="pil",
            image_mode=None,
            height=240,
            elem_id=ident("driving"),
        )
        with gr.Accordion("More driving photos (one image per photo)", open=False, elem_id=ident("driving_part")):
            controls["driving_more"] = accept_only_uploads(
                gr.File(
                    label="More driving photos",
                    file_count="multiple",
                    file_types=["image"],
                    type="binary",
                    height=120,
                    elem_id=ident("driving_more"),
                )
            )
        controls["driving_faces"] = gr.HTML(elem_id=ident("driving_faces"))
        controls["driving_face_index"] = gr.Number(
            0, label="Face index in the driving photo (0 = largest)", precision=0, elem_id=ident("driving_face_index")
        )
    with gr.Column(elem_classes="facesnap-when-template"):
        names = list(TEMPLATES)
        _radio(controls, ident, "template", "Template", names, "front", elem_classes="facesnap-templates")
    with gr.Row(elem_classes="facesnap-when-saved"):
        controls["saved_pose"] = gr.Dropdown(poses, value="", label="Saved pose", elem_id=ident("saved_pose"))
        controls["delete_pose"] = gr.Button("Delete pose", elem_id=ident("delete_pose"))
    with gr.Accordion("Save this pose", open=False, elem_id=ident("save_pose_part")), gr.Row():
        controls["pose_name"] = gr.Textbox("", label="Name of the pose", elem_id=ident("pose_name"))
        controls["save_pose"] = gr.Button("Save pose and expression", elem_id=ident("save_pose"))
    controls["pose_report"] = gr.HTML(elem_id=ident("pose_report"))


def _region_controls(controls: Controls, ident: Ident) -> None:
    _radio(controls, ident, "region", "Region", _labelled(REGIONS, REGION_LABELS), "image")
    with gr.Column(elem_classes="facesnap-when-face"):
        _slider(controls, ident, "region_scale", 0.1)


def _pose_sliders(controls: Controls, ident: Ident) -> None:
    with gr.Column(elem_id=ident("sliders"), elem_classes="facesnap-when-sliders"), gr.Row():
        for name in TURNS:
            _slider(controls, ident, name, SLIDERS[name].step)
    sources = _labelled(EXPRESSION_SOURCES, EXPRESSION_SOURCE_LABELS)
    _radio(controls, ident, "expression_source", "Expression", sources, "pose")
    with gr.Column(elem_classes="facesnap-when-custom"):
        names = list(EXPRESSIONS)
        _radio(controls, ident, "expression", "Named expression", names, "neutral", elem_classes="facesnap-templates")
        _slider(controls, ident, "expression_strength", 0.05)
    moved = list(MOVEMENTS)
    with gr.Column(elem_id=ident("movements"), elem_classes="facesnap-when-moved"):
        for first in range(0, len(moved), 3):
            with gr.Row():
                for name in moved[first : first + 3]:
                    _slider(controls, ident, name, SLIDERS[name].step)


def _place_controls(controls: Controls, ident: Ident) -> None:
    with gr.Accordion("Face position and size", open=False, elem_id=ident("place")):
        controls["placed"] = gr.Checkbox(
            False, label="Set position and size (off = as given by the pose)", elem_id=ident("placed")
        )
        with gr.Row():
            for name in ("x", "y", "size"):
                _slider(controls, ident, name, 0.01, value=PLACE[name])


def _canvas_data(controls: Controls, ident: Ident) -> None:
    """Hidden text that the page's script and the server exchange.

    The script writes the output size together with a request number, the init image and the painted mask (images as
    data URLs). The server writes the rig and points of the person.
    """
    for name in ("canvas_size", "canvas_init", "canvas_rig", "mask"):
        controls[name] = gr.Textbox("", show_label=False, elem_id=ident(name), elem_classes="facesnap-hidden")


def _strength_controls(controls: Controls, ident: Ident) -> None:
    preset = gr.Radio(list(PRESETS), value="faithful", label="Preset", elem_id=ident("preset"))
    with gr.Row():
        _slider(controls, ident, "weight", 0.05)
        _slider(controls, ident, "start", 0.01)
        _slider(controls, ident, "end", 0.01)
    sliders = [controls[name] for name in ("weight", "start", "end")]
    preset.change(lambda name: PRESETS[name], [preset], sliders, show_progress=False)


def _advanced_controls(controls: Controls, files: ModelFiles, ident: Ident) -> None:
    with gr.Accordion("Advanced", open=False, elem_id=ident("advanced")):
        with gr.Row():
            controls["cond_only"] = gr.Checkbox(
                False, label="Apply to the positive prompt only (cond)", elem_id=ident("cond_only")
            )
            _radio(controls, ident, "hires", "Hires. fix passes", list(PASSES), "both")
        _slider(controls, ident, "ffrnet_interval", 1)
        _slider(controls, ident, "adapter_weight", 0.05)
        _slider(controls, ident, "uncond_noise", 0.05)
        controls["block_weights"] = gr.Textbox(
            "",
            label="Block weights: one per residual (10 for SDXL), shallow to deep, middle block last (empty = all 1)",
            elem_id=ident("block_weights"),
        )
        _slider(controls, ident, "redraw_strength", 0.05)
        controls["model"] = gr.Dropdown(
            model_choices(files), value="", label="FaceSnap file (empty = the only one)", elem_id=ident("model")
        )


def _connect_canvas(controls: Controls, engine: Callable[[], Engine]) -> None:
    names = ("references", "face_index", "driving", "driving_face_index", "pose", "canvas_size", "identity")
    others = ("canvas_init", "reference_mode", "expression_source", "saved_pose")
    inputs = [controls[name] for name in names]
    for component in [*inputs, controls["expression_source"], controls["saved_pose"]]:
        component.change(
            lambda *values: callbacks.canvas_data(engine(), *values),
            [*inputs, *(controls[name] for name in others)],
            [controls["canvas_rig"]],
            show_progress=False,
            queue=False,
        )


def _connect_driving(controls: Controls, engine: Callable[[], Engine]) -> None:
    driving = [controls["driving"], controls["driving_face_index"]]
    for component in driving:
        component.change(
            lambda *values: callbacks.driving_faces(engine(), *values),
            driving,
            [controls["driving_faces"]],
            show_progress=False,
        )


def _connect_saved_poses(controls: Controls, engine: Callable[[], Engine]) -> None:
    names = ("pose_name", "canvas_size", "canvas_init", *UI_ORDER)
    outputs = [controls["pose_report"], controls["saved_pose"]]
    controls["save_pose"].click(
        lambda *values: callbacks.save_pose(engine(), *values), [controls[name] for name in names], outputs
    )
    controls["delete_pose"].click(
        lambda name: callbacks.delete_pose(engine(), name or ""), [controls["saved_pose"]], outputs
    )


def paste_value(parameters: Mapping[str, Any], number: int, name: str) -> Any:
    """The value of one of a unit's components after the user pastes infotext; None leaves the component unchanged."""
    try:
        values = from_infotext(parameters, number)
    except ValueError:  # the infotext was edited by hand
        return None
    if name == "placed":
        return any(values[part] is not None for part in PLACE)
    if name in PLACE and values[name] is None:
        return PLACE[name]
    if name == "block_weights":
        return " ".join(map(str, values["block_weights"]))
    return values.get(name)
