"""A local HTTP server with one file that simulates faults of servers and connections."""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from facesnap_ext.weights.catalogue import Part


@dataclass
class Server:
    """The served content, the faults to simulate, and the `Range` headers of all requests so far (`requested`)."""

    content: bytes
    url: str = ""
    ranges: bool = True
    breaks_after: int | None = None  # maximum number of bytes sent per connection
    length: int | None = None  # declared length of the file, if not the true one
    sends_length: bool = True  # whether to send Content-Length
    status: int | None = None
    page: bytes | None = None  # body of every response, as a proxy may send it
    page_type: str | None = "text/html; charset=utf-8"
    location: str | None = None  # redirect target of all requests
    silent_after: int | None = None  # bytes sent before the server stops responding; -1: not even a status
    drip: float = 0  # seconds between two bytes
    hold: threading.Event | None = None  # event that the server waits for after the first half
    requested: list[str | None] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def part(self, content: bytes | None = None, **values) -> Part:
        """Return a catalogue part with the size and hash of this content, by default the server's."""
        content = self.content if content is None else content
        known = {
            "name": "thing",
            "role": "instantid",
            "title": "the thing",
            "licence": "MIT",
            "commercial": True,
            "page": "its page",
            "how_to_get": "download it",
            "target": "things/thing.bin",
            "size": len(content),
            "url": self.url,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        return Part(**{**known, **values})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Server

    def do_GET(self):
        faults = self.faults
        faults.requested.append(self.headers.get("Range"))
        if faults.silent_after == -1:
            faults.closing.wait(20)
        elif faults.location is not None:
            self.send(302, {"Location": faults.location, "Content-Length": 0})
        elif faults.page is not None:
            length = len(faults.page) if faults.sends_length else None
            self.send(200, {"Content-Type": faults.page_type, "Content-Length": length})
            self.wfile.write(faults.page)
        else:
            self.send_content()
        self.close_connection = True

    def send(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()

    def send_content(self):
        faults, requested = self.faults, self.headers.get("Range")
        start = int(requested.removeprefix("bytes=").removesuffix("-")) if faults.ranges and requested else 0
        total = len(faults.content) if faults.length is None else faults.length
        span = f"bytes {start}-{total - 1}/{total}" if start else None
        length = total - start if faults.sends_length else None
        self.send(faults.status or (206 if start else 200), {"Content-Range": span, "Content-Length": length})
        body = faults.content[start:][: faults.breaks_after]
        if faults.drip:
            for byte in body:
                self.wfile.write(bytes([byte]))
                if faults.closing.wait(faults.drip):
                    return
        elif faults.silent_after is not None:
            self.wfile.write(body[: faults.silent_after])
            faults.closing.wait(20)
        else:
            half = len(body) // 2
            self.wfile.write(body[:half])
            self.wfile.flush()
            if faults.hold:
                faults.hold.wait(20)
            self.wfile.write(body[half:])

    def log_message(self, *args):
        pass


@contextmanager
def serve(content: bytes, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server(content)

    class Handler(_Handler):
        faults = server

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.handle_error = lambda *args: None  # clients that hang up are part of the tests
        if tls:
            http.socket = tls.wrap_socket(http.socket, server_side=True)
        server.url = f"{'https' if tls else 'http'}://127.0.0.1:{http.server_port}/thing.bin"
        thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.closing.set()
        if server.hold:
            server.hold.set()
        http.shutdown()
        thread.join()
