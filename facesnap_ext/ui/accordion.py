"""The accordion's contents: what it says of the model files, and each person's controls in the order of
`settings.UI_ORDER`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from facesnap_ext import photos
from facesnap_ext.engine import UNPREDICTED, Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.faces import Face
from facesnap_ext.identity.framing import face_thumbnail
from facesnap_ext.identity.saved import save_identity
from facesnap_ext.landmarks.poses import TEMPLATES, for_browser
from facesnap_ext.settings.infotext import from_infotext
from facesnap_ext.settings.script_args import UI_ORDER, reference_photos
from facesnap_ext.settings.unit import PASSES, POSES, PRESETS, RANGES, REFERENCE_MODES, REGIONS, defaults
from facesnap_ext.weights.identity_folder import find_identities
from facesnap_ext.weights.model_files import ModelFiles

CLOSE_UP = 96  # pixels of a face that can be chosen
PLACE = {name: getattr(TEMPLATES["front"], name) for name in ("x", "y", "size")}  # of sliders that nobody has moved
POSE_WORDS = {
    "photo": "driving photo",
    "template": "template",
    "sliders": "sliders",
    "own": "the reference's own",
}
REFERENCE_MODE_WORDS = {"fused": "fused", "averaged": "averaged", "batch": "one image per photo (batch)"}
REGION_WORDS = {"image": "whole image", "face": "face", "mask": "painted mask"}
PART_WORDS = {"face_pack": "face pack", "clip": "CLIP", "deca": "DECA", "flame": "FLAME"}
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


def status(files: ModelFiles) -> str:
    """HTML: which model files are there, and which are missing; the panel of model files says where they go."""
    found = {"FaceSnap": ", ".join(sorted(files.facesnap))}
    found |= {PART_WORDS[part]: path.name for part in PART_WORDS if (path := getattr(files, part))}
    there = "; ".join(f"{part}: {name}" for part, name in found.items() if name)
    lines = [f"Model files: {escape(there or 'none')}"]
    if missing := [{"facesnap": "FaceSnap", **PART_WORDS}[part] for part in files.missing()]:
        lines.append(problem(f"Missing: {', '.join(missing)}. The panel Model files below says where to get what."))
    if not files.can_predict_landmarks:
        lines.append(problem(f"{UNPREDICTED.format('the driving photo')} Templates and sliders need both."))
    return "<br>".join(lines)


def model_choices(files: ModelFiles) -> list[str]:
    """The FaceSnap files, after the empty choice that leaves it to the job."""
    return ["", *sorted(files.facesnap)]


def problem(sentence: str) -> str:
    """HTML of a sentence that asks for something to be done."""
    return f"<span class='facesnap-problem'>{escape(sentence)}</span>"


def person_controls(
    enabled: Any,
    files: ModelFiles,
    identities: Sequence[str],
    engine: Callable[[], Engine],
    ident: Callable[[str], str],
) -> list[Any]:
    """Draw a person's controls and make them answer.

    Args:
        enabled: the component that switches the person on. identities: names of saved people.
        ident: makes an element's id of a name.

    Returns:
        The components in the order of `UI_ORDER`.
    """
    made: dict[str, Any] = {"enabled": enabled}

    def slider(name: str, step: float, label: str | None = None, value: float | None = None) -> None:
        low, high = RANGES[name]
        start = defaults()[name] if value is None else value
        made[name] = gr.Slider(
            low, high, start, step=step, label=label or LABELS.get(name, name.capitalize()), elem_id=ident(name)
        )

    with gr.Row():
        with gr.Column():
            made["references"] = gr.File(
                label="Reference photos",
                file_count="multiple",
                file_types=["image"],
                type="binary",
                height=120,
                elem_id=ident("references"),
                elem_classes="facesnap-photos",
            )
            seen = gr.Gallery(
                label="Faces found",
                show_label=False,
                columns=4,
                height=180,
                object_fit="contain",
                visible=False,
                elem_id=ident("seen"),
            )
            report = gr.HTML(elem_id=ident("report"), elem_classes="facesnap-report")
            with gr.Row():
                made["face_index"] = gr.Number(
                    0, label="Face index (0 = largest)", precision=0, elem_id=ident("face_index")
                )
                made["reference_mode"] = gr.Radio(
                    [(REFERENCE_MODE_WORDS[mode], mode) for mode in REFERENCE_MODES],
                    value="fused",
                    label="Several photos",
                    elem_id=ident("reference_mode"),
                )
            made["identity"] = gr.Dropdown(
                ["", *identities],
                value="",
                label="Saved person, instead of the photos or together with them",
                elem_id=ident("identity"),
            )
            with gr.Row():
                title = gr.Textbox("", label="Name to save these photos' person under", elem_id=ident("name"))
                save = gr.Button("Save person", elem_id=ident("save"))
        with gr.Column():
            made["pose"] = gr.Radio(
                [(POSE_WORDS[pose], pose) for pose in POSES], value="photo", label="Pose", elem_id=ident("pose")
            )
            # what does not matter for the chosen pose is hidden by style.css
            with gr.Column(elem_classes="facesnap-when-photo"):
                made["driving"] = gr.Image(
                    label="Driving photo: its pose and expression (optional)",
                    type="pil",
                    image_mode=None,
                    height=240,
                    elem_id=ident("driving"),
                )
                driving_faces = gr.HTML(elem_id=ident("driving_faces"))
                made["driving_face_index"] = gr.Number(
                    0, label="Face index in it (0 = largest)", precision=0, elem_id=ident("driving_face_index")
                )
            with gr.Column(elem_classes="facesnap-when-template"):
                made["template"] = gr.Radio(
                    list(TEMPLATES),
                    value="front",
                    label="Template",
                    elem_id=ident("template"),
                    elem_classes="facesnap-templates",
                )
            made["region"] = gr.Radio(
                [(REGION_WORDS[region], region) for region in REGIONS],
                value="image",
                label="Region",
                elem_id=ident("region"),
            )
            with gr.Column(elem_classes="facesnap-when-face"):
                slider("region_scale", 0.1, "Size of the region around the face")
            gr.HTML(f"<div class='facesnap-canvas' data-ids='{ident('{}')}'></div>", elem_id=ident("canvas"))
    with gr.Column(elem_id=ident("sliders"), elem_classes="facesnap-when-sliders"):
        with gr.Row():
            for name in ("yaw", "pitch", "roll"):
                slider(name, 1)
        with gr.Row():
            for name in ("mouth", "brows", "eyes"):
                slider(name, 0.05)
    with gr.Accordion("Place of the face", open=False, elem_id=ident("place")):
        made["placed"] = gr.Checkbox(
            False, label="Place the face (else it stays where the pose comes from)", elem_id=ident("placed")
        )
        with gr.Row():
            for name in ("x", "y", "size"):
                slider(name, 0.01, value=PLACE[name])

    def hidden(name: str, value: str = "") -> Any:
        return gr.Textbox(value, show_label=False, elem_id=ident(name), elem_classes="facesnap-hidden")

    # between browser and server: the output's size, img2img's init picture and the painted region one way (pictures as
    # data URLs), the person's rig and points the other
    size, init, rig = hidden("canvas_size"), hidden("canvas_init"), hidden("canvas_rig")
    made["mask"] = hidden("mask")
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
        slider("ffrnet_interval", 1, "Run FFRNet every n-th step (1 = every step; 2 to 4 are faster)")
        slider("adapter_weight", 0.05, "InstantID adapter weight (other files have no adapter)")
        made["block_weights"] = gr.Textbox(
            "",
            label="Block weights: 10 numbers, shallow to deep, middle block last (empty = all 1)",
            elem_id=ident("block_weights"),
        )
        slider("redraw_strength", 0.05, "Redraw small faces (denoising strength, 0 = off)")
        made["model"] = gr.Dropdown(
            model_choices(files),
            value="",
            label="FaceSnap file (empty = the only one)",
            elem_id=ident("model"),
        )
    posed = [made[name] for name in ("references", "face_index", "driving", "driving_face_index", "pose")]
    asked = [*posed, size, made["identity"]]
    for changed in asked:
        changed.change(
            lambda *values: preview(engine(), *values), [*asked, init], [rig], show_progress=False, queue=False
        )
    looked_at = [made[name] for name in ("references", "face_index", "reference_mode")]
    for changed in looked_at:
        changed.change(
            lambda *values: look(engine(), *values),
            looked_at,
            [seen, report],
            show_progress=False,
        )
    drives = [made["driving"], made["driving_face_index"]]
    for changed in drives:
        changed.change(lambda *values: look_at_driving(engine(), *values), drives, [driving_faces], show_progress=False)
    save.click(
        lambda *values: save_person(engine(), *values),
        [*looked_at, title],
        [report, made["identity"]],
    )
    return [made[name] for name in UI_ORDER]


def look(engine: Engine, files: list[Any] | None, face: float | None, reference_mode: str = "fused") -> tuple[Any, str]:
    """What the page shows of reference photos: a gallery with the faces framed, and HTML with the warnings."""
    try:
        found = engine.examine(reference_photos(files), int(face or 0), reference_mode == "batch") if files else None
    except FaceSnapError as error:
        return gr.update(visible=False), problem(str(error))
    if found is None:
        return gr.update(value=[], visible=False), ""
    choices = (face_choice("face_index", reference.faces, reference.face_index) for reference in found.references)
    return (
        gr.update(value=[reference.preview() for reference in found.references], visible=True),
        "<br>".join(map(escape, found.lines())) + "".join(choices),
    )


def look_at_driving(engine: Engine, driving: Any, driving_face: float | None) -> str:
    """HTML to choose among the faces of a driving photo."""
    if driving is None:
        return ""
    try:
        faces = engine.encoders().faces(photos.from_pil(driving, "Driving photo"))
    except FaceSnapError as error:
        return problem(str(error))
    return face_choice("driving_face_index", faces, int(driving_face or 0))


def face_choice(control: str, faces: Sequence[Face], chosen: int | None) -> str:
    """HTML of a photo's faces as buttons, which write their number into the control of this name; nothing where there
    is no choice."""
    if len(faces) < 2:
        return ""
    buttons = []
    for i, face in enumerate(faces):
        buffer = io.BytesIO()
        face_thumbnail(face, CLOSE_UP).save(buffer, "JPEG", quality=85)
        picture = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        pressed = str(i == chosen).lower()
        buttons.append(
            f"<button type='button' class='facesnap-face' data-facesnap-of='{control}' data-facesnap-face='{i}' "
            f"aria-pressed='{pressed}'><img src='{picture}' alt='Face'> <span>{i}</span></button>"
        )
    title = escape(faces[0].photo.name, quote=True)
    return f"<div class='facesnap-faces' role='group' aria-label='{title}'>{''.join(buttons)}</div>"


def preview(
    engine: Engine,
    files: list[Any] | None,
    face: Any,
    driving: Any,
    driving_face: Any,
    pose: str,
    size: str,
    identity: str | None = None,
    init: str = "",
) -> str:
    """JSON for the page's canvas: `rig`, and `points` as parts of the output's width and height; or `error`.

    Args:
        size: of the output and the question's number, which the answer repeats, as "1024x768 3"; empty until the
            canvas is seen, and so is the answer.
        init: img2img's init picture as a data URL. Where it drives, the points are parts of its width and height, and
            `in_init` says so.
    """
    if not size:
        return ""
    size, _, question = size.partition(" ")
    try:
        if not engine.files().can_predict_landmarks:
            raise FaceSnapError("The pose cannot be shown here without DECA and FLAME.")
        reference = next(iter(reference_photos(files)), None)
        other = photos.from_pil(driving, "Driving photo") if driving is not None and pose == "photo" else None
        drives = photos.from_base64(init, "Init image") if init and pose == "photo" and other is None else None
        in_init = drives is not None and bool(engine.encoders().faces(drives))
        width, height = map(int, size.split("x"))
        frame, driver = (None, drives) if in_init else ((width, height), other)
        which, driving_which = int(face or 0), int(driving_face or 0)
        rig, points = engine.preview(reference, driver, frame, which, driving_which, identity or "")
    except FaceSnapError as error:
        return json.dumps({"question": question, "error": str(error)})
    parts = None if points is None else (points.points / (points.width, points.height)).tolist()
    return json.dumps({"question": question, "rig": for_browser(rig), "points": parts, "in_init": in_init})


def save_person(
    engine: Engine, files: list[Any] | None, face: float | None, reference_mode: str, name: str
) -> tuple[str, Any]:
    """Save the photos' person under a name; HTML that says so, and the choice of saved people with it chosen."""
    try:
        references = reference_photos(files)
        if reference_mode == "batch" and len(references) > 1:
            raise FaceSnapError(
                "In batch mode the photos show different people; keep the photos of one person to save that person."
            )
        models = engine.files()
        path = save_identity(engine.encoders(models), references, name, face_index=int(face or 0))
    except FaceSnapError as error:
        return problem(str(error)), gr.update()
    choices = ["", *sorted(find_identities(models.folder))]
    return f"Saved as {escape(path.name)}: features, no pixels.", gr.update(choices=choices, value=path.stem)


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
