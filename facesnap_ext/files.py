"""Files that are there whole or not at all, and what tells them apart."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from facesnap_ext.errors import FaceSnapError, reason_of

State = tuple[int, ...]


def state_of(path: Path) -> State:
    """Changes when a file does, also for another file of its size and time that was put in its place."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to: it gets that name when the block ends, and is removed when the block raises.

    The folder is made where it is missing. Until then a file of the same name stays as it is, and another process or
    thread may write it too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        part.touch()
        rights = part.stat().st_mode  # which some libraries' own files beside it would not have
        yield part
        if part.stat().st_mode != rights:
            with suppress(OSError):  # some shared folders know no rights
                part.chmod(rights)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def user_write(path: Path) -> Iterator[Path]:
    """As `whole`, for a file that people asked for.

    Raises:
        FaceSnapError: it cannot be written there, or not to its end.
    """
    from safetensors import SafetensorError  # which safetensors raises in place of the system's error

    if path.is_dir():
        raise FaceSnapError(f"{path} is a folder: give the name of a file in it.")
    try:
        with atomic_write(path) as part:
            yield part
    except (OSError, SafetensorError) as error:
        raise FaceSnapError(
            f"{path} cannot be written ({reason_of(error)}): see that there is room and the folder is yours to write."
        ) from error


def sha256(*paths: Path) -> str:
    """The hash of files' contents, one after another, in hexadecimal; read in pieces, so they may be large."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
