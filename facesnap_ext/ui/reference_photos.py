"""The reference photos of a person: their controls, and the cards that show what was found in each photo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from facesnap_ext import photos
from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.references import ReferenceReport
from facesnap_ext.photos import Photo, PhotoReader
from facesnap_ext.settings.script_args import read_photo
from facesnap_ext.settings.unit import REFERENCE_MODES
from facesnap_ext.ui.markup import problem
from facesnap_ext.ui.photo_cards import Card, cards_html
from facesnap_ext.ui.uploads import photo_files

MODE_LABELS = {
    "fused": "same person, combined (fused)",
    "averaged": "same person, averaged",
    "batch": "different people: one image per photo (batch)",
}


def add_controls(controls: dict[str, Any], ident: Callable[[str], str]) -> None:
    """Create the controls of one person's reference photos.

    style.css hides gradio's list of files while the cards are shown, and the mode while there is only one photo.
    `face_index` is set by the buttons on the cards.

    Args:
        controls: the person's components by name, to which these are added.
        ident: makes an element id from a name.
    """
    controls["references"] = photo_files("Reference photos", ident("references"), elem_classes="facesnap-photos")
    controls["seen"] = gr.HTML(elem_id=ident("seen"), elem_classes=["facesnap-seen", "facesnap-report"])
    controls["face_index"] = gr.Number(
        0,
        label="Face index in all reference photos (0 = largest)",
        precision=0,
        elem_id=ident("face_index"),
        elem_classes="facesnap-hidden",
    )
    controls["reference_mode"] = gr.Radio(
        [(MODE_LABELS[mode], mode) for mode in REFERENCE_MODES],
        value="fused",
        label="Several photos",
        elem_id=ident("reference_mode"),
        elem_classes="facesnap-when-several",
    )


def connect(controls: dict[str, Any], engine: Callable[[], Engine]) -> None:
    """Draw the cards when the photos change, and when a setting changes that they depend on."""
    inputs = [controls[name] for name in ("references", "face_index", "reference_mode")]
    for component in inputs:
        component.change(
            lambda *values: check_references(engine(), *values), inputs, [controls["seen"]], show_progress=False
        )


@photos.one_at_a_time
def check_references(
    engine: Engine, files: list[Any] | None, face_index: float | None, reference_mode: str = "fused"
) -> str:
    """HTML of the reference photos with what was found in each. A photo that cannot be used does not hide the others.

    Args:
        files: the image files, or their contents.
    """
    given = list(filter(None, files or ()))
    if not given:
        return ""
    try:
        photos.check_number(len(given))
    except FaceSnapError as error:
        return problem(str(error))
    reader = PhotoReader()
    names = photos.titles_of(given, "Reference photo")
    read = [_read(value, name, reader) for value, name in zip(given, names)]
    readable = [photo for photo in read if isinstance(photo, Photo)]
    report, notes = _report(engine, readable, int(face_index or 0), reference_mode == "batch")
    references = iter(report.references if report else [None] * len(readable))
    cards = [
        Card(name, photo, next(references)) if isinstance(photo, Photo) else Card(name, error=str(photo))
        for name, photo in zip(names, read)
    ]
    return cards_html(cards, notes)


def _read(value: Any, name: str, reader: PhotoReader) -> Photo | FaceSnapError:
    try:
        return read_photo(value, name, reader)
    except FaceSnapError as error:
        return error


def _report(
    engine: Engine, readable: Sequence[Photo], face_index: int, batch: bool
) -> tuple[ReferenceReport | None, Sequence[str]]:
    """The report on the photos, or None if faces cannot be detected; and sentences for the user."""
    if not readable:
        return None, ()
    try:
        report = engine.examine(readable, face_index, batch)
    except FaceSnapError as error:
        return None, [str(error)]
    return report, report.notes
