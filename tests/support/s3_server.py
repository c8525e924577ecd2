"""A local S3 server that can fail."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

SECRET = "not-a-real-secret"
BUCKET = "facesnap-tests"


@dataclass
class S3Server:
    """The server's state.

    fail: number of requests that it will still answer with 503. fail_every: it does so for each n-th request, unless 0.
    requests: all requests.
    """

    fail: int = 0
    fail_every: int = 0
    requests: list[str] = field(default_factory=list)


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run moto's server in a thread, and set the environment so that fsspec uses it inside the `with` block."""
    import moto.backends
    import s3fs
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class QuietHandler(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            pass

    server = S3Server()
    backend = DomainDispatcherApplication(create_backend_app)

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        server.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if server.fail or (server.fail_every and len(server.requests) % server.fail_every == 0):
            server.fail = max(0, server.fail - 1)
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return []
        return backend(environ, start_response)

    http = make_server("127.0.0.1", 0, app, threaded=True, request_handler=QuietHandler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{http.server_port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # the attempts of our own are tested
    }
    try:
        with patch.dict(os.environ, settings):
            s3fs.S3FileSystem.clear_instance_cache()  # of an earlier server
            moto.backends.get_backend("s3").reset()
            s3fs.S3FileSystem().mkdir(BUCKET)
            yield server
    finally:
        http.shutdown()
        thread.join()
