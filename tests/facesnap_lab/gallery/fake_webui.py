"""A local HTTP server that answers like a WebUI with FaceSnap, for the tests of the gallery."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

from PIL import Image

from facesnap_lab.gallery.client import Client

INFOTEXT = "a prompt\nNegative prompt: none\nSteps: 2, Size: 8x8, Version: v1.10.1"
AUTH = f"Basic {base64.b64encode(b'ada:secret').decode()}"


@dataclass
class WebUI:
    """What the server answers, and the jobs that it has received (`jobs`)."""

    url: str = ""
    jobs: list[dict[str, Any]] = field(default_factory=list)
    login: bool = False
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)  # by route: status, and content for JSON or text
    fails_at: int | None = None  # number of the job, from 1, that is refused
    refusal: Any = None

    def __post_init__(self) -> None:
        self.answers |= {
            "/facesnap/version": (200, {"version": "1.2.3"}),
            "/facesnap/models": (200, {"facesnap": ["InstantID"], "missing": {}}),
            "/sdapi/v1/options": (200, {"sd_model_checkpoint": "xl | one.safetensors"}),
        }

    def client(self, auth: str = "") -> Client:
        return Client(self.url, auth)

    @property
    def pictures(self) -> list[dict[str, Any]]:
        """The jobs without the ones that only load the models."""
        return [job for job in self.jobs if job["steps"] > 1]

    def answer_job(self, job: dict[str, Any]) -> tuple[int, Any]:
        self.jobs.append(job)
        if self.fails_at == len(self.jobs):
            return 500, self.refusal
        return 200, {"images": [encoded(colour_of(job))], "info": json.dumps({"infotexts": [INFOTEXT]})}


def colour_of(job: dict[str, Any]) -> tuple[int, int, int]:
    """The colour of a job's image, which differs between seeds."""
    return job["seed"] % 256, 128, 64


def encoded(colour: tuple[int, int, int]) -> str:
    buffer = BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def serve() -> Iterator[WebUI]:
    """Serve on a free local port."""
    webui = WebUI()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(webui.answers.get(self.path, (404, {"detail": "Not Found"})))

        def do_POST(self) -> None:
            job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send(webui.answers.get(self.path) or webui.answer_job(job))

        def send(self, answer: tuple[int, Any]) -> None:
            if webui.login and self.headers.get("Authorization") != AUTH:
                answer = 401, {"detail": "Incorrect username or password"}
            status, content = answer
            body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    webui.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield webui
    finally:
        server.shutdown()
        server.server_close()
