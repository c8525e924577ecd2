"""Copies of a run's checkpoints, sample images and logs in an object store.

Every node uploads the files of its own processes. The file `complete`, which is written last and deleted first, marks a
checkpoint that has all of them. A run is resumed from the last such checkpoint.
"""

from __future__ import annotations

import re
from pathlib import Path

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.storage import Url, upload_folder, write

COMPLETE = "complete"
_COMPLETE_STEP = re.compile(rf"step-(\d{{7,}})/{COMPLETE}")


def complete_steps(url: Url) -> list[int]:
    """Return the steps of the complete checkpoints, in ascending order."""
    return sorted(int(match[1]) for name in url.list_files() if (match := _COMPLETE_STEP.fullmatch(name)))


def finish(url: Url, out: Path, step: int, keep: int) -> None:
    """Mark an uploaded checkpoint as complete, delete all but the newest `keep`, and upload the run's other files.

    Args:
        out: the run's folder.
    """
    with write(_step(url, step) / COMPLETE):
        pass
    for old in complete_steps(url)[:-keep]:
        (_step(url, old) / COMPLETE).delete()
        _step(url, old).delete()
    upload_samples(url, out)


def upload_samples(url: Url, out: Path) -> None:
    """Upload the sample images and logs in the run's folder."""
    for name in ("logs", "samples"):
        upload_folder(url / name, out / name)


def prepare(url: Url, out: Path, resume: bool) -> None:
    """Check that a new run's URL is not used yet, or download the last complete checkpoint if `out` lacks it.

    Raises:
        FaceSnapError: the URL is already used although the run is not resumed, or the store fails.
    """
    if not resume:
        if url.list_files():
            raise FaceSnapError(f"{url} is not empty; resume the run with --resume, or choose another 'upload'.")
        return
    steps = complete_steps(url)
    if not steps or (out / f"step-{steps[-1]:07d}").exists():
        return
    source = _step(url, steps[-1])
    part = out / f".{source.name}.part"
    for name in source.list_files():
        if name != COMPLETE:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).download(part / name)
    part.rename(out / source.name)


def _step(url: Url, step: int) -> Url:
    return url / f"step-{step:07d}"
