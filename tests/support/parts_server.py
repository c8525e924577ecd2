"""A local HTTP server with one file that simulates faults of servers and connections."""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from facesnap_ext.weights.catalogue import Part


@dataclass
class Server:
    """The served content, the faults to simulate, and the `Range` headers of all requests so far (`requested`)."""

    content: bytes
    url: str = ""
    ranges: bool = True
    breaks_after: int | None = None  # bytes sent per connection
    length: int | None = None  # declared length of the file, if not the true one
    sends_length: bool = True  # whether to send Content-Length
    status: int | None = None
    page: bytes | None = None  # what a proxy sends instead of everything
    page_type: str | None = "text/html; charset=utf-8"
    location: str | None = None  # where everything is redirected to
    silent_after: int | None = None  # bytes after which nothing more is sent; -1: not even a status
    drip: float = 0  # seconds between two bytes
    hold: threading.Event | None = None  # to wait for after the first half
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


@contextmanager
def serve(content: bytes, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server(content)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            requested = self.headers.get("Range")
            server.requested.append(requested)
            if server.silent_after == -1:
                server.closing.wait(20)
                return
            if server.location is not None:
                self.send_response(302)
                self.send_header("Location", server.location)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if server.page is not None:
                self.send_response(200)
                if server.page_type:
                    self.send_header("Content-Type", server.page_type)
                if server.sends_length:
                    self.send_header("Content-Length", str(len(server.page)))
                self.end_headers()
                self.wfile.write(server.page)
                self.close_connection = True
                return
            start = 0
            if server.ranges and requested:
                start = int(requested.removeprefix("bytes=").removesuffix("-"))
            total = len(server.content) if server.length is None else server.length
            self.send_response(server.status or (206 if start else 200))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            if server.sends_length:
                self.send_header("Content-Length", str(total - start))
            self.end_headers()
            body = server.content[start:]
            if server.breaks_after is not None:
                body = body[: server.breaks_after]
            if server.drip:
                with suppress(OSError):
                    for byte in body:
                        self.wfile.write(bytes([byte]))
                        if server.closing.wait(server.drip):
                            break
                self.close_connection = True
                return
            if server.silent_after is not None:
                self.wfile.write(body[: server.silent_after])
                server.closing.wait(20)
                self.close_connection = True
                return
            half = len(body) // 2
            self.wfile.write(body[:half])
            self.wfile.flush()
            if server.hold:
                server.hold.wait(20)
            self.wfile.write(body[half:])
            self.close_connection = True

        def log_message(self, *args):
            pass

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
