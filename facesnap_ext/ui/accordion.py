"""The contents of the accordion: the status of the model files and the controls of each person.

The events of the controls are answered by `ui.callbacks`. style.css hides controls that have no effect, and
javascript/facesnap_page.js connects the controls to the canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from facesnap_ext.engine import Engine
from facesnap_ext.hosts import fork
from facesnap_ext.identity.predictors import predictor_title
from facesnap_ext.settings import page_settings
from facesnap_ext.settings.infotext import from_infotext
from facesnap_ext.settings.script_args import UI_ORDER
from facesnap_ext.settings.unit import RANGES, defaults
from facesnap_ext.ui import callbacks, people, reference_photos, settings_html
from facesnap_ext.ui.markup import data, hidden_text, wording
from facesnap_ext.ui.settings_html import Ident
from facesnap_ext.ui.uploads import photo_files
from facesnap_ext.weights.catalogue import Part
from facesnap_ext.weights.face_pack import pack_files
from facesnap_ext.weights.model_files import ModelFiles

Controls = dict[str, Any]
"""The components of one person by name. The names are from `UI_ORDER`, or from the element ids for other components."""

PART_LABELS = {
    "facesnap": "FaceSnap",
    "face_pack": "face model pack",
    "clip": "CLIP",
    "deca": "DECA",
    "flame": "FLAME",
    "mediapipe": "MediaPipe's landmarks",
}
COLUMN_WIDTH = 220  # pixels; narrower columns are placed below each other


def status(files: ModelFiles, needed: Sequence[Part] = ()) -> str:
    """HTML that lists the model files that were found and those that are missing, and names the WebUI.

    Args:
        needed: the result of `starter.missing`. If anything is needed, the HTML is empty, because the top of the
            accordion says what to do.
    """
    if needed:
        return ""
    names = {"facesnap": ", ".join(sorted(files.facesnap))}
    names |= {part: path.name for part in PART_LABELS if part != "facesnap" and (path := getattr(files, part))}
    found = "; ".join(f"{wording(PART_LABELS[part])}: {data(name)}" for part, name in names.items() if name)
    lines = [f"{wording('Model files found:')} {found or wording('none')}"]
    if missing := [wording(PART_LABELS[part]) for part in files.missing()]:
        advice = wording("Open Model files below to see where to get them.")
        lines.append(f"<span class='facesnap-problem'>{wording('Missing:')} {', '.join(missing)}. {advice}</span>")
    lines.append(f"{wording('Landmarks:')} {wording(predictor_title(files))}{_detector(files)}")
    lines.append(f"{wording('WebUI:')} {data(fork.current().title)}")
    return "<br>".join(lines)


def _detector(files: ModelFiles) -> str:
    """HTML that names MediaPipe's landmark detector where the open face model is fitted to it."""
    if files.has_deca_and_flame or files.mediapipe is None or files.face_pack is None:
        return ""
    if pack_files(files.face_pack).landmarks68 is not None:
        return ""
    fitted = wording("fitted to MediaPipe's landmarks")
    return f", {fitted} ({data(files.mediapipe.name)})"


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
    with gr.Row(equal_height=False, elem_classes="facesnap-columns"):
        with gr.Column(min_width=COLUMN_WIDTH):
            reference_photos.add_controls(controls, ident)
            people.add_controls(controls, identities, ident)
        with gr.Column(min_width=COLUMN_WIDTH, elem_classes="facesnap-when-shown"):
            gr.HTML(settings_html.canvas(ident), elem_id=ident("canvas"))
    _pose_controls(controls, callbacks.pose_choices(files.folder), ident)
    weight, (low, high) = defaults()["weight"], RANGES["weight"]
    controls["weight"] = gr.Slider(low, high, weight, step=0.05, label="Weight", elem_id=ident("weight"))
    gr.HTML(settings_html.preset(ident), elem_id=ident("preset_part"))
    _advanced_controls(controls, files, ident)
    _page_data(controls, ident)
    _connect_canvas(controls, engine)
    _connect_driving(controls, engine)
    reference_photos.connect(controls, engine)
    people.connect(controls, engine)
    _connect_saved_poses(controls, engine)
    return [controls[name] for name in UI_ORDER]


def _pose_controls(controls: Controls, poses: Sequence[str], ident: Ident) -> None:
    gr.HTML(settings_html.pose(ident), elem_id=ident("pose_part"))
    with gr.Accordion(
        "Driving photo (optional)",
        open=False,
        elem_id=ident("driving_part"),
        elem_classes="facesnap-when-photo",
    ):
        controls["driving"] = gr.Image(
            label="Photo to copy the pose and expression from",
            type="pil",
            image_mode=None,
            height=240,
            elem_id=ident("driving"),
        )
        controls["driving_faces"] = gr.HTML(elem_id=ident("driving_faces"), elem_classes="facesnap-report")
        controls["driving_face_index"] = gr.Number(
            0, label="Face index in the driving photo (0 = largest)", precision=0, elem_id=ident("driving_face_index")
        )
        controls["driving_more"] = photo_files("More driving photos (one image per photo)", ident("driving_more"))
    with gr.Row(equal_height=False, elem_classes="facesnap-when-saved"):
        controls["saved_pose"] = gr.Dropdown(poses, value="", label="Saved pose", elem_id=ident("saved_pose"))
        controls["delete_pose"] = gr.Button("Delete pose", size="sm", elem_id=ident("delete_pose"))
    controls["pose_report"] = gr.HTML(elem_id=ident("pose_report"), elem_classes="facesnap-report")


def _advanced_controls(controls: Controls, files: ModelFiles, ident: Ident) -> None:
    with gr.Accordion("Advanced", open=False, elem_id=ident("advanced")):
        gr.HTML(settings_html.advanced(ident), elem_id=ident("advanced_settings"))
        with gr.Row(equal_height=False, elem_classes="facesnap-bottom"):
            controls["pose_name"] = gr.Textbox("", label="Name for saving this pose", elem_id=ident("pose_name"))
            controls["save_pose"] = gr.Button("Save pose and expression", size="sm", elem_id=ident("save_pose"))
        controls["model"] = gr.Dropdown(
            model_choices(files), value="", label="FaceSnap file (empty = the only file found)", elem_id=ident("model")
        )


def _page_data(controls: Controls, ident: Ident) -> None:
    """Hidden text that the page's script and the server exchange.

    The script writes the settings of the HTML inputs, the output size together with a request number, the init image
    and the painted mask (images as data URLs). The server writes the rig and points of the person, and pasted settings.
    """
    for name in ("settings", "canvas_size", "canvas_init", "canvas_rig", "mask"):
        controls[name] = hidden_text(ident(name))


def _connect_canvas(controls: Controls, engine: Callable[[], Engine]) -> None:
    names = ("references", "face_index", "driving", "driving_face_index", "canvas_size", "identity", "canvas_init")
    inputs = [controls[name] for name in (*names, "reference_mode", "saved_pose", "settings")]
    for name in ("references", "face_index", "driving", "driving_face_index", "canvas_size", "identity", "saved_pose"):
        controls[name].change(
            lambda *values: callbacks.answer_canvas(engine(), *values),
            inputs,
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
    return page_settings.to_text(values) if name == "settings" else values.get(name)
