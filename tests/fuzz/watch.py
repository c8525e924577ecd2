"""Audit what code does while it reads untrusted input: nothing but reading is allowed, and only for a limited time."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORBIDDEN = (  # prefixes of audit events
    *("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "pty.spawn", "subprocess."),
    *("os.link", "os.rmdir", "os.symlink", "os.truncate", "shutil."),
    *("ftplib.", "http.client.", "smtplib.", "urllib.", "webbrowser."),
    *("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostby", "socket.sendto"),
)
CHANGING = ("os.chmod", "os.mkdir", "os.remove", "os.rename")  # prefixes of events that change a file
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

NOT_OURS = "/etc/passwd"  # a path that requests send in place of an image
SECONDS = 20  # limit for reading one input; most take a few milliseconds

_watching: list[_Watch] = []


class ForbiddenAction(AssertionError):
    """Code that should only read did something else."""


class TookTooLong(BaseException):
    """Code did not return in time. No handler of ordinary errors catches this."""


@dataclass
class _Watch:
    folder: Path
    may_change: bool
    seen: list[str] = field(default_factory=list)

    def is_inside(self, path: object) -> bool:
        return isinstance(path, (str, bytes)) and Path(os.fsdecode(path)).resolve().is_relative_to(self.folder)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    watch = _watching[-1]
    if event.startswith(FORBIDDEN):
        watch.seen.append(f"{event} {arguments!r}"[:300])
    elif event.startswith(CHANGING):
        if not (watch.may_change and watch.is_inside(arguments[0])):
            watch.seen.append(f"{event} {arguments!r}"[:300])
    elif event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITING and path != os.devnull and not watch.is_inside(path):
            watch.seen.append(f"open for writing {path!r}")
        if isinstance(path, (str, bytes)) and os.fsdecode(path) == NOT_OURS:
            watch.seen.append(f"open {path!r}")


sys.addaudithook(_hook)  # audit hooks cannot be removed, but this one is inactive outside `with` blocks


@contextmanager
def only_reading(folder: Path, may_change: bool = False) -> Iterator[None]:
    """Raise `ForbiddenAction` if the block ran a program, used the network, opened `NOT_OURS`, wrote outside `folder`
    or took too long.

    Actions are recorded and raised at the end, because the block may catch an error raised in the middle.

    Args:
        may_change: whether the block may also rename, remove and create files and folders in `folder`.
    """
    watch = _Watch(folder.resolve(), may_change)
    _watching.append(watch)
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the block may import modules
    start = time.monotonic()
    try:
        with _limited_time():
            yield
    finally:
        _watching.pop()
        sys.dont_write_bytecode = bytecode
        if (seconds := time.monotonic() - start) > SECONDS:
            watch.seen.append(f"took {seconds:.0f} seconds")
        if watch.seen:
            raise ForbiddenAction("; ".join(watch.seen))


@contextmanager
def _limited_time() -> Iterator[None]:
    """End a block that does not return.

    Python code is interrupted by an exception after `SECONDS`. If a library does not return to Python, the process ends
    after three times as long.
    """

    def give_up(number: int, frame: object) -> None:
        raise TookTooLong(f"{SECONDS} seconds")

    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
