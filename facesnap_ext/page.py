"""The accordion's contents: a unit's components, in the order of `settings.UI_ORDER`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from facesnap_ext.infotext import from_infotext
from facesnap_ext.landmarks.poses import TEMPLATES
from facesnap_ext.settings import PASSES, POSES, RANGES, REGIONS, UI_ORDER, Unit
from facesnap_ext.weights.places import ModelFiles

PRESETS = {  # weight, start, end
    "faithful": (1.0, 0.0, 1.0),
    "balanced": (0.8, 0.0, 0.8),
    "stylised": (0.6, 0.1, 0.6),
}
PLACE = {"x": 0.5, "y": 0.45, "size": 0.45}  # where sliders begin that nobody has moved
POSE_WORDS = {
    "photo": "driving photo",
    "template": "template",
    "sliders": "sliders",
    "own": "the reference's own",
}
LABELS = {
    "yaw": "Turn (degrees, right is positive)",
    "pitch": "Nod (degrees, down is positive)",
    "roll": "Tilt (degrees, right is positive)",
    "mouth": "Mouth (closed to open)",
    "brows": "Brows (down to up)",
    "eyes": "Eyes (closed to wide)",
    "x": "Across the picture",
    "y": "Down the picture",
    "size": "Size of the face, of the picture's height",
}


def unit_components(
    number: int, enabled: Any, files: ModelFiles, identities: list[str], elem_id: Callable[[str], str]
) -> dict[str, Any]:
    """Draw a unit's controls.

    Args:
        number: from 1. enabled: the component that switches it on. elem_id: makes an id of a name.

    Returns:
        The components by name, in the order of `UI_ORDER`.
    """
    made: dict[str, Any] = {"enabled": enabled}

    def ident(name: str) -> str:
        return elem_id(name if number == 1 else f"{name}_{number}")

    def slider(name: str, step: float, label: str | None = None, value: float | None = None) -> None:
        low, high = RANGES[name]
        start = getattr(Unit, name) if value is None else value
        made[name] = gr.Slider(
            low, high, start, step=step, label=label or LABELS.get(name, name.capitalize()), elem_id=ident(name)
        )

    with gr.Row():
        with gr.Column():
            made["references"] = gr.File(
                label="Reference photos of one person",
                file_count="multiple",
                file_types=["image"],
                type="binary",
                height=120,
                elem_id=ident("references"),
                elem_classes="facesnap-photos",
            )
            gr.HTML(elem_id=ident("report"), elem_classes="facesnap-report")
            with gr.Row():
                made["face"] = gr.Number(0, label="Which face (0: the largest)", precision=0, elem_id=ident("face"))
                made["average"] = gr.Checkbox(False, label="Average the photos", elem_id=ident("average"))
            made["identity"] = gr.Dropdown(
                ["", *identities], value="", label="Saved person, in place of photos", elem_id=ident("identity")
            )
        with gr.Column():
            made["pose"] = gr.Radio(
                [(POSE_WORDS[pose], pose) for pose in POSES], value="photo", label="Pose", elem_id=ident("pose")
            )
            made["driving"] = gr.Image(
                label="Driving photo: its pose and expression (optional)",
                type="pil",
                image_mode=None,
                height=240,
                elem_id=ident("driving"),
            )
            made["driving_face"] = gr.Number(
                0, label="Which face of it (0: the largest)", precision=0, elem_id=ident("driving_face")
            )
            made["template"] = gr.Dropdown(list(TEMPLATES), value="front", label="Template", elem_id=ident("template"))
    with gr.Accordion("Pose sliders and place", open=False, elem_id=ident("sliders")):
        with gr.Row():
            for name in ("yaw", "pitch", "roll"):
                slider(name, 1)
        with gr.Row():
            for name in ("mouth", "brows", "eyes"):
                slider(name, 0.05)
        made["placed"] = gr.Checkbox(
            False, label="Place the face (else it stays where the pose comes from)", elem_id=ident("placed")
        )
        with gr.Row():
            for name in ("x", "y", "size"):
                slider(name, 0.01, value=PLACE[name])
    preset = gr.Radio(list(PRESETS), value="faithful", label="Preset", elem_id=ident("preset"))
    with gr.Row():
        slider("weight", 0.05)
        slider("start", 0.01)
        slider("end", 0.01)
    preset.change(
        lambda name: PRESETS[name], [preset], [made["weight"], made["start"], made["end"]], show_progress=False
    )
    with gr.Accordion("Advanced", open=False, elem_id=ident("advanced")):
        with gr.Row():
            made["cond_only"] = gr.Checkbox(False, label="Conditional side only", elem_id=ident("cond_only"))
            made["hires"] = gr.Radio(list(PASSES), value="both", label="Hires fix: passes", elem_id=ident("hires"))
        made["blocks"] = gr.Textbox(
            "",
            label="Weights of the 10 residuals, shallow to deep, middle last (empty: all 1)",
            elem_id=ident("blocks"),
        )
        with gr.Row():
            made["region"] = gr.Radio(list(REGIONS), value="everywhere", label="Where it acts", elem_id=ident("region"))
            slider("grow", 0.1, "Size of the region around the face")
        made["mask"] = gr.Image(
            label="Region: white where this person is", type="pil", image_mode=None, height=240, elem_id=ident("mask")
        )
        made["model"] = gr.Dropdown(
            ["", *sorted(files.facesnap)],
            value="",
            label="FaceSnap file (empty: the only one)",
            elem_id=ident("model"),
        )
    return {name: made[name] for name in UI_ORDER}


def paste_value(parameters: Mapping[str, Any], number: int, name: str) -> Any:
    """What a unit's component of this name shows after a picture's infotext was pasted; None leaves it as it is."""
    try:
        values = from_infotext(parameters, number)
    except ValueError:  # an infotext that somebody has edited
        return None
    if name == "placed":
        return any(values[part] is not None for part in PLACE)
    if name in PLACE and values[name] is None:
        return PLACE[name]
    if name == "blocks":
        return " ".join(map(str, values["blocks"]))
    return values.get(name)
