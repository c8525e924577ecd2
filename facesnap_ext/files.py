"""Atomic writes, hashes, and a value that changes whenever a file does."""

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
    """Return a value that changes with the file, even if a file of the same size and date replaces it."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


@contextmanager
def atomic_write(path: Path, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which is renamed to `path` when the block ends.

    It is removed if the block raises. Missing folders are created. Until the rename, an existing file stays
    unchanged, and other processes and threads may write the same file.

    Args:
        private: whether to create the file readable only by the user.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        part.touch(0o600 if private else 0o666)
        mode = part.stat().st_mode  # some libraries replace the file with one that has different permissions
        yield part
        if part.stat().st_mode != mode:
            with suppress(OSError):  # some network drives have no permissions
                part.chmod(mode)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def user_write(path: Path, private: bool = False) -> Iterator[Path]:
    """Like `atomic_write`, for a file that the user requested.

    Raises:
        FaceSnapError: the file cannot be written completely.
    """
    from safetensors import SafetensorError  # safetensors raises its own error instead of OSError

    if path.is_dir():
        raise FaceSnapError(f"{path} is a folder; enter the name of a file in it.")
    try:
        with atomic_write(path, private) as part:
            yield part
    except (OSError, SafetensorError) as error:
        raise FaceSnapError(
            f"{path} cannot be written ({reason_of(error)}); check the free disk space and your write permission "
            "for the folder."
        ) from error


def user_delete(path: Path) -> None:
    """Delete a file at the user's request.

    Raises:
        FaceSnapError: the file cannot be deleted.
    """
    try:
        path.unlink()
    except OSError as error:
        raise FaceSnapError(
            f"{path} cannot be deleted ({reason_of(error)}); check your write permission for the folder."
        ) from error


def sha256(*paths: Path) -> str:
    """Return the SHA-256 of the concatenated contents of files, in hexadecimal; large files are read in blocks."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
