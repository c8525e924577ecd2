"""List the model files of each part, with size, hash and licence, for the command line, the page and the API."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import atomic_write, sha256
from facesnap_ext.weights.catalogue import COMMERCIAL_AVAILABLE, COMMERCIAL_GAPS, ROLES, TO_BEGIN, Part, parts_for
from facesnap_ext.weights.model_files import FoundModel, ModelFiles
from facesnap_ext.weights.search import WEIGHT_SUFFIXES
from facesnap_ext.weights.tensors import read_index

HASHES = "hashes.json"  # in the model folder: path → size, modification time, SHA-256


@dataclass(frozen=True)
class File:
    """A file of a found model.

    Args:
        sha256: empty until it has been computed.
        verdict: whether the hash is a known one, if there is any to compare with.
    """

    name: str
    size: int
    sha256: str
    verdict: str


@dataclass(frozen=True)
class ModelFile:
    """A found model.

    Args:
        path: relative to the model folder if it is in there.
        folder: the folder whose search found it.
        kind: completes the sentence "this is …".
        used: whether FaceSnap uses it, rather than another one.
        licence: as far as it can be determined from the file and its name.
    """

    path: str
    folder: str
    kind: str
    used: bool
    licence: str
    files: tuple[File, ...]


@dataclass(frozen=True)
class Role:
    """A part that FaceSnap needs, what was found for it, and where to get it.

    Args:
        needed: whether every image requires it, given the files that were found.
        missing: what to do about it; empty if something was found.
        found: all models found for this role.
        options: the parts of the catalogue that can fill the role.
    """

    name: str
    purpose: str
    needed: bool
    missing: str
    found: tuple[ModelFile, ...]
    options: tuple[Part, ...]


def list_models(files: ModelFiles) -> list[Role]:
    """Return all roles in the order of the catalogue. Hashes are included if they have been computed before."""
    hashes = _read_hashes(files.folder)
    missing = files.missing()
    roles = []
    for name, purpose in ROLES.items():
        found = tuple(_model_file(model, files, hashes) for model in files.found if model.role == name)
        needed = name in ("facesnap", "face_pack") or (name == "clip" and name in missing)
        roles.append(Role(name, purpose, needed, missing.get(name, ""), found, parts_for(name)))
    return roles


def compute_hashes(files: ModelFiles, progress: Callable[[str], None] = lambda message: None) -> None:
    """Compute the SHA-256 of every found file that is new or has changed, and store it in the model folder.

    Raises:
        FaceSnapError: a file cannot be read, or the model folder cannot be written.
    """
    hashes = _read_hashes(files.folder)
    try:
        for path in (path for model in files.found for path in _files_of(model.path)):
            if not _stored_hash(path, hashes):
                progress(f"hashing {path.name}")
                state = path.stat()
                hashes[str(path)] = [state.st_size, state.st_mtime_ns, sha256(path)]
                _write_hashes(files.folder, hashes)
    except OSError as error:
        raise FaceSnapError(
            f"The hash of {path} cannot be computed or stored in {files.folder} ({error.strerror or error}); check "
            "your permissions."
        ) from error


def format_size(count: int) -> str:
    """Format a number of bytes, such as "2.50 GB"."""
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_:
            return f"{count / bytes_:.2f} {unit}" if unit == "GB" else f"{count / bytes_:.0f} {unit}"
    return f"{count} bytes"


def existing_file(part: Part, files: ModelFiles) -> Path | None:
    """Return the file of a downloadable part if it was found, recognised by its kind and size."""
    paths = (path for model in files.found if model.role == part.role for path in _files_of(model.path))
    return next((path for path in paths if path.stat().st_size == part.size), None)


def as_text(roles: Sequence[Role], files: ModelFiles) -> str:
    """Format roles as lines for a terminal."""
    lines = [f"Model folder: {files.folder}", *(f"Also searched: {folder}" for folder in files.elsewhere)]
    lines.append("To search further folders, use --also-look-in DIR, or --facesnap-also-look-in DIR in a WebUI.")
    if not files.facesnap:
        lines += ["", TO_BEGIN]
    for role in roles:
        lines += ["", f"{role.name}: {role.purpose}"]
        for model in role.found:
            use = "" if model.used else ", not used"
            lines.append(f"  {model.path}: {model.kind}{use}; licence: {model.licence or 'unknown'}")
            for file in model.files:
                known = f" {file.sha256}" if file.sha256 else ""
                verdict = f" ({file.verdict})" if file.verdict else ""
                lines.append(f"    {file.name} {format_size(file.size)}{known}{verdict}")
        if not role.found:
            lines.append(f"  {'MISSING' if role.needed and role.missing else 'not found; optional'}")
        for part in role.options:
            how = f"facesnap models get {part.name}" if part.url else part.how_to_get
            lines.append(f"  {part.title}, {format_size(part.size)}, {part.licence} ({part.use}): {how}")
            source = f" (from {part.page})" if part.page else ""
            lines.append(f"    save it as {part.target}{source}")
            if part.note:
                lines.append(f"    {part.note}")
    lines += ["", *(f"Skipped: {reason}" for reason in files.passed_over)]
    lines += ["", f"Available for commercial use: {COMMERCIAL_AVAILABLE}. Not available:"]
    lines += [f"  {gap}" for gap in COMMERCIAL_GAPS]
    return "\n".join(lines)


def to_json(roles: Sequence[Role]) -> list[dict[str, Any]]:
    """Convert roles to plain dictionaries and lists."""
    return [asdict(role) for role in roles]


def _model_file(model: FoundModel, files: ModelFiles, hashes: dict[str, list[Any]]) -> ModelFile:
    known = {part.sha256: part for part in parts_for(model.role) if part.sha256}
    described = []
    for path in _files_of(model.path):
        digest = _stored_hash(path, hashes)
        verdict = ""
        if digest and known:
            part = known.get(digest)
            verdict = f"verified: {part.title}" if part else "unknown hash"
        described.append(File(path.name, path.stat().st_size, digest, verdict))
    if model.role == "facesnap":
        used = model.path in files.facesnap.values()
    elif model.role == "instantid":
        used = any(isinstance(source, tuple) and model.path in source for source in files.facesnap.values())
    else:
        used = model.path == getattr(files, model.role)
    shown = model.path.relative_to(files.folder) if model.folder == files.folder else model.path
    return ModelFile(str(shown), str(model.folder), model.kind, used, _licence(model), tuple(described))


def _licence(model: FoundModel) -> str:
    if model.role == "facesnap":
        return _metadata(model.path, "license")
    parts = parts_for(model.role)
    names = [*model.path.parts[-2:]]
    if model.path.suffix == ".safetensors":
        names.append(_metadata(model.path, "source"))  # the name of the file it was converted from
    for part in parts if len({part.licence for part in parts}) > 1 else ():
        if any(part.name in name.lower() for name in names):
            return f"{part.licence} ({part.use}), assuming from its name that it is {part.title}"
    licences = sorted({f"{part.licence} ({part.use})" for part in parts})
    return licences[0] if len(licences) == 1 else f"depends on its origin: {', '.join(licences)}"


def _metadata(path: Path, field: str) -> str:
    """Return a field of a weight file's metadata; empty if it has none."""
    try:
        return read_index(path).metadata.get(field, "")
    except FaceSnapError:  # it has just been deleted or replaced
        return ""


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.iterdir()) if file.suffix in {*WEIGHT_SUFFIXES, ".onnx"} and file.is_file()]


def _stored_hash(path: Path, hashes: dict[str, list[Any]]) -> str:
    size, changed, digest = hashes.get(str(path), (None, None, ""))
    state = path.stat()
    return digest if (size, changed) == (state.st_size, state.st_mtime_ns) else ""


def _read_hashes(folder: Path) -> dict[str, list[Any]]:
    try:
        stored = json.loads((folder / HASHES).read_text("utf-8"))
        return {path: [size, changed, digest] for path, (size, changed, digest) in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # missing or damaged; the hashes are computed again
        return {}


def _write_hashes(folder: Path, hashes: dict[str, list[Any]]) -> None:
    with atomic_write(folder / HASHES) as part:
        part.write_text(json.dumps({path: value for path, value in hashes.items() if Path(path).is_file()}), "utf-8")
