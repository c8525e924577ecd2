"""Connections for downloads: they can be stopped at any time, and are never redirected from HTTPS to plain HTTP."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.catalogue import Part

T = TypeVar("T")
BLOCK = 2**16  # bytes
TIMEOUT = (20, 60)  # maximum seconds to connect, and between two blocks
MAX_REDIRECTS = 10
POLL = 0.1  # seconds between checks whether the user has stopped the download
REDIRECTS = (301, 302, 303, 307, 308)


class StopRequested(Exception):
    """The user stopped a download."""


class ConnectionLost(Exception):
    """A connection ended early; the download can be resumed."""


@contextmanager
def open_url(part: Part, start: int, stopped: Callable[[], bool]) -> Iterator[Any]:
    """Yield the server's response to a request for the file from byte `start` on, after all redirects.

    Raises:
        StopRequested: `stopped` returned True.
        ConnectionLost: the connection failed, and a retry may succeed.
        FaceSnapError: the server redirects to an unusable address.
    """
    try:
        import requests
    except ImportError as error:
        raise FaceSnapError(f"Downloads require the Python package requests ({error}); install it.") from error
    headers = {"Accept-Encoding": "identity"}  # the bytes of a compressed response could not be counted
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.Session() as session:
        # requests would read the entire body of a redirect, and follow redirects to any address
        session.get_redirect_target = lambda resp: None  # type: ignore[method-assign]
        url = part.url
        for _ in range(MAX_REDIRECTS):

            def get(url: str = url) -> Any:
                return session.get(url, headers=headers, stream=True, timeout=TIMEOUT)

            response = _run_stoppable(get, stopped, _hang_up)
            if response.status_code not in REDIRECTS:
                break
            url = _redirect_target(part, url, response.headers.get("Location", ""))
            _hang_up(response)
        else:
            raise FaceSnapError(f"The server for {part.title} redirects endlessly; see {part.page}.")
        try:
            yield response
        finally:
            _hang_up(response)


def read_block(response: Any, blocks: Iterator[bytes], stopped: Callable[[], bool]) -> bytes:
    """Return the next block of a response, or an empty one at the end.

    Raises:
        StopRequested, ConnectionLost: as in `open_url`.
    """
    try:
        return _run_stoppable(lambda: next(blocks, b""), stopped)
    except StopRequested:
        _hang_up(response)
        raise


def pause(seconds: float, stopped: Callable[[], bool]) -> None:
    """Wait, unless the user stops the download.

    Raises:
        StopRequested: `stopped` returned True.
    """
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if stopped():
            raise StopRequested
        time.sleep(min(POLL, left))


def _redirect_target(part: Part, url: str, location: str) -> str:
    try:
        target = urljoin(url, location)
        scheme, host = urlsplit(target).scheme, urlsplit(target).hostname or ""
    except ValueError:
        scheme = host = ""
    if not location or scheme not in ("http", "https") or not host:
        raise FaceSnapError(
            f"The server for {part.title} redirects to an unusable address; {part.how_to_get} by hand from {part.page}."
        )
    if scheme == "http" and url.startswith("https:"):
        raise FaceSnapError(
            f"The server for {part.title} redirects to an unencrypted address (http://{host}), which FaceSnap does not "
            f"follow; log in to your network or proxy and try again, or {part.how_to_get} by hand from {part.page}."
        )
    return target


def _run_stoppable(
    call: Callable[[], T], stopped: Callable[[], bool], discard: Callable[[T], None] = lambda result: None
) -> T:
    """Return the result of a call that may block for a long time. If the user stops the download, the call is
    abandoned.

    Args:
        discard: receives the result of an abandoned call.

    Raises:
        StopRequested: `stopped` returned True.
        ConnectionLost: the network failed.
    """
    outcomes: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    abandoned = threading.Event()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:  # the calling thread raises it
            outcomes.put((None, error))
            return
        outcomes.put((result, None))
        if abandoned.is_set():
            discard(result)

    threading.Thread(target=run, name="FaceSnap connection", daemon=True).start()
    while True:
        with suppress(queue.Empty):
            result, error = outcomes.get(timeout=POLL)
            if error is not None:
                raise _network_error(error) from error
            return result  # type: ignore[return-value]
        if stopped():
            abandoned.set()
            raise StopRequested


def _network_error(error: BaseException) -> BaseException:
    """Return `ConnectionLost` for any error of the network libraries, and other errors unchanged."""
    from requests import RequestException
    from urllib3.exceptions import HTTPError

    # requests does not wrap all errors of urllib3, or any of the address parsers (UnicodeError is a ValueError)
    if isinstance(error, (RequestException, HTTPError, OSError, ValueError)):
        return ConnectionLost(type(error).__name__)
    return error


def _hang_up(response: Any) -> None:
    """Close a connection, even while another thread waits for its data; `close` would wait for that thread."""
    with suppress(OSError, ValueError, AttributeError):  # it is already closed
        connection = socket.socket(fileno=response.raw.fileno())
        try:
            connection.shutdown(socket.SHUT_RDWR)
        finally:
            connection.detach()
