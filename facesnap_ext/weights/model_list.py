"""List the model files of each part, with size, hash and licence, for the command line, the page and the API."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import atomic_write, sha256
from facesnap_ext.weights.catalogue import COMMERCIAL_AVAILABLE, COMMERCIAL_GAPS, ROLES, TO_BEGIN, Part, parts_for
from facesnap_ext.weights.face_pack import onnx_files
from facesnap_ext.weights.model_files import FoundModel, ModelFiles
from facesnap_ext.weights.search import WEIGHT_SUFFIXES
from facesnap_ext.weights.tensors import read_index

HASHES = "hashes.json"  # in the model folder: path → size, modification time, SHA-256
MAX_HASHES = 2**22  # maximum size of that file in bytes; it is untrusted, because others may write to the folder
PHRASES = (
    "depends on where the file came from:",
    "judging by the file name:",
    "verified:",
    "according to a stored hash (not verified)",
    "unknown hash",
)
"""The fixed wording in `ModelFile.licence` and `File.verdict`, apart from licences."""
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_computed: set[tuple[str, int, int, str]] = set()  # path and entry of each hash that this process has computed


Hashes = dict[str, tuple[int, int, str]]
"""By path: size, modification time in nanoseconds, SHA-256."""


@dataclass(frozen=True)
class File:
    """A file of a found model.

    Args:
        sha256: empty until it has been computed.
        verdict: whether the hash is known; empty if there is nothing to compare it with.
    """

    name: str
    size: int
    sha256: str
    verdict: str


@dataclass(frozen=True)
class ModelFile:
    """A found model.

    Args:
        path: relative to the model folder if it is inside that folder.
        folder: the folder whose search found it.
        kind: completes the sentence "this is …".
        used: whether FaceSnap uses this model and not a different one.
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
    if "facesnap" in missing:
        missing["instantid"] = missing.pop("facesnap")
    needed = _needed(files, missing)
    roles = []
    for name, purpose in ROLES.items():
        found = tuple(
            [
                described
                for model in files.found
                if model.role == name and (described := _model_file(model, files, hashes)) is not None
            ]
        )
        roles.append(Role(name, purpose, name in needed, missing.get(name, ""), found, parts_for(name)))
    return roles


def _needed(files: ModelFiles, missing: Mapping[str, str]) -> set[str]:
    """The roles that every image requires. No FaceSnap file has been published, so InstantID is required if none is
    installed."""
    pairs = all(isinstance(source, tuple) for source in files.facesnap.values())
    network = "instantid" if pairs else "facesnap"
    return {network, "face_pack", *(("clip",) if files.facesnap and "clip" in missing else ())}


def compute_hashes(files: ModelFiles, progress: Callable[[str], None] = lambda message: None) -> None:
    """Compute the SHA-256 of every found file, and store it in the model folder.

    Files that have not changed since this process computed their hash are skipped. Hashes that earlier processes stored
    are untrusted, so they do not count as verified.

    Raises:
        FaceSnapError: a file cannot be read, or the model folder cannot be written.
    """
    stored = _read_hashes(files.folder)
    paths = [path for model in files.found for path in _files_of(model.path)]
    hashes = {str(path): stored[str(path)] for path in paths if str(path) in stored}  # nothing else is written back
    try:
        for path in paths:
            if not _is_computed(path, hashes):
                progress(f"hashing {path.name}")
                state = path.stat()
                hashes[str(path)] = (state.st_size, state.st_mtime_ns, sha256(path))
                _computed.add((str(path), *hashes[str(path)]))
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
    """Return the file of a downloadable part if it was found, recognised by its kind and size.

    The files of a face model pack only count if they are all together, because other packs have the same detector.
    """
    models = [model for model in files.found if model.role == part.role]
    if part.role == "face_pack":
        together = {(Path(other.target).name, other.size) for other in parts_for(part.role) if _same_pack(other, part)}
        models = [model for model in models if together <= {(path.name, _size(path)) for path in _files_of(model.path)}]
    paths = (path for model in models for path in _files_of(model.path))
    return next((path for path in paths if _size(path) == part.size), None)


