"""The memory of this process, on Linux."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

STATUS = Path("/proc/self/status")
INTERVAL = 0.01  # seconds between two measurements


@dataclass(frozen=True)
class Resident:
    """Resident memory in GB.

    Attributes:
        own: memory that belongs to the process alone.
        mapped: pages of files, which the system can drop when it needs the memory.
    """

    own: float
    mapped: float


def resident() -> Resident | None:
    """The process's memory now; None where the system does not report it."""
    if not STATUS.exists():
        return None
    found = dict(re.findall(r"(RssAnon|RssFile|RssShmem):\s+(\d+) kB", STATUS.read_text()))
    own, mapped, shared = (int(found[name]) * 1024 / 1e9 for name in ("RssAnon", "RssFile", "RssShmem"))
    return Resident(own + shared, mapped)


class PeakMemory:
    """Measure the peaks of `resident` inside a `with` block.

    Attributes:
        own, total: the highest own memory, and the highest sum of both, in GB; 0 where they are unknown.
    """

    def __init__(self) -> None:
        self.own = self.total = 0.0
        self._done = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._measure()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._measure()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._measure()

    def _measure(self) -> None:
        now = resident()
        if now is not None:
            self.own = max(self.own, now.own)
            self.total = max(self.total, now.own + now.mapped)
