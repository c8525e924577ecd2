"""List photos and the people in them, in the layouts of VGGFace2, FFHQ and CelebA-HQ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.storage import Location, Url

_KINDS = "avif bmp gif heic heif jfif jp2 jpe jpeg jpg mpo png pnm ppm tif tiff webp"
PHOTO_SUFFIXES = frozenset(f".{kind}" for kind in _KINDS.split())
CAPTION_SUFFIXES = (".txt", ".caption")
_THOUSANDS = re.compile(r"\d+000")  # names of FFHQ's folders


@dataclass(frozen=True)
class Origin:
    """Where a photo comes from, its licence, and the consent of the person in it, in the words of the manifest."""

    source: str
    license: str
    consent: str


@dataclass(frozen=True)
class PhotoFile:
    """A photo and its caption file: paths relative to the listed folder, and sizes in bytes."""

    path: str
    size: int
    caption: str | None = None
    caption_size: int = 0
    origin: Origin | None = None  # None without a manifest


@dataclass(frozen=True)
class Person:
    """The photos of one person. `folder` is the position of their folder among the listed folders."""

    name: str
    folder: int
    photos: tuple[PhotoFile, ...]


@dataclass(frozen=True)
class Listing:
    """People, ordered by folder and name, and the files that are neither photos nor captions."""

    people: tuple[Person, ...]
    others: tuple[Location, ...]


def list_people(folders: Sequence[Location], layout: str = "auto", identities: Location | None = None) -> Listing:
    """List the photos in folders, without opening them.

    Args:
        layout: "people": one folder per person, as in VGGFace2's `train`. "singles": every photo shows a different
            person, as in FFHQ and CelebA-HQ; folders are ignored. "auto": "singles" for folders that contain the photos
            directly or in FFHQ's folders of a thousand (01000/01234.png), otherwise "people".
        identities: a text file with lines `NAME ID`, such as CelebA's identity_CelebA.txt. Photos with the same ID show
            the same person; names are compared without suffixes.

    Raises:
        FaceSnapError: a folder is missing, contains no photos or matches no layout, or a photo has no line in
            `identities`.
    """
    people: list[Person] = []
    others: list[Location] = []
    known = read_identities(identities) if identities else None
    for number, (folder, label) in enumerate(zip(folders, _labels(folders))):
        photos, rest = _list_photos(folder)
        others += rest
        if not photos:
            raise FaceSnapError(f"{folder} contains no photos; choose a folder with JPEG, PNG or WebP files.")
        names = _names(folder, photos, layout, known, identities)
        by_name: dict[str, list[PhotoFile]] = {}
        for name, photo in zip(names, photos):
            by_name.setdefault(name, []).append(photo)
        people += [Person(f"{label}/{name}", number, tuple(by_name[name])) for name in sorted(by_name)]
    return Listing(tuple(people), tuple(others))


def read_identities(path: Location) -> dict[str, str]:
    """Read the IDs of photos, by their names without suffixes.

    Raises:
        FaceSnapError: the file cannot be read, a line is not a name and an ID, or a name has two different IDs.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FaceSnapError(f"The identities file {path} cannot be read ({error}); check it.") from error
    known: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or known.setdefault(PurePosixPath(words[0]).stem, words[1]) != words[1]:
            raise FaceSnapError(
                f"Line {number} of {path} must be a photo name and an ID, and no photo may have two IDs; correct the "
                "line."
            )
    return known


def _list_photos(folder: Location) -> tuple[list[PhotoFile], list[Location]]:
    """Return the photos in a folder, and its other files."""
    sizes = _list_url(folder) if isinstance(folder, Url) else _list_folder(folder)
    photos, used = [], set()
    for path, size in sizes.items():
        if size is None or path.suffix.lower() not in PHOTO_SUFFIXES:
            continue
        candidates = (path.with_suffix(suffix) for suffix in CAPTION_SUFFIXES)
        caption = next((text for text in candidates if sizes.get(text) is not None), None)
        used |= {path, caption}
        photos.append(PhotoFile(str(path), size, *(() if caption is None else (str(caption), sizes[caption]))))
    return photos, [folder / path for path in sizes if path not in used]


def _list_folder(folder: Path) -> dict[PurePosixPath, int | None]:
    """Return the sizes of all files, in order. Links to folders, which may form loops, have the size None."""

    def size(file: Path) -> int | None:
        try:
            return None if file.is_dir() else file.stat().st_size
        except OSError:  # a broken link, which is reported when the photo is read
            return -1

    if not folder.is_dir():
        raise FaceSnapError(f"The folder {folder} does not exist; check its path.")
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir() or path.is_symlink()]
    return {PurePosixPath(path.relative_to(folder).as_posix()): size(path) for path in files}


def _list_url(folder: Url) -> dict[PurePosixPath, int | None]:
    """Return the sizes of all files, in the same order as for a local folder."""
    sizes = {PurePosixPath(path): size for path, size in folder.list_files().items()}
    if not sizes:
        raise FaceSnapError(f"There are no files in {folder}; check the URL.")
    return {path: sizes[path] for path in sorted(sizes)}


def _names(
    folder: Location,
    photos: Sequence[PhotoFile],
    layout: str,
    known: dict[str, str] | None,
    identities: Location | None,
) -> list[str]:
    """Return the name of the person in each photo."""
    paths = [PurePosixPath(photo.path) for photo in photos]
    if known is not None:
        if missing := [path for path in paths if path.stem not in known]:
            raise FaceSnapError(
                f"{len(missing)} photos in {folder}, such as {missing[0]}, have no line in {identities}; add the "
                "lines, or build folders without identities separately."
            )
        return [known[path.stem] for path in paths]
    if layout == "auto":
        layout = _detect_layout(folder, paths)
    if layout == "singles":
        return [str(path) for path in paths]
    if misplaced := [path for path in paths if len(path.parts) != 2]:
        raise FaceSnapError(
            f"{folder / misplaced[0]} is not in a person's folder; choose folders that contain one folder per person, "
            "such as VGGFace2's train and test."
        )
    return [path.parts[0] for path in paths]


def _detect_layout(folder: Location, paths: Sequence[PurePosixPath]) -> str:
    flat = [len(path.parts) == 1 for path in paths]
    if any(flat) and not all(flat):
        raise FaceSnapError(f"{folder} contains both photos and folders of photos; specify the layout with --layout.")
    return "singles" if all(flat) or all(map(_in_ffhq_folder, paths)) else "people"


def _in_ffhq_folder(path: PurePosixPath) -> bool:
    thousand = path.parts[0]
    if len(path.parts) != 2 or not _THOUSANDS.fullmatch(thousand) or not path.stem.isdecimal():
        return False
    return int(path.stem) // 1000 * 1000 == int(thousand)


def _labels(folders: Sequence[Location]) -> list[str]:
    """Return the folders' names, numbered if several are the same."""
    names = [folder.name if isinstance(folder, Url) else folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else f"{name}-{names[:i].count(name) + 1}" for i, name in enumerate(names)]