def _same_pack(one: Part, other: Part) -> bool:
    return Path(one.target).parent == Path(other.target).parent


def _may_be(part: Part, path: Path) -> bool:
    """Whether a file of this path should be the part. A face model pack of any other name may be a different one."""
    return part.role != "face_pack" or Path(part.target).parts[0] in path.parts


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # the file has just been deleted
        return -1


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


def _model_file(model: FoundModel, files: ModelFiles, hashes: Hashes) -> ModelFile | None:
    try:
        return _describe(model, files, hashes)
    except OSError:  # the file has just been deleted, or is no longer readable
        return None


def _describe(model: FoundModel, files: ModelFiles, hashes: Hashes) -> ModelFile:
    known = {part.sha256: part for part in parts_for(model.role) if part.sha256}
    described = []
    for path in _files_of(model.path):
        digest = _stored_hash(path, hashes)
        size = path.stat().st_size
        verdict = ""
        if digest and known:
            part = known.get(digest)
            verdict = "unknown hash" if any(_may_be(part, path) for part in known.values()) else ""
            if part and part.size == size:
                verified = _is_computed(path, hashes)
                verdict = (
                    f"verified: {part.title}" if verified else f"{part.title} according to a stored hash (not verified)"
                )
        described.append(File(path.name, size, digest, verdict))
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
    if model.role == "image_classifier":
        return ""  # there are many, with different licences
    parts = parts_for(model.role)
    names = [*model.path.parts[-2:]]
    if model.path.suffix == ".safetensors":
        names.append(_metadata(model.path, "source"))  # the name of the original file
    for part in parts if len({part.licence for part in parts}) > 1 else ():
        pack = Path(part.target).parts[0] if part.role == "face_pack" else part.name
        if any(pack in name.lower() for name in names):
            title = part.title.partition("'s ")[0] if part.role == "face_pack" else part.title
            return f"{part.licence} ({part.use}), judging by the file name: {title}"
    licences = sorted({f"{part.licence} ({part.use})" for part in parts})
    return licences[0] if len(licences) == 1 else f"depends on where the file came from: {', '.join(licences)}"


def _metadata(path: Path, field: str) -> str:
    """Return a field of a weight file's metadata; empty if it has none."""
    try:
        return read_index(path).metadata.get(field, "")
    except FaceSnapError:  # the file has just been deleted or replaced
        return ""


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if packs := onnx_files(path):
        return packs
    return [file for file in sorted(path.iterdir()) if file.suffix in WEIGHT_SUFFIXES and file.is_file()]


def _stored_hash(path: Path, hashes: Hashes) -> str:
    size, changed, digest = hashes.get(str(path), (0, 0, ""))
    state = path.stat()
    return digest if (size, changed) == (state.st_size, state.st_mtime_ns) else ""


def _is_computed(path: Path, hashes: Hashes) -> bool:
    """Whether this process has computed the file's hash, and the file has not changed since."""
    return bool(_stored_hash(path, hashes)) and (str(path), *hashes[str(path)]) in _computed


def _read_hashes(folder: Path) -> Hashes:
    """Return the stored hashes that are well-formed. Others are computed again."""
    try:
        with (folder / HASHES).open("rb") as file:
            content = file.read(MAX_HASHES + 1)
        stored = json.loads(content) if len(content) <= MAX_HASHES else {}
    except (OSError, ValueError, RecursionError):  # the file is missing or damaged
        return {}
    entries = stored.items() if isinstance(stored, dict) else ()
    return {path: (entry[0], entry[1], entry[2]) for path, entry in entries if _is_hash_entry(entry)}


def _is_hash_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 3
        and type(entry[0]) is type(entry[1]) is int
        and isinstance(entry[2], str)
        and _SHA256.fullmatch(entry[2]) is not None
    )


def _write_hashes(folder: Path, hashes: Hashes) -> None:
    with atomic_write(folder / HASHES) as part:
        part.write_text(json.dumps(hashes), "utf-8")
