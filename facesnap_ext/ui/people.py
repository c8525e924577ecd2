"""Saved people on the page: the form that saves the person in the photos, and the saved person that is chosen.

`ui.tasks` carries out what the forms ask for.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.saved import save_identity
from facesnap_ext.settings.script_args import reference_photos
from facesnap_ext.settings.unit import Unit
from facesnap_ext.ui.markup import data, problem, task_button, wording
from facesnap_ext.ui.photo_cards import data_url
from facesnap_ext.weights import identity_file
from facesnap_ext.weights.identity_folder import choose_identity

CONTENTS = {
    False: "The file contains features of the face, but no pixels.",
    True: "The file contains features of the face and a small picture of it.",
}
"""What is stored about a person, by whether a picture is."""


def form(ident: Callable[[str], str]) -> str:
    """HTML of the form that saves the person in the photos.

    Args:
        ident: makes an element id from a name.
    """
    content = (
        f"<label id='{ident('name')}'>{wording('Name')} "
        "<input type='text' data-facesnap-field='name' autocomplete='off'></label>"
        f"<label id='{ident('picture')}'><input type='checkbox' data-facesnap-field='picture'>"
        " <span>Also keep a small picture of the face</span></label>"
        f"{task_button('save', wording('Save person'), ident=ident('save'))}"
    )
    return f"<div class='facesnap-when-photos'>{_details('Save this person', content, ident('save_part'))}</div>"


def save(engine: Engine, files: list[Any] | None, name: str, unit: Unit, with_picture: bool) -> Path:
    """Save the person in the photos, and return the file.

    Args:
        files: the image files with the reference photos, or their contents.
        unit: the person's settings; the photos in it are not used.

    Raises:
        FaceSnapError: the photos show several people, a photo cannot be used, or the name is taken.
    """
    references = reference_photos(files)
    if unit.reference_mode == "batch" and len(references) > 1:
        raise FaceSnapError(
            "In batch mode the photos show different people; to save one of them, remove the photos of the others."
        )
    encoders = engine.encoders(engine.files())
    return save_identity(encoders, references, name, face_index=unit.face_index, with_picture=with_picture)


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
        f"autocomplete='off'></label>{task_button('rename', wording('Rename'), name)}"
    )
    label = f"{wording('Delete')} {data(name)}"
    delete = (
        f"<span>{wording('This deletes the file:')} {data(f'{name}.safetensors')}. "
        f"{wording(CONTENTS[picture is not None])} {wording('This cannot be undone.')}</span>"
        f"{task_button('delete', label, name)}"
    )
    return (
        f"<div class='facesnap-saved{several}'>{image}<div><span class='facesnap-name' translate='no'>{title}</span>"
        f"{_details('Rename', rename)}{_details('Delete', delete)}</div></div>"
    )


def _details(title: str, form: str, ident: str = "") -> str:
    named = f" id='{ident}'" if ident else ""
    return (
        f"<details class='facesnap-more'{named}><summary>{title}</summary>"
        f"<div class='facesnap-form'>{form}</div></details>"
    )
