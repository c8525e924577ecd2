"""The server's answers to a person's question: what was found in the photos, and what the canvas shows.

javascript/facesnap_page.js asks whenever anything changes that the answers depend on, by writing the output size and
a number into the hidden text box `canvas_size`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import gradio as gr

from facesnap_ext import photos
from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.job_landmarks import photo_points
from facesnap_ext.identity.references import turn_note
from facesnap_ext.landmarks.poses import for_browser
from facesnap_ext.photos import one_at_a_time
from facesnap_ext.settings import page_settings
from facesnap_ext.settings.saved_poses import load_pose
from facesnap_ext.settings.script_args import reference_photos
from facesnap_ext.settings.unit import Unit, from_values
from facesnap_ext.ui.markup import english, problem
from facesnap_ext.ui.photo_cards import face_buttons
from facesnap_ext.ui.reference_photos import check_references

INPUTS = ("references", "driving", "canvas_size", "canvas_init", "settings")
OUTPUTS = ("canvas_rig", "seen", "driving_faces")


def connect(controls: dict[str, Any], engine: Callable[[], Engine]) -> None:
    """Answer a person's questions."""
    controls["canvas_size"].change(
        lambda *values: answer(engine(), *values),
        [controls[name] for name in INPUTS],
        [controls[name] for name in OUTPUTS],
        show_progress=False,
        queue=False,
    )


@one_at_a_time
def answer(
    engine: Engine, files: list[Any] | None, driving: Any, size: str, init: str, settings: str | None
) -> tuple[Any, ...]:
    """Values of `OUTPUTS`.

    Args:
        files: the image files with the reference photos, or their contents.
        driving: the driving photo, if any.
        size: output size and request number, such as "1024x768 3"; empty if the page has not asked yet.
        init: img2img's init image as a data URL; may be empty.
        settings: what `page_settings.parse` reads.
    """
    if not size:
        return "", "", ""
    try:
        unit = from_values(page_settings.parse(settings))
    except FaceSnapError as error:
        text = json.dumps({"question": size.partition(" ")[2], "error": str(error)})
        return text, gr.update(), gr.update()
    return (
        canvas_data(engine, files, driving, size, init, unit),
        check_references(engine, files, unit.face_index, unit.reference_mode),
        driving_faces(engine, driving, unit.driving_face_index),
    )


def driving_faces(engine: Engine, driving: Any, driving_face_index: int) -> str:
    """HTML for choosing one of the faces in the driving photo."""
    if driving is None:
        return ""
    try:
        faces = engine.encoders(engine.files()).faces(photos.from_pil(driving, "Driving photo"))
    except FaceSnapError as error:
        return problem(str(error))
    note = turn_note(faces[driving_face_index]) if driving_face_index < len(faces) else None
    buttons = face_buttons("driving_face_index", faces, driving_face_index)
    return (f"<div>{english(note)}</div>" if note else "") + buttons


def canvas_data(engine: Engine, files: list[Any] | None, driving: Any, size: str, init: str, unit: Unit) -> str:
    """JSON for the canvas: `rig`, `points` (fractions of the output's width and height) and `note`, or `error` instead.

    `neutral` and `camera` are a `NeutralFace` in the same unit, and `expression` is the displacement by the expression
    of another photo; see `facesnapPreviewOf`.

    Args:
        files: the image files with the reference photos, or their contents. In batch mode the first one is previewed.
        size: output size and request number, such as "1024x768 3"; the response repeats the number.
        init: img2img's init image as a data URL. If the pose comes from it, the response contains `in_init`, and the
            points are fractions of the init image's width and height. `init_faces` is the number of its faces.
    """
    size, _, question = size.partition(" ")
    try:
        models = engine.files()
        shown = list(filter(None, files or ()))[: 1 if unit.reference_mode == "batch" else None]
        references = reference_photos(shown)
        driver = init_image = None
        if unit.pose == "photo" or unit.expression_source == "driving":
            driver = photos.from_pil(driving, "Driving photo") if driving is not None else None
            init_image = photos.from_base64(init, "Init image") if init and driver is None else None
        init_faces = 0 if init_image is None else len(engine.encoders(models).faces(init_image))
        if not init_faces:
            init_image = None
        in_init = init_image is not None and unit.pose == "photo"
        expression = {
            "reference": (references[0], unit.face_index) if references else None,
            "driving": (photo, unit.driving_face_index) if (photo := driver or init_image) else None,
        }.get(unit.expression_source)
        width, height = map(int, size.split("x"))
        saved = unit.pose == "saved" and unit.saved_pose
        rig = {"saved": asdict(load_pose(models.folder, unit.saved_pose))} if saved else {}
        preview = engine.preview(
            references,
            (driver or init_image) if unit.pose == "photo" else None,
            None if in_init else (width, height),
            unit.face_index,
            unit.driving_face_index,
            unit.identity,
            expression,
        )
    except FaceSnapError as error:
        return json.dumps({"question": question, "error": str(error)})
    found = {
        "rig": for_browser(preview.rig) | rig,
        **photo_points(preview),
        "in_init": in_init,
        "init_faces": init_faces,
    }
    return json.dumps({"question": question, **found, "note": " ".join(preview.notes)})
