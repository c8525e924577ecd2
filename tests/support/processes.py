"""Whether processes are still running, from /proc."""

from __future__ import annotations

import os
import time
from pathlib import Path


def group_is_alive(group: int) -> bool:
    """Return whether any process of the group is still running."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    states = [_state(entry, group) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return any(state not in (None, "Z") for state in states)


def wait_for_end(group: int, seconds: float = 10) -> bool:
    """Wait until no process of the group is running, and return whether this is the case."""
    deadline = time.monotonic() + seconds
    while group_is_alive(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not group_is_alive(group)


def _state(entry: Path, group: int) -> str | None:
    try:
        state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return None
    return state if int(process_group) == group else None
