"""What code does to the machine while it reads something: nothing but reading is allowed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORBIDDEN = (  # audit events, by how their names begin
    *("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "pty.spawn", "subprocess."),
    *("os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "shutil."),
    *("ftplib.", "http.client.", "smtplib.", "urllib.", "webbrowser."),
    *("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostby", "socket.sendto"),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

NOT_OURS = "/etc/passwd"  # what requests ask for in the place of a picture
SECONDS = 20  # that one thing may take to be read; most take a few thousandths

_watching: list[tuple[Path, list[str]]] = []


class Misdeed(AssertionError):
    """Something was done that reading does not do."""


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


sys.addaudithook(_hook)  # a hook cannot be taken off: it sleeps while nothing is watched


@contextmanager
def only_reading(folder: Path) -> Iterator[None]:
    """Raise `Misdeed` when the block ran a program, reached for the network, opened `NOT_OURS`, wrote outside `folder`
    or took very long, whatever it raised itself: it may have caught the error that would have told."""
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
            raise Misdeed("; ".join(seen))
