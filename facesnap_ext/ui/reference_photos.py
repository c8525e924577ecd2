"""The cards that show what was found in each reference photo of a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from facesnap_ext import photos
from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.references import ReferenceReport
from facesnap_ext.photos import Photo, PhotoReader
from facesnap_ext.settings.script_args import read_photo
from facesnap_ext.ui.markup import problem
from facesnap_ext.ui.photo_cards import Card, cards_html


def check_references(engine: Engine, files: list[Any] | None, face_index: int, reference_mode: str = "fused") -> str:
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
    report, notes = _report(engine, readable, face_index, reference_mode == "batch")
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
