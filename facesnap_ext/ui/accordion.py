"""The contents of the accordion: the status of the model files and the controls of each person.

Most controls are HTML inputs of `ui.settings_html`, because the page loads faster with few components. `ui.answers` and
`ui.tasks` answer their events. style.css hides controls that have no effect.
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
from facesnap_ext.ui import answers, people, settings_html, tasks
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
HIDDEN = ("settings", "canvas_size", "canvas_init", "canvas_rig", "mask", "task")
"""Text that the page's script and the server exchange.

The script writes the settings of the HTML inputs, the output size together with a request number, the init image and
the painted mask (images as data URLs), and what a form is to do. The server writes the rig and points of the person,
and pasted settings.
"""


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


def person_controls(enabled: Any, engine: Callable[[], Engine], ident: Ident) -> list[Any]:
    """Create the controls of one person and connect their events.

    Args:
        enabled: the checkbox that enables the person.

    Returns:
        The components in the order of `UI_ORDER`.
    """
    controls: Controls = {"enabled": enabled}
    with gr.Row(equal_height=False, elem_classes="facesnap-columns"):
        with gr.Column(min_width=COLUMN_WIDTH):
            controls["references"] = photo_files(
                "Reference photos", ident("references"), elem_classes="facesnap-photos"
            )
            controls["seen"] = gr.HTML(elem_id=ident("seen"), elem_classes=["facesnap-seen", "facesnap-report"])
            forms = settings_html.reference_mode(ident) + people.form(ident) + settings_html.identity(ident)
            gr.HTML(forms, elem_id=ident("person_part"))
            controls["chosen"] = gr.HTML(elem_id=ident("chosen"), elem_classes="facesnap-chosen")
            controls["people_report"] = gr.HTML(elem_id=ident("people_report"), elem_classes="facesnap-report")
        with gr.Column(min_width=COLUMN_WIDTH, elem_classes="facesnap-when-shown"):
            gr.HTML(settings_html.canvas(ident), elem_id=ident("canvas"))
    gr.HTML(settings_html.pose(ident), elem_id=ident("pose_part"))
    with gr.Accordion(
        "Driving photo (optional)", open=False, elem_id=ident("driving_part"), elem_classes="facesnap-when-photo"
    ):
        controls["driving"] = gr.Image(
            label="Photo to copy the pose and expression from",
            type="pil",
            image_mode=None,
            height=240,
            elem_id=ident("driving"),
        )
        controls["driving_faces"] = gr.HTML(elem_id=ident("driving_faces"), elem_classes="facesnap-report")
        controls["driving_more"] = photo_files("More driving photos (one image per photo)", ident("driving_more"))
    controls["pose_report"] = gr.HTML(elem_id=ident("pose_report"), elem_classes="facesnap-report")
    gr.HTML(settings_html.strength(ident) + settings_html.advanced(ident), elem_id=ident("settings_part"))
    for name in HIDDEN:
        controls[name] = hidden_text(ident(name))
    answers.connect(controls, engine)
    tasks.connect(controls, engine)
    return [controls[name] for name in UI_ORDER]


def paste_value(parameters: Mapping[str, Any], number: int, name: str) -> Any:
    """The value of one of a unit's components after the user pastes infotext; None leaves the component unchanged."""
    try:
        values = from_infotext(parameters, number)
    except ValueError:  # the infotext was edited by hand
        return None
    return page_settings.to_text(values) if name == "settings" else values.get(name)
