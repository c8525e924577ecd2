"""Downloads of the parts whose hash is known, when somebody asks for one: resumed, checked, and whole or not there."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import sha256
from facesnap_ext.weights.catalogue import Part, downloadable
from facesnap_ext.weights.inventory import is_there, readable
from facesnap_ext.weights.places import ModelFiles

BLOCK = 2**16  # bytes
TIMEOUT = (20, 60)  # seconds: to connect, and between two blocks
TRIES = 3  # connections in a row that bring nothing
WAIT = 2.0  # seconds between two connections


class Stopped(FaceSnapError):
    """The user stopped a download."""


class _Broken(Exception):
    """A connection that ended early; another one may go on."""


def download(
    part: Part,
    folder: Path,
    progress: Callable[[int], None] = lambda done: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Path:
    """Download a part into the model folder.

    What has arrived is kept beside the target as `.NAME.part` when the download is interrupted, and the next call goes
    on from there (an HTTP range). The file gets its name when its SHA-256 is the known one.

    Args:
        part: one with `url`, `size` and `sha256`.
        progress: is told how many of `part.size` bytes are there.
        stopped: asked after each block whether to stop.

    Returns:
        The file's path; one that is already there and has the hash is left as it is.

    Raises:
        FaceSnapError: the server cannot be reached or has another file, another process is downloading it into the
            same folder, the disk is full, or the hash is wrong, in which case nothing of the file is left.
    """
    target = folder / part.into
    if target.exists():
        if sha256(target) != part.sha256:
            raise FaceSnapError(f"There is another file {target} already: move it away, then download again.")
        return target
    arrived = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(part, target.with_name(f".{target.name}.lock")):
            missing = part.size - _size(arrived)
            if (free := shutil.disk_usage(target.parent).free) < missing:
                raise FaceSnapError(
                    f"The disk of {folder} has {readable(free)} left, and {readable(missing)} are needed: make room."
                )
            _fetch_all(part, arrived, progress, stopped)
            if (found := sha256(arrived)) != part.sha256:
                arrived.unlink()
                raise FaceSnapError(
                    f"What {part.page} has for {target.name} is another file than the known one (SHA-256 {found[:12]}… "
                    f"in place of {part.sha256[:12]}…): it was removed; try again, and if it is the same look there "
                    "whether a new version was published."
                )
            arrived.replace(target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise FaceSnapError(
                f"The disk of {folder} is full: make room, then download {part.title} again to go on."
            ) from error
        raise FaceSnapError(f"{target} cannot be written ({error.strerror or error}).") from error
    return target


@contextmanager
def _alone(part: Part, lock: Path) -> Iterator[None]:
    """Keep other processes, such as a second WebUI on the same folder, from writing the same file meanwhile."""
    from filelock import FileLock, Timeout  # torch needs it

    guard = FileLock(lock, timeout=0)
    try:
        guard.acquire()
    except Timeout as error:
        raise FaceSnapError(
            f"Another FaceSnap is downloading {part.title} into this folder: wait for it, or {part.get} by hand."
        ) from error
    except (NotImplementedError, OSError):
        pass  # a folder of another computer that knows no locks
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes it itself
            lock.unlink()
        guard.release()


def _fetch_all(part: Part, arrived: Path, progress: Callable[[int], None], stopped: Callable[[], bool]) -> None:
    """Connect until the whole file is there, as long as each few connections bring something."""
    failures = 0
    while (before := _size(arrived)) < part.size:
        try:
            _fetch(part, arrived, progress, stopped)
            reason = "the connection ended early"
        except _Broken as error:
            reason = str(error)
        failures = 0 if _size(arrived) > before else failures + 1
        if failures == TRIES:
            raise FaceSnapError(
                f"{part.title} cannot be downloaded ({reason}): check that this computer is online, then try again; "
                f"{readable(_size(arrived))} of {readable(part.size)} are kept."
            )
        if _size(arrived) < part.size:
            time.sleep(WAIT)


def _fetch(part: Part, arrived: Path, progress: Callable[[int], None], stopped: Callable[[], bool]) -> None:
    """One connection's worth, added to what has arrived."""
    try:
        import requests
    except ImportError as error:
        raise FaceSnapError(f"Downloads need the package requests ({error}): install it.") from error
    have = _size(arrived)
    headers = {"Accept-Encoding": "identity"}  # compressed bytes could not be counted
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        with requests.get(part.url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            have = _check(response, part, have)
            blocks = response.iter_content(BLOCK)
            with arrived.open("ab" if have else "wb", buffering=0) as file:
                progress(have)
                while (block := _next(blocks)) and have + len(block) <= part.size:
                    file.write(block)
                    have += len(block)
                    progress(have)
                    if stopped():
                        raise Stopped(
                            f"{part.title}: stopped at {readable(have)} of {readable(part.size)}, which are kept."
                        )
            if block:
                arrived.unlink()
                raise FaceSnapError(_another(part, f"more than {part.size} bytes"))
    except requests.RequestException as error:
        raise _Broken(type(error).__name__) from error


def _next(blocks: Any) -> bytes:
    """The next block of an answer, empty at its end."""
    from urllib3.exceptions import HTTPError

    try:
        return next(blocks, b"")
    except HTTPError as error:  # requests lets some of them through
        raise _Broken(type(error).__name__) from error


def _check(response: Any, part: Part, have: int) -> int:
    """How many of the bytes that have arrived the answer goes on from. An answer that is not the file leaves those as
    they are: a network that wants a login first answers with a page of its own."""
    status = response.status_code
    if status == 206:
        span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if total.isdigit() and int(total) != part.size:
            raise FaceSnapError(_another(part, f"{total} bytes in place of {part.size}"))
        if not span.startswith(f"{have}-"):
            raise _Broken("the server answered with another range")
        return have
    if status in (408, 416, 425, 429) or status >= 500:
        raise _Broken(f"the server answered {status}")
    if status in (401, 403):
        raise FaceSnapError(f"{part.page} wants a login for {part.title} ({status}): {part.get} there by hand.")
    if status in (404, 410):
        raise FaceSnapError(f"{part.title} is no longer where it was ({status}): look for it at {part.page}.")
    if status != 200:
        raise FaceSnapError(f"The server of {part.title} answered {status}: look at {part.page}.")
    if response.headers.get("Content-Type", "").startswith("text/"):
        raise FaceSnapError(
            f"In place of {part.title} a web page came: log in to the network or its proxy, then try again; what had "
            "arrived is kept."
        )
    length = response.headers.get("Content-Length", str(part.size))
    if length != str(part.size):
        raise FaceSnapError(_another(part, f"{length} bytes in place of {part.size}"))
    return 0


def _another(part: Part, how: str) -> str:
    return f"What {part.page} has for {part.title} is another file than the known one ({how}): nothing of it was kept."


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@dataclass
class Job:
    """A download in a thread of its own, for whoever looks at it meanwhile."""

    part: Part
    done: int = 0  # bytes
    state: str = "running"  # then "done", "stopped" or "failed"
    message: str = ""  # what it came to
    stop: threading.Event = field(default_factory=threading.Event)


_jobs: dict[str, Job] = {}
_lock = threading.Lock()


def start(name: str, files: ModelFiles) -> Job:
    """Start the download of a part by its name in the catalogue, or find the one that is running.

    Raises:
        FaceSnapError: there is no such part, it is to be had by hand only, or it is there already.
    """
    part = needed(name, files)

    def run() -> None:
        try:
            path = download(part, files.folder, lambda done: setattr(job, "done", done), job.stop.is_set)
            job.message, job.state = f"{part.title} is there: {path}.", "done"
        except Stopped as error:
            job.message, job.state = str(error), "stopped"
        except FaceSnapError as error:
            job.message, job.state = str(error), "failed"
        except Exception as error:
            job.message, job.state = f"{part.title} cannot be downloaded: {error!r}.", "failed"
            raise

    with _lock:
        job = _jobs.get(name)
        if job is None or job.state != "running":
            job = _jobs[name] = Job(part)
            threading.Thread(target=run, name=f"FaceSnap download of {name}", daemon=True).start()
        return job


def needed(name: str, files: ModelFiles) -> Part:
    """The part of this name, which is to be downloaded.

    Raises:
        FaceSnapError: as `start` does.
    """
    part = downloadable(name)
    if path := is_there(part, files):
        raise FaceSnapError(f"{part.title} is there already: {path}.")
    return part


def jobs() -> list[Job]:
    """The last download of each part that was asked for since the process began."""
    with _lock:
        return list(_jobs.values())
