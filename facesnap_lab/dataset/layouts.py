"""Which photos there are and who is in them: the layouts of VGGFace2, FFHQ and CelebA-HQ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from facesnap_ext.errors import FaceSnapError

_KINDS = "avif bmp gif heic heif jfif jp2 jpe jpeg jpg mpo png pnm ppm tif tiff webp"
PHOTO_SUFFIXES = frozenset(f".{kind}" for kind in _KINDS.split())
CAPTION_SUFFIXES = (".txt", ".caption")
_THOUSANDS = re.compile(r"\d+000")  # FFHQ's folders


@dataclass(frozen=True)
class PhotoFile:
    """A photo and its caption beside it, by their paths from the folder that was given; sizes in bytes."""

    path: str
    size: int
    caption: str | None = None
    caption_size: int = 0


@dataclass(frozen=True)
class Person:
    """Somebody's photos, all in the folder of this number of those that were given."""

    name: str
    folder: int
    photos: tuple[PhotoFile, ...]


@dataclass(frozen=True)
class Listing:
    """People by folder and name, and the files that are neither photos nor captions of photos."""

    people: tuple[Person, ...]
    others: tuple[Path, ...]


def list_people(folders: Sequence[Path], layout: str = "auto", identities: Path | None = None) -> Listing:
    """List the photos in folders, without opening one.

    Args:
        layout: "people": a folder for each person, as VGGFace2's `train`. "singles": every photo is a person of its
            own, as in FFHQ and CelebA-HQ, at any depth. "auto": by the folder, where photos lie in it itself and where
            folders are FFHQ's thousands (01000/01234.png) "singles", else "people".
        identities: a text file of lines `NAME ID`, as CelebA's identity_CelebA.txt; photos whose names, without
            suffixes, stand with equal IDs are of one person. For photos that lie flat.

    Raises:
        FaceSnapError: a folder is missing, has no photos or is of no layout; a photo has no line in `identities`.
    """
    people: list[Person] = []
    others: list[Path] = []
    known = read_identities(identities) if identities else None
    for number, (folder, label) in enumerate(zip(folders, _labels(folders))):
        photos, rest = _list_photos(folder)
        others += rest
        if not photos:
            raise FaceSnapError(f"There are no photos in {folder}; give a folder with pictures as JPEG, PNG or WebP.")
        names = _names(folder, photos, layout, known, identities)
        by_name: dict[str, list[PhotoFile]] = {}
        for name, photo in zip(names, photos):
            by_name.setdefault(name, []).append(photo)
        people += [Person(f"{label}/{name}", number, tuple(by_name[name])) for name in sorted(by_name)]
    return Listing(tuple(people), tuple(others))


def read_identities(path: Path) -> dict[str, str]:
    """IDs by photos' names without suffixes.

    Raises:
        FaceSnapError: the file cannot be read, or a line is not a name and an ID, or gives a name a second ID.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FaceSnapError(f"The identities in {path} cannot be read ({error}); check the file.") from error
    known: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or known.setdefault(PurePosixPath(words[0]).stem, words[1]) != words[1]:
            raise FaceSnapError(f"Line {number} of {path} is not a photo's name and its one ID; mend the line.")
    return known


def _list_photos(folder: Path) -> tuple[list[PhotoFile], list[Path]]:
    if not folder.is_dir():
        raise FaceSnapError(f"There is no folder {folder}; check its path.")
    entries = sorted(folder.rglob("*"))
    # links to folders are not followed, which may lead in circles: they are among the rest
    files = [path for path in entries if not path.is_dir() or path.is_symlink()]
    texts = {path for path in files if path.suffix in CAPTION_SUFFIXES}
    photos, used = [], set()
    for path in files:
        if path.suffix.lower() not in PHOTO_SUFFIXES or path.is_dir():
            continue
        beside = (path.with_suffix(suffix) for suffix in CAPTION_SUFFIXES)
        caption = next((text for text in beside if text in texts), None)
        used |= {path} if caption is None else {path, caption}
        photos.append(_photo_file(folder, path, caption))
    return photos, [path for path in files if path not in used]


def _photo_file(folder: Path, path: Path, caption: Path | None) -> PhotoFile:
    def size(file: Path) -> int:
        try:
            return file.stat().st_size
        except OSError:  # a link that leads nowhere; reading it will tell
            return -1

    relative = path.relative_to(folder).as_posix()
    if caption is None:
        return PhotoFile(relative, size(path))
    return PhotoFile(relative, size(path), caption.relative_to(folder).as_posix(), size(caption))


def _names(
    folder: Path,
    photos: Sequence[PhotoFile],
    layout: str,
    known: dict[str, str] | None,
    identities: Path | None,
) -> list[str]:
    """Who is in each photo."""
    paths = [PurePosixPath(photo.path) for photo in photos]
    if known is not None:
        if missing := [path for path in paths if path.stem not in known]:
            raise FaceSnapError(
                f"{len(missing)} photos in {folder}, such as {missing[0]}, have no line in {identities}; add them, or "
                "build folders without identities by themselves."
            )
        return [known[path.stem] for path in paths]
    if layout == "auto":
        layout = _recognise(folder, paths)
    if layout == "singles":
        return [str(path) for path in paths]
    if odd := [path for path in paths if len(path.parts) != 2]:
        raise FaceSnapError(
            f"{folder / odd[0]} does not lie in the folder of a person; give folders whose folders are people, such as "
            "VGGFace2's train and test."
        )
    return [path.parts[0] for path in paths]


def _recognise(folder: Path, paths: Sequence[PurePosixPath]) -> str:
    flat = [len(path.parts) == 1 for path in paths]
    if any(flat) and not all(flat):
        raise FaceSnapError(
            f"{folder} has photos both in itself and in folders; say with --layout whether folders are people."
        )
    return "singles" if all(flat) or all(map(_in_its_thousand, paths)) else "people"


def _in_its_thousand(path: PurePosixPath) -> bool:
    thousand = path.parts[0]
    if len(path.parts) != 2 or not _THOUSANDS.fullmatch(thousand) or not path.stem.isdecimal():
        return False
    return int(path.stem) // 1000 * 1000 == int(thousand)


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, numbered where two are equal."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else f"{name}-{names[:i].count(name) + 1}" for i, name in enumerate(names)]
