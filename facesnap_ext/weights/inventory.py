"""What there is of every part, and what is known about it: for the command, the page and the routes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import atomic_write, sha256
from facesnap_ext.weights.catalogue import COMMERCIAL_GAPS, COMMERCIAL_THERE, ROLES, TO_BEGIN, Part, ways
from facesnap_ext.weights.places import WEIGHT_SUFFIXES, Found, ModelFiles
from facesnap_ext.weights.tensors import read_index

HASHES = "hashes.json"  # in the model folder: path → size, time of change, SHA-256


@dataclass(frozen=True)
class File:
    """One file of what was found. sha256: empty until computed. verdict: what the hash says, where one is known."""

    name: str
    size: int
    sha256: str
    verdict: str


@dataclass(frozen=True)
class ModelFile:
    """Something that was found. where: the folder that was looked through. used: the one that FaceSnap takes.
    licence: as far as file, hash or name tell."""

    path: str
    where: str
    kind: str
    used: bool
    licence: str
    files: tuple[File, ...]


@dataclass(frozen=True)
class Role:
    """One part of FaceSnap: what it is for, what was found, and which ways there are to fill it. needed: for any
    picture, with the files that are there."""

    name: str
    purpose: str
    needed: bool
    missing: str  # what to do; empty where something was found
    holdings: tuple[ModelFile, ...]
    ways: tuple[Part, ...]


def list_models(files: ModelFiles) -> list[Role]:
    """Every part in the order of the catalogue. Hashes are those that have been computed before."""
    hashes = _read_hashes(files.folder)
    missing = files.missing()
    roles = []
    for name, purpose in ROLES.items():
        found = [found for found in files.found if found.role == name]
        holdings = tuple(_holding(item, files, hashes) for item in found)
        needed = name in ("facesnap", "face_pack") or (name == "clip" and name in missing)
        roles.append(Role(name, purpose, needed, missing.get(name, ""), holdings, ways(name)))
    return roles


def compute_hashes(files: ModelFiles, progress: Callable[[str], None] = lambda message: None) -> None:
    """Compute the SHA-256 of every file that was found and has changed since, and remember it in the model folder.

    Raises:
        FaceSnapError: a file cannot be read, or the model folder cannot be written.
    """
    hashes = _read_hashes(files.folder)
    try:
        for path in (path for found in files.found for path in _files_of(found.path)):
            if not _remembered(path, hashes):
                progress(f"hashing {path.name}")
                state = path.stat()
                hashes[str(path)] = [state.st_size, state.st_mtime_ns, sha256(path)]
                _write_hashes(files.folder, hashes)
    except OSError as error:
        raise FaceSnapError(
            f"The hash of {path} cannot be computed, or written into {files.folder} ({error.strerror or error})."
        ) from error


def readable(count: int) -> str:
    """Bytes in words."""
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_:
            return f"{count / bytes_:.2f} {unit}" if unit == "GB" else f"{count / bytes_:.0f} {unit}"
    return f"{count} bytes"


def is_there(part: Part, files: ModelFiles) -> Path | None:
    """Where a downloadable part is already, recognised by kind of file and size: no need for a second one."""
    paths = (path for found in files.found if found.role == part.role for path in _files_of(found.path))
    return next((path for path in paths if path.stat().st_size == part.size), None)


def as_text(roles: Sequence[Role], files: ModelFiles) -> str:
    """As lines for a terminal."""
    lines = [f"Model folder: {files.folder}", *(f"also looked at: {place}" for place in files.elsewhere)]
    lines.append("others are looked at with --also-look-in DIR, in a WebUI with --facesnap-also-look-in DIR")
    if not files.facesnap:
        lines += ["", TO_BEGIN]
    for role in roles:
        lines += ["", f"{role.name}: {role.purpose}"]
        for holding in role.holdings:
            use = "" if holding.used else ", not used"
            lines.append(f"  {holding.path}: {holding.kind}{use}; licence: {holding.licence or 'unknown'}")
            for file in holding.files:
                known = f" {file.sha256}" if file.sha256 else ""
                verdict = f" ({file.verdict})" if file.verdict else ""
                lines.append(f"    {file.name} {readable(file.size)}{known}{verdict}")
        if not role.holdings:
            lines.append(f"  {'MISSING' if role.needed and role.missing else 'not there; not every picture needs it'}")
        for part in role.ways:
            how = f"facesnap models get {part.name}" if part.url else part.get
            lines.append(f"  {part.title}, {readable(part.size)}, {part.licence} ({part.use}): {how}")
            lines.append(f"    put it as {part.into}{part.page and ', from '}{part.page}")
            if part.note:
                lines.append(f"    {part.note}")
    lines += ["", *(f"Passed over: {reason}" for reason in files.unreadable)]
    lines += ["", f"For commercial use there is {COMMERCIAL_THERE}; what is lacking:"]
    lines += [f"  {gap}" for gap in COMMERCIAL_GAPS]
    return "\n".join(lines)


def to_json(roles: Sequence[Role]) -> list[dict[str, Any]]:
    """As plain dictionaries and lists."""
    return [asdict(role) for role in roles]


def _holding(found: Found, files: ModelFiles, hashes: dict[str, list[Any]]) -> ModelFile:
    known = {part.sha256: part for part in ways(found.role) if part.sha256}
    described = []
    for path in _files_of(found.path):
        digest = _remembered(path, hashes)
        verdict = ""
        if digest and known:
            part = known.get(digest)
            verdict = f"the known file: {part.title}" if part else "not a file that FaceSnap knows"
        described.append(File(path.name, path.stat().st_size, digest, verdict))
    if found.role == "facesnap":
        used = found.path in files.facesnap.values()
    elif found.role == "instantid":
        used = any(isinstance(source, tuple) and found.path in source for source in files.facesnap.values())
    else:
        used = found.path == getattr(files, found.role)
    own = found.place == files.folder
    path = str(found.path.relative_to(files.folder)) if own else str(found.path)
    return ModelFile(path, str(found.place), found.kind, used, _licence(found), tuple(described))


def _licence(found: Found) -> str:
    if found.role == "facesnap":
        return _stated(found.path, "license")
    parts = ways(found.role)
    names = [*found.path.parts[-2:]]
    if found.path.suffix == ".safetensors":
        names.append(_stated(found.path, "source"))  # what a converted file was made of
    for part in parts if len({part.licence for part in parts}) > 1 else ():
        if any(part.name in name.lower() for name in names):
            return f"{part.licence} ({part.use}), if it is what its name says: {part.title}"
    licences = sorted({f"{part.licence} ({part.use})" for part in parts})
    return licences[0] if len(licences) == 1 else f"depends on where it is from: {', '.join(licences)}"


def _stated(path: Path, field: str) -> str:
    """What a weight file's metadata say, empty where nothing."""
    try:
        return read_index(path).metadata.get(field, "")
    except FaceSnapError:  # it was just removed or replaced
        return ""


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.iterdir()) if file.suffix in {*WEIGHT_SUFFIXES, ".onnx"} and file.is_file()]


def _remembered(path: Path, hashes: dict[str, list[Any]]) -> str:
    size, changed, digest = hashes.get(str(path), (None, None, ""))
    state = path.stat()
    return digest if (size, changed) == (state.st_size, state.st_mtime_ns) else ""


def _read_hashes(folder: Path) -> dict[str, list[Any]]:
    try:
        stored = json.loads((folder / HASHES).read_text("utf-8"))
        return {path: [size, changed, digest] for path, (size, changed, digest) in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or not ours: they are computed again
        return {}


def _write_hashes(folder: Path, hashes: dict[str, list[Any]]) -> None:
    with atomic_write(folder / HASHES) as part:
        part.write_text(json.dumps({path: value for path, value in hashes.items() if Path(path).is_file()}), "utf-8")
