"""Files that are there whole or not at all, and what tells them apart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to: it gets that name when the block ends, and is removed when the block raises.

    The folder is made where it is missing. Until then a file of the same name stays as it is, and another process may
    write it too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def sha256(*paths: Path) -> str:
    """The hash of files' contents, one after another, in hexadecimal; read in pieces, so they may be large."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
