"""Audit what code does while it reads a file: nothing but reading is allowed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORBIDDEN = (  # prefixes of audit events
    *("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "pty.spawn", "subprocess."),
    *("os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "shutil."),
    *("ftplib.", "http.client.", "smtplib.", "urllib.", "webbrowser."),
    *("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostby", "socket.sendto"),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

NOT_OURS = "/etc/passwd"  # a path that requests send in place of an image
SECONDS = 20  # limit for reading one input; most take a few milliseconds

_watching: list[tuple[Path, list[str]]] = []


class ForbiddenAction(AssertionError):
    """Code that should only read did something else."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    folder, seen = _watching[-1]
    if event.startswith(FORBIDDEN):
        seen.append(f"{event} {arguments!r}"[:300])
    elif event == "open":
        path, _, flags = arguments
        inside = isinstance(path, (str, bytes)) and Path(os.fsdecode(path)).resolve().is_relative_to(folder)
        if isinstance(flags, int) and flags & WRITING and not inside and path != os.devnull:
            seen.append(f"open for writing {path!r}")
        if isinstance(path, (str, bytes)) and os.fsdecode(path) == NOT_OURS:
            seen.append(f"open {path!r}")


sys.addaudithook(_hook)  # audit hooks cannot be removed, but this one is inactive outside `with` blocks


@contextmanager
def only_reading(folder: Path) -> Iterator[None]:
    """Raise `ForbiddenAction` if the block ran a program, used the network, opened `NOT_OURS`, wrote outside `folder`
    or took too long.

    Actions are recorded and raised at the end, because the block may catch an error raised in the middle.
    """
    seen: list[str] = []
    _watching.append((folder.resolve(), seen))
    start = time.monotonic()
    try:
        yield
    finally:
        _watching.pop()
        if (seconds := time.monotonic() - start) > SECONDS:
            seen.append(f"took {seconds:.0f} seconds")
        if seen:
            raise ForbiddenAction("; ".join(seen))
