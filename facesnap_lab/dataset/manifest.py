"""The manifest of a build: a CSV file that states where photos come from, and under which licence and consent.

    path,source,license,consent
    VGGFace2,VGGFace2,research only,unknown
    ffhq/00000.png,https://www.flickr.com/photos/…,CC BY 2.0,unknown

A path is a photo or a folder, relative to the manifest's folder, or a URL. The most specific line applies to a photo.
"""

from __future__ import annotations

import csv
import io
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.dataset.layouts import Listing, Origin, Person
from facesnap_lab.storage import Location, location
from facesnap_lab.text_files import read_utf8

COLUMNS = ("path", "source", "license", "consent")
MAX_LENGTH = 200  # characters of source, license and consent


def read_manifest(path: Location) -> dict[Location, tuple[int, Origin]]:
    """Read a manifest.

    Returns:
        The number and the content of each line, by the absolute path or the URL of its photo or folder.

    Raises:
        FaceSnapError: the file cannot be read, or a line is invalid.
    """
    lines: dict[Location, tuple[int, Origin]] = {}
    for number, cells in _read_rows(path):
        if len(cells) != len(COLUMNS):
            raise _error(path, number, f"has {len(cells)} cells instead of {len(COLUMNS)} ({', '.join(COLUMNS)})")
        for name, cell in zip(COLUMNS, cells):
            if not cell:
                raise _error(path, number, f"has an empty {name}", "fill it in, for example with 'unknown'")
            if name != "path" and (len(cell) > MAX_LENGTH or not cell.isprintable()):
                raise _error(path, number, f"has a {name} that is not plain text of at most {MAX_LENGTH} characters")
        key = _normalised(path.parent, cells[0])
        if key in lines:
            raise _error(path, number, f"repeats the path of line {lines[key][0]}", "remove one of the two lines")
        lines[key] = number, Origin(*cells[1:])
    return lines


def _read_rows(path: Location) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each line after the header, without surrounding spaces."""
    text = read_utf8(path, "manifest", "save the manifest as CSV in UTF-8")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header, number = None, 1
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                if header is None:
                    header = _check_header(path, number, cells)
                else:
                    yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        raise _error(path, number, f"is not valid CSV ({error})") from error
    if header is None:
        raise _error(path, 1, f"is not the header {','.join(COLUMNS)}", "add the header")


def _check_header(path: Location, number: int, cells: list[str]) -> list[str]:
    if tuple(cells) != COLUMNS:
        raise _error(path, number, f"is not the header {','.join(COLUMNS)}")
    return cells


def _error(path: Location, number: int, problem: str, advice: str = "correct the line") -> FaceSnapError:
    return FaceSnapError(f"Line {number} of {path} {problem}; {advice}.")


def add_origins(listing: Listing, folders: Sequence[Location], manifest: Location) -> Listing:
    """Return the listing with the origin of every photo.

    Args:
        folders: the listed folders.
        manifest: file for `read_manifest`.

    Raises:
        FaceSnapError: the manifest is invalid, contains a path that does not exist, or lacks a photo.
    """
    lines = read_manifest(manifest)
    used: set[Location] = set()

    def with_origins(person: Person) -> Person:
        photos = []
        for photo in person.photos:
            path = _normalised(folders[person.folder], photo.path)
            key = next((key for key in (path, *path.parents) if key in lines), None)
            if key is None:
                raise FaceSnapError(
                    f"{folders[person.folder] / photo.path} has no line in the manifest {manifest}; add a line with "
                    "its path or its folder."
                )
            used.add(key)
            photos.append(replace(photo, origin=lines[key][1]))
        return replace(person, photos=tuple(photos))

    people = tuple(with_origins(person) for person in listing.people)
    for key, (number, _) in lines.items():
        if key not in used and not _exists(key):
            raise _error(manifest, number, f"names {key}, which does not exist")
    return replace(listing, people=people)


def _normalised(base: Location, path: str) -> Location:
    """Join a path or URL to a folder, and resolve "." and "..", but not symbolic links."""
    target = location(path)
    if isinstance(target, Path):
        target = base / path
    if isinstance(target, Path):
        return Path(os.path.normpath(target.absolute()))
    return target.with_path(PurePosixPath(posixpath.normpath(target.path)))


def _exists(path: Location) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # such as a name that is too long
        return False
