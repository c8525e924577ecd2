"""What a person's forms do: saving, choosing, renaming and deleting saved people, and saving and deleting poses.

The forms are HTML. When a button in one of them is pressed, javascript/facesnap_tasks.js writes the form's values as
JSON into the hidden text box `task`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from facesnap_ext import photos
from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.photos import one_at_a_time
from facesnap_ext.settings import page_settings
from facesnap_ext.settings.saved_poses import delete_pose, find_poses, save_pose
from facesnap_ext.settings.script_args import UI_ORDER, unit_from_page
from facesnap_ext.settings.unit import defaults, from_values
from facesnap_ext.ui import people
from facesnap_ext.ui.markup import data, problem, wording
from facesnap_ext.weights.identity_folder import delete_identity, find_identities, rename_identity

INPUTS = ("task", "canvas_size", "canvas_init", *UI_ORDER)
OUTPUTS = ("task", "people_report", "pose_report", "chosen", "references", "settings")
TASKS = ("list", "choose", "save", "rename", "delete", "save_pose", "delete_pose")


def connect(controls: dict[str, Any], engine: Callable[[], Engine]) -> None:
    """Carry out a person's tasks."""
    controls["task"].input(  # unlike `change`, not when the task is emptied
        lambda *values: run_task(engine(), *values),
        [controls[name] for name in INPUTS],
        [controls[name] for name in OUTPUTS],
        show_progress=False,
    )


@one_at_a_time
def run_task(engine: Engine, task: str, size: str, init: str, *values: Any) -> tuple[Any, ...]:
    """Carry out a task, and draw the saved person and the lists of names again.

    Args:
        task: JSON with `do` (one of `TASKS`; "list" only draws again), `number` (of the request), `person` (the saved
            person's name), `name` (the new name) and `picture` (whether to save a small picture of the face).
        size: the output size, as for `answers.answer`.
        init: img2img's init image as a data URL; may be empty.
        values: of the person's components, in the order of `UI_ORDER`.

    Returns:
        Updates of `OUTPUTS`. The task is emptied, so that the page can send another one. A report repeats the number
        and names the person's old and new name, so that the page can update its other people. Once a person is saved,
        the photos are removed and the saved person is chosen instead.
    """
    updates: dict[str, Any] = dict.fromkeys(OUTPUTS, gr.update())
    if not task:
        return tuple(updates.values())
    updates["task"] = ""
    number, report, models = 0, "people_report", engine.encoders().files.folder
    try:
        request = _parse(task)
        number, do = request["number"], request["do"]
        report = "pose_report" if do.endswith("_pose") else "people_report"
        given = dict(zip(UI_ORDER, values))
        settings = defaults() | page_settings.parse(given["settings"])
        done = _run(engine, models, request, settings, given, size, init)
        if changed := done.pop("settings", None):
            settings |= changed
            updates["settings"] = page_settings.to_text(settings)
        updates |= done
        updates["chosen"] = people.describe(models, settings["identity"]) + lists(models)
    except FaceSnapError as error:
        updates[report] = f"<div data-facesnap-number='{number}'>{problem(str(error))}</div>"
    return tuple(updates.values())


def _run(
    engine: Engine,
    models: Path,
    request: dict[str, Any],
    settings: dict[str, Any],
    given: dict[str, Any],
    size: str,
    init: str,
) -> dict[str, Any]:
    """Carry out a task. Returns updates of `OUTPUTS`, with the changed settings by their API names."""
    do, old, name = request["do"], request["person"], request["name"]
    if do == "list":
        return {}
    if do == "choose":
        return {"settings": _front_view(settings, given, init)}
    if do == "save_pose":
        width, height = map(int, size.partition(" ")[0].split("x")) if size else (1024, 1024)
        init_image = photos.from_base64(init, "Init image") if init else None
        unit = unit_from_page(list(given.values()))
        if isinstance(unit.driving, tuple):  # the canvas shows the first one
            unit = replace(unit, driving=unit.driving[0])
        path = save_pose(models, name, engine.pose_as_sliders(unit, width, height, init_image))
        message = f"{wording('Saved as')} {data(path.name)}. {wording('The file contains only numbers and no pixels.')}"
        return {"pose_report": message, "settings": {"saved_pose": path.stem}}
    if do == "delete_pose":
        delete_pose(models, settings["saved_pose"])
        return {
            "pose_report": f"{wording('Deleted:')} {data(settings['saved_pose'])}",
            "settings": {"saved_pose": ""},
        }
    if do == "save":
        unit = from_values(page_settings.parse(given["settings"]))
        path = people.save(engine, given["references"], name, unit, request["picture"])
        message = (
            f"{wording('Saved as')} {data(path.name)}. {wording(people.CONTENTS[request['picture']])} "
            f"{wording('The saved person has replaced the photos.')}"
        )
        changed = {**_front_view(settings, {**given, "references": None}, init), "identity": path.stem, "face_index": 0}
        return {"people_report": _report(request, "", path.stem, message), "references": None, "settings": changed}
    if do == "rename":
        new = rename_identity(models, old, name).stem
        message = f"{wording('Renamed:')} {data(f'{old} → {new}')}"
    else:
        message, new = f"{wording('Deleted:')} {data(delete_identity(models, old).name)}", ""
    return {"people_report": _report(request, old, new, message), "settings": {"identity": new}}


def _report(request: dict[str, Any], old: str, new: str, message: str) -> str:
    return (
        f"<div data-facesnap-number='{request['number']}' data-facesnap-old='{escape(old, quote=True)}' "
        f"data-facesnap-new='{escape(new, quote=True)}'>{message}</div>"
    )


def _front_view(settings: dict[str, Any], given: dict[str, Any], init: str) -> dict[str, Any]:
    """The settings to change for a saved person, who has no pose: the front view if there is no photo to take the pose
    from."""
    if settings["pose"] != "photo" or given["references"] or given["driving"] is not None or init:
        return {}
    return {"pose": "template", "template": "front"}


def lists(models: Path) -> str:
    """HTML, not shown, with the names of the saved people and poses in the model folder."""
    names = {"identity": sorted(find_identities(models)), "saved_pose": sorted(find_poses(models))}
    return f"<span hidden data-facesnap-lists='{escape(json.dumps(names), quote=True)}'></span>"


def _parse(task: str) -> dict[str, Any]:
    try:
        values = json.loads(task)
        known = {"do": str(values["do"]), "picture": bool(values.get("picture")), "number": int(values["number"])}
        known |= {name: str(values.get(name) or "") for name in ("person", "name")}
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
        known = {"do": ""}
    if known["do"] not in TASKS:
        raise FaceSnapError("The page sent an unknown task; reload the page.")
    return known
