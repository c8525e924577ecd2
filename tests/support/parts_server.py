"""A local HTTP server with one file that simulates faults of servers and connections."""

from __future__ import annotations

import hashlib
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
    breaks_after: int | None = None  # bytes sent per connection
    length: int | None = None  # declared length of the file, if not the true one
    sends_length: bool = True  # whether to send Content-Length
    status: int | None = None
    page: bytes | None = None  # an HTML page that a proxy sends instead of everything
    hold: threading.Event | None = None  # the event to wait for after the first half
    requested: list[str | None] = field(default_factory=list)

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
def serve(content: bytes) -> Iterator[Server]:
    server = Server(content)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            requested = self.headers.get("Range")
            server.requested.append(requested)
            if server.page is not None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
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
        server.url = f"http://127.0.0.1:{http.server_port}/thing.bin"
        thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        if server.hold:
            server.hold.set()
        http.shutdown()
        thread.join()
