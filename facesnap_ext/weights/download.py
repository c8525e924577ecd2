"""Download parts with a known hash, on request only. Downloads are resumable, verified and atomic."""

from __future__ import annotations

import errno
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import sha256
from facesnap_ext.weights.catalogue import Part, downloadable, title_of
from facesnap_ext.weights.connection import BLOCK, ConnectionLost, StopRequested, open_url, pause, read_block
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.model_list import existing_file, format_size

MAX_FAILURES = 3  # maximum number of consecutive connections that transfer nothing
WAIT = 2.0  # seconds to wait between two connections
_TEXT = re.compile(r"\s*(text/|application/([\w.-]+\+)?(json|xml|javascript)\b)", re.IGNORECASE)  # types of content


class Stopped(FaceSnapError):
    """The user stopped a download."""


def download(
    part: Part,
    folder: Path,
    progress: Callable[[int], None] = lambda done: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Path:
    """Download a part to the model folder.

    If the download is interrupted, the received data is kept next to the target as `.NAME.part`, and the next call
    resumes it with an HTTP range request. The file gets its final name once its SHA-256 has been verified.

    Args:
        part: must have `url`, `size` and `sha256`.
        progress: called with the number of bytes received so far.
        stopped: called after each block and ten times a second; the download stops if it returns True.

    Returns:
        The file's path. An existing file with the correct hash is not downloaded again.

    Raises:
        Stopped: `stopped` returned True.
        FaceSnapError: the server cannot be reached or has a different file, another process is downloading the part to
            the same folder, the disk is full, or the hash is wrong, in which case the received data is deleted.
    """
    target, arrived = folder / part.target, _arrived(part, folder)
    try:
        for path in (target, arrived):
            if path.is_dir():
                raise FaceSnapError(f"{path} is a folder, but {part.title} is a file; move the folder away.")
        if target.exists():
            if sha256(target) != part.sha256:
                raise FaceSnapError(
                    f"A different file {target} already exists; move it elsewhere, then download again."
                )
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(part, target.with_name(f".{target.name}.lock")):
            _check_space(folder, part.size - _size(arrived))
            _fetch_all(part, arrived, progress, stopped)
            if (actual := sha256(arrived)) != part.sha256:
                arrived.unlink()
                raise FaceSnapError(
                    f"The downloaded {target.name} is not the expected file (SHA-256 {actual[:12]}… instead of "
                    f"{part.sha256[:12]}…) and was deleted; try again, and if that fails, see {part.page} for a new "
                    "version."
                )
            arrived.replace(target)
    except StopRequested as error:
        raise Stopped(
            f"The download of {part.title} was stopped at {format_size(_size(arrived))} of {format_size(part.size)}; "
            "download it again to resume."
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise FaceSnapError(
                f"The disk with {folder} is full; free up some space, then download {part.title} again to resume."
            ) from error
        raise FaceSnapError(
            f"{target} cannot be written ({error.strerror or error}); check your write permission for the folder."
        ) from error
    return target


def _arrived(part: Part, folder: Path) -> Path:
    """The file with the data received so far."""
    target = folder / part.target
    return target.with_name(f".{target.name}.part")


def _check_space(folder: Path, missing: int) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < missing:
        raise FaceSnapError(
            f"The disk with {folder} has {format_size(free)} left, but {format_size(missing)} are needed; free up some "
            "space."
        )


@contextmanager
def _exclusive(part: Part, lock: Path) -> Iterator[None]:
    """Lock the file against other processes, such as a second WebUI with the same model folder."""
    from filelock import FileLock, Timeout  # filelock is installed with torch

    guard = FileLock(lock, timeout=0)
    try:
        guard.acquire()
    except Timeout as error:
        raise FaceSnapError(
            f"Another FaceSnap process is downloading {part.title} to this folder; wait until it has finished, or "
            f"{part.how_to_get} by hand."
        ) from error
    except (NotImplementedError, OSError):
        pass  # a network drive that does not support locks
    try:
        yield
    finally:
        with suppress(OSError):  # on Windows, `release` deletes the lock file
            lock.unlink()
        guard.release()


def _fetch_all(part: Part, arrived: Path, progress: Callable[[int], None], stopped: Callable[[], bool]) -> None:
    """Reconnect until the file is complete; give up after `MAX_FAILURES` connections that transfer nothing."""
    failures = 0
    while (before := _size(arrived)) < part.size:
        try:
            _fetch(part, arrived, progress, stopped)
            reason = "the connection ended early"
        except ConnectionLost as error:
            reason = str(error)
        failures = 0 if _size(arrived) > before else failures + 1
        if failures == MAX_FAILURES:
            raise FaceSnapError(
                f"{part.title} cannot be downloaded ({reason}); check your network connection, then try again to "
                f"resume at {format_size(_size(arrived))} of {format_size(part.size)}."
            )
        if _size(arrived) < part.size:
            pause(WAIT, stopped)


def _fetch(part: Part, arrived: Path, progress: Callable[[int], None], stopped: Callable[[], bool]) -> None:
    """Append the bytes from one connection to the data received so far."""
    have = _size(arrived)
    with open_url(part, have, stopped) as response:
        resumes = _check_response(response, part, have)
        if resumes:
            _receive(part, response, arrived, have, progress, stopped)
            return
        # The response starts at the first byte and may not be the file at all, so the received data is kept.
        fresh = arrived if not have and _declared_length(response) else arrived.with_name(f"{arrived.name}.new")
        try:
            received = _receive(part, response, fresh, 0, progress, stopped)
            if fresh != arrived and received == part.size:
                fresh.replace(arrived)
        finally:
            if fresh != arrived:
                fresh.unlink(missing_ok=True)


def _receive(
    part: Part,
    response: Any,
    path: Path,
    start: int,
    progress: Callable[[int], None],
    stopped: Callable[[], bool],
) -> int:
    """Write a response to a file from byte `start` on, and return the file's size."""
    have = start
    blocks = response.iter_content(BLOCK)
    with path.open("ab" if start else "wb", buffering=0) as file:
        progress(have)
        while (block := read_block(response, blocks, stopped)) and have + len(block) <= part.size:
            file.write(block)
            have += len(block)
            progress(have)
            if stopped():
                raise StopRequested
    if block:
        if not start:
            path.unlink()
        raise FaceSnapError(_unexpected_file(part, f"more than {part.size} bytes"))
    return have


def _check_response(response: Any, part: Part, have: int) -> bool:
    """Return whether the response continues the received data, rather than starting at the file's first byte.

    Raises:
        FaceSnapError: the server refuses, or has a different file. Received data is kept.
        ConnectionLost: the request failed, and a retry may succeed.
    """
    status = response.status_code
    if status in (408, 416, 425, 429) or status >= 500:
        raise ConnectionLost(f"HTTP status {status}")
    if status in (401, 403):
        raise FaceSnapError(
            f"{part.title} requires a login (HTTP status {status}); {part.how_to_get} by hand from {part.page}."
        )
    if status in (404, 410):
        raise FaceSnapError(
            f"{part.title} is no longer at its address (HTTP status {status}); look for it at {part.page}."
        )
    if status not in (200, 206):
        raise FaceSnapError(f"The server for {part.title} sent HTTP status {status}; see {part.page}.")
    if _TEXT.match(response.headers.get("Content-Type", "")):
        raise FaceSnapError(
            f"A web page or an error message was received instead of {part.title}; log in to your network or proxy, "
            "then try again to resume."
        )
    if status == 206:
        span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if total != str(part.size) and total.isdecimal():
            raise FaceSnapError(_unexpected_file(part, f"{total} bytes instead of {part.size}"))
        if not span.startswith(f"{have}-"):
            raise ConnectionLost("the server sent a different range")
        return have > 0
    length = _declared_length(response)
    if length not in (None, part.size):
        raise FaceSnapError(_unexpected_file(part, f"{length} bytes instead of {part.size}"))
    return False


def _declared_length(response: Any) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and len(length) < 20 else None


def _unexpected_file(part: Part, difference: str) -> str:
    return (
        f"The server's file for {part.title} is not the expected one ({difference}) and was not kept; see {part.page} "
        "for a new version."
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@dataclass
class Job:
    """A download of one or more parts in a background thread, with its progress.

    Args:
        name: of the part or of the bundle.
        parts: those that are downloaded, one after the other.
        done: bytes of all parts in total.
        message: the outcome, empty while running.
    """

    name: str
    parts: tuple[Part, ...]
    done: int = 0
    state: Literal["running", "done", "stopped", "failed"] = "running"
    message: str = ""
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def title(self) -> str:
        """What is downloaded, in a few words."""
        return title_of(self.parts)

    @property
    def size(self) -> int:
        """Bytes of all parts in total."""
        return sum(part.size for part in self.parts)


_jobs: dict[str, Job] = {}
_lock = threading.Lock()


def start(name: str, files: ModelFiles) -> Job:
    """Start downloading a part or bundle by its name in the catalogue, or return the running download.

    Raises:
        FaceSnapError: there is no such part or bundle, it can only be downloaded by hand, it already exists, or one of
            its parts is being downloaded already.
    """
    parts = parts_to_download(name, files)
    with _lock:
        running = _jobs.get(name)
        if running is not None and running.state == "running":
            return running
        for other in _jobs.values():
            if other.state == "running" and (both := set(parts) & set(other.parts)):
                raise FaceSnapError(
                    f"{min(part.title for part in both)} is already being downloaded; wait until it has finished."
                )
        job = _jobs[name] = Job(name, parts)
        threading.Thread(
            target=_run, args=(job, files.folder), name=f"FaceSnap download of {name}", daemon=True
        ).start()
        return job


def _run(job: Job, folder: Path) -> None:
    try:
        paths = download_all(job.parts, folder, lambda done: setattr(job, "done", done), job.stop.is_set)
        target = paths[0] if len(paths) == 1 else folder
        job.message, job.state = f"{job.title}: downloaded to {target}.", "done"
    except Stopped as error:
        job.message, job.state = str(error), "stopped"
    except FaceSnapError as error:
        job.message, job.state = str(error), "failed"
    except Exception as error:
        job.message, job.state = f"{job.title} cannot be downloaded: {error!r}.", "failed"
        raise


def download_all(
    parts: Sequence[Part],
    folder: Path,
    progress: Callable[[int], None] = lambda done: None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Path]:
    """Download parts one after the other; see `download`.

    Args:
        progress: called with the number of bytes received so far, for all parts in total.
    """
    needed = sum(part.size - _size(_arrived(part, folder)) for part in parts)
    _check_space(folder, needed)
    paths, before = [], 0
    for part in parts:
        paths.append(download(part, folder, partial(_offset, progress, before), stopped))
        before += part.size
        progress(before)
    return paths


def _offset(progress: Callable[[int], None], before: int, done: int) -> None:
    progress(before + done)


def parts_to_download(name: str, files: ModelFiles) -> tuple[Part, ...]:
    """Return the part of this name, or the parts of the bundle, without those whose files already exist.

    Raises:
        FaceSnapError: as in `start`.
    """
    parts = downloadable(name)
    existing = {part: path for part in parts if (path := existing_file(part, files))}
    if len(existing) == len(parts):
        part, path = next(iter(existing.items()))
        title = part.title if len(parts) == 1 else name
        raise FaceSnapError(f"{title} already exists: {path}.")
    return tuple([part for part in parts if part not in existing])


def jobs() -> list[Job]:
    """Return the last download of each part that was started in this process."""
    with _lock:
        return list(_jobs.values())
