"""Saved people on the page: saving the person in the photos, choosing, renaming and deleting saved ones.

The forms are HTML. When a button in one of them is pressed, javascript/facesnap_people.js writes the form's values as
JSON into the hidden text box `people_task`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.saved import save_identity
from facesnap_ext.photos import one_at_a_time
from facesnap_ext.settings import page_settings
from facesnap_ext.settings.script_args import reference_photos
from facesnap_ext.settings.unit import defaults
from facesnap_ext.ui.markup import data, hidden_text, problem, wording
from facesnap_ext.ui.photo_cards import data_url
from facesnap_ext.weights import identity_file
from facesnap_ext.weights.identity_folder import choose_identity, delete_identity, find_identities, rename_identity

OUTPUTS = ("people_report", "identity", "references", "face_index", "settings")
"""The components that a task changes."""
CONTENTS = {
    False: "The file contains features of the face, but no pixels.",
    True: "The file contains features of the face and a small picture of it.",
}
"""What is stored about a person, by whether a picture is."""


def add_controls(controls: dict[str, Any], identities: Sequence[str], ident: Callable[[str], str]) -> None:
    """Create the controls of one person's saved identity.

    Args:
        controls: the person's components by name, to which these are added.
        identities: names of the saved identities.
        ident: makes an element id from a name.
    """
    gr.HTML(_save_form(ident), elem_classes="facesnap-when-photos")
    controls["identity"] = gr.Dropdown(
        ["", *identities],
        value="",
        label="Saved person (instead of photos, or in addition to them)",
        elem_id=ident("identity"),
    )
    controls["chosen"] = gr.HTML(elem_id=ident("chosen"), elem_classes="facesnap-chosen")
    controls["people_report"] = gr.HTML(elem_id=ident("people_report"), elem_classes="facesnap-report")
    controls["people_task"] = hidden_text(ident("people_task"))


def connect(controls: dict[str, Any], engine: Callable[[], Engine]) -> None:
    """Connect the events of the controls."""
    identity = controls["identity"]
    identity.change(
        lambda name: describe(_folder(engine()), name or ""), [identity], [controls["chosen"]], show_progress=False
    )
    photos = ("references", "driving", "canvas_init")
    identity.input(
        choose_pose, [controls[name] for name in ("settings", *photos)], [controls["settings"]], show_progress=False
    )
    names = (
        "people_task",
        "identity",
        "references",
        "face_index",
        "reference_mode",
        "settings",
        "driving",
        "canvas_init",
    )
    controls["people_task"].change(
        lambda *values: run_task(engine(), *values),
        [controls[name] for name in names],
        [controls[name] for name in OUTPUTS],
        show_progress=False,
    )


def _folder(engine: Engine) -> Path:
    """The model folder."""
    return engine.encoders().files.folder


def choices(models: Path) -> list[str]:
    """The names of the saved people, after an empty choice."""
    return ["", *sorted(find_identities(models))]


def choose_pose(settings: str | None, files: list[Any] | None, driving: Any, init: str | None) -> Any:
    """An update of the settings for a saved person, who has no pose: the front view if there is no photo to take the
    pose from.

    Args:
        settings: the hidden text that `page_settings.parse` reads.
        files: the reference photos.
        init: the init image; empty in txt2img.
    """
    try:
        values = defaults() | page_settings.parse(settings)
    except FaceSnapError:  # reported by the job and by the canvas
        return gr.update()
    if values["pose"] != "photo" or files or driving is not None or init:
        return gr.update()
    return page_settings.to_text(values | {"pose": "template", "template": "front"})


def describe(models: Path, name: str) -> str:
    """HTML of a saved person: the small picture, if there is one, and forms for renaming and deleting."""
    if not name:
        return ""
    try:
        identity = identity_file.load(choose_identity(models, name))
    except FaceSnapError as error:
        return problem(str(error))
    title, picture = escape(name, quote=True), identity.picture
    image = ""
    if picture is not None:
        image = f"<img src='{data_url(Image.fromarray(picture.numpy()))}' alt='{title}'>"
    several = " facesnap-several" if len(identity.photos) > 1 else ""
    rename = (
        f"<label>{wording('New name')} <input type='text' data-facesnap-field='name' value='{title}' "
        f"autocomplete='off'></label>{_button('rename', wording('Rename'), name)}"
    )
    label = f"{wording('Delete')} {data(name)}"
    delete = (
        f"<span>{wording('This deletes the file:')} {data(f'{name}.safetensors')}. "
        f"{wording(CONTENTS[picture is not None])} {wording('This cannot be undone.')}</span>"
        f"{_button('delete', label, name)}"
    )
    return (
        f"<div class='facesnap-saved{several}'>{image}<div><span class='facesnap-name' translate='no'>{title}</span>"
        f"{_details('Rename', rename)}{_details('Delete', delete)}</div></div>"
    )


@one_at_a_time
def run_task(
    engine: Engine,
    task: str,
    identity: str | None,
    files: list[Any] | None,
    face_index: float | None,
    reference_mode: str,
    settings: str | None = None,
    driving: Any = None,
    init: str | None = None,
) -> tuple[Any, ...]:
    """Save, rename or delete a person, or read the list again after this was done elsewhere on the page.

    Args:
        task: JSON with `do` ("save", "rename", "delete", "list" or "choose"), `number` (of the request), `person` (the
            saved person's name), `name` (the new name, or the name to choose) and `picture` (whether to save a small
            picture of the face).
        identity: the name of the person that is chosen here.
        files: the image files with the reference photos, or their contents.
        settings, driving, init: see `choose_pose`.

    Returns:
        Updates of `OUTPUTS`. The report repeats the number and names the person's old and new name, so that the page
        can update its other lists. Once a person is saved, the photos are removed and the saved person is chosen
        instead.
    """
    unchanged = gr.update()
    if not task:
        return (unchanged,) * len(OUTPUTS)
    models, number, old, photos = _folder(engine), 0, "", (unchanged, unchanged, unchanged)
    try:
        values = _parse(task)
        number, old, name = values["number"], values["person"], values["name"]
        if values["do"] == "list":
            value = {"value": name} if old and identity == old else {}
            return unchanged, gr.update(choices=choices(models), **value), *photos
        if values["do"] == "choose":
            return unchanged, gr.update(choices=choices(models), value=name), *photos
        if values["do"] == "save":
            path = _save(engine, files, int(face_index or 0), reference_mode, values)
            old, name, photos = "", path.stem, (None, 0, choose_pose(settings, None, driving, init))
            message = (
                f"{wording('Saved as')} {data(path.name)}. {wording(CONTENTS[values['picture']])} "
                f"{wording('The saved person has replaced the photos.')}"
            )
        elif values["do"] == "rename":
            name = rename_identity(models, old, name).stem
            message = f"{wording('Renamed:')} {data(f'{old} → {name}')}"
        else:
            message, name = f"{wording('Deleted:')} {data(delete_identity(models, old).name)}", ""
    except FaceSnapError as error:
        report = f"<div data-facesnap-number='{number}'>{problem(str(error))}</div>"
        return report, unchanged, *photos
    report = (
        f"<div data-facesnap-number='{number}' data-facesnap-old='{escape(old, quote=True)}' "
        f"data-facesnap-new='{escape(name, quote=True)}'>{message}</div>"
    )
    return report, gr.update(choices=choices(models), value=name), *photos


def _parse(task: str) -> dict[str, Any]:
    try:
        values = json.loads(task)
        known = {"do": str(values["do"]), "picture": bool(values.get("picture")), "number": int(values["number"])}
        known |= {name: str(values.get(name) or "") for name in ("person", "name")}
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
        known = {"do": ""}
    if known["do"] not in ("save", "rename", "delete", "list", "choose"):
        raise FaceSnapError("The page sent an unknown request about a saved person; reload the page.")
    return known


def _save(
    engine: Engine, files: list[Any] | None, face_index: int, reference_mode: str, values: dict[str, Any]
) -> Path:
    """Save the person in the photos, and return the file."""
    references = reference_photos(files)
    if reference_mode == "batch" and len(references) > 1:
        raise FaceSnapError(
            "In batch mode the photos show different people; to save one of them, remove the photos of the others."
        )
    encoders = engine.encoders(engine.files())
    return save_identity(encoders, references, values["name"], face_index=face_index, with_picture=values["picture"])


def _save_form(ident: Callable[[str], str]) -> str:
    form = (
        f"<label id='{ident('name')}'>{wording('Name')} "
        "<input type='text' data-facesnap-field='name' autocomplete='off'></label>"
        f"<label id='{ident('picture')}'><input type='checkbox' data-facesnap-field='picture'>"
        " <span>Also keep a small picture of the face</span></label>"
        f"{_button('save', wording('Save person'), '', ident('save'))}"
    )
    return _details("Save this person", form, ident("save_part"))


def _details(title: str, form: str, ident: str = "") -> str:
    named = f" id='{ident}'" if ident else ""
    return (
        f"<details class='facesnap-more'{named}><summary>{title}</summary>"
        f"<div class='facesnap-form'>{form}</div></details>"
    )


def _button(do: str, text: str, person: str, ident: str = "") -> str:
    """HTML of a button that sends its form. `text` is its label, as HTML."""
    named = f" id='{ident}'" if ident else ""
    return (
        f"<button type='button' class='facesnap-button'{named} data-facesnap-task='{do}' "
        f"data-facesnap-person='{escape(person, quote=True)}'>{text}</button>"
    )
