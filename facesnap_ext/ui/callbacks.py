"""The server's responses to changes of a person's controls."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
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
from facesnap_ext.settings import saved_poses as poses
from facesnap_ext.settings.script_args import reference_photos, unit_from_page
from facesnap_ext.settings.unit import from_values
from facesnap_ext.ui.markup import data, english, problem, wording
from facesnap_ext.ui.photo_cards import face_buttons


@one_at_a_time
def driving_faces(engine: Engine, driving: Any, driving_face_index: float | None) -> str:
    """HTML for choosing one of the faces in the driving photo."""
    if driving is None:
        return ""
    try:
        faces = engine.encoders(engine.files()).faces(photos.from_pil(driving, "Driving photo"))
    except FaceSnapError as error:
        return problem(str(error))
    chosen = int(driving_face_index or 0)
    note = turn_note(faces[chosen]) if 0 <= chosen < len(faces) else None
    return (f"<div>{english(note)}</div>" if note else "") + face_buttons("driving_face_index", faces, chosen)


def answer_canvas(
    engine: Engine,
    files: list[Any] | None,
    face_index: float | None,
    driving: Any,
    driving_face_index: float | None,
    size: str,
    identity: str | None,
    init: str,
    reference_mode: str,
    saved_pose: str | None,
    settings: str | None,
) -> str:
    """Return `canvas_data` for the page's controls.

    Args:
        settings: what `page_settings.parse` reads.
    """
    try:
        unit = from_values(page_settings.parse(settings))
    except FaceSnapError as error:
        return json.dumps({"question": (size or "").partition(" ")[2], "error": str(error)})
    return canvas_data(
        engine,
        files,
        face_index,
        driving,
        driving_face_index,
        unit.pose,
        size,
        identity,
        init,
        reference_mode,
        unit.expression_source,
        saved_pose,
    )


@one_at_a_time
def canvas_data(
    engine: Engine,
    files: list[Any] | None,
    face_index: float | None,
    driving: Any,
    driving_face_index: float | None,
    pose: str,
    size: str,
    identity: str | None = None,
    init: str = "",
    reference_mode: str = "fused",
    expression_source: str = "pose",
    saved_pose: str | None = None,
) -> str:
    """JSON for the canvas: `rig`, `points` (fractions of the output's width and height) and `note`, or `error` instead.

    `neutral` and `camera` are a `NeutralFace` in the same unit, and `expression` is the displacement by the expression
    of another photo; see `facesnapPreviewOf`.

    Args:
        files: the image files with the reference photos, or their contents. In batch mode the first one is previewed.
        size: output size and request number, such as "1024x768 3"; the response repeats the number. If the canvas is
            not visible, both `size` and the response are empty.
        init: img2img's init image as a data URL. If the pose comes from it, the response contains `in_init`, and the
            points are fractions of the init image's width and height.
    """
    if not size:
        return ""
    size, _, question = size.partition(" ")
    try:
        models = engine.files()
        shown = list(filter(None, files or ()))[: 1 if reference_mode == "batch" else None]
        references = reference_photos(shown)
        driver = init_image = None
        if pose == "photo" or expression_source == "driving":
            driver = photos.from_pil(driving, "Driving photo") if driving is not None else None
            init_image = photos.from_base64(init, "Init image") if init and driver is None else None
        if init_image is not None and not engine.encoders(models).faces(init_image):
            init_image = None
        in_init = init_image is not None and pose == "photo"
        expression = {
            "reference": (references[0], int(face_index or 0)) if references else None,
            "driving": (photo, int(driving_face_index or 0)) if (photo := driver or init_image) else None,
        }.get(expression_source)
        width, height = map(int, size.split("x"))
        rig = {"saved": asdict(poses.load_pose(models.folder, saved_pose))} if pose == "saved" and saved_pose else {}
        preview = engine.preview(
            references,
            (driver or init_image) if pose == "photo" else None,
            None if in_init else (width, height),
            int(face_index or 0),
            int(driving_face_index or 0),
            identity or "",
            expression,
        )
    except FaceSnapError as error:
        return json.dumps({"question": question, "error": str(error)})
    answer = {"rig": for_browser(preview.rig) | rig, **photo_points(preview), "in_init": in_init}
    return json.dumps({"question": question, **answer, "note": " ".join(preview.notes)})


@one_at_a_time
def save_pose(engine: Engine, name: str, size: str, init: str, *values: Any) -> tuple[str, Any]:
    """Save a person's pose and expression.

    Args:
        size: as for `canvas_data`.
        init: img2img's init image as a data URL; may be empty.
        values: of the person's components, in the order of `UI_ORDER`.

    Returns:
        HTML of the outcome, and the updated list of saved poses with the new one chosen.
    """
    try:
        width, height = map(int, size.partition(" ")[0].split("x")) if size else (1024, 1024)
        init_image = photos.from_base64(init, "Init image") if init else None
        models = engine.files().folder
        path = poses.save_pose(models, name, engine.pose_as_sliders(unit_from_page(values), width, height, init_image))
    except FaceSnapError as error:
        return problem(str(error)), gr.update()
    report = f"{wording('Saved as')} {data(path.name)}. {wording('The file contains only numbers and no pixels.')}"
    return report, gr.update(choices=pose_choices(models), value=path.stem)


@one_at_a_time
def delete_pose(engine: Engine, name: str) -> tuple[str, Any]:
    """Delete a saved pose. Returns like `save_pose`."""
    models = engine.files().folder
    try:
        poses.delete_pose(models, name)
    except FaceSnapError as error:
        return problem(str(error)), gr.update()
    return f"{wording('Deleted:')} {data(name)}", gr.update(choices=pose_choices(models), value="")


def pose_choices(models: Path) -> list[str]:
    """The names of the saved poses, after an empty choice."""
    return ["", *poses.find_poses(models)]
