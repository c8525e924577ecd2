"""A client of a running WebUI with FaceSnap, which needs nothing but Python."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

from facesnap_ext.errors import FaceSnapError, reason_of

MAX_ANSWER = 2**28  # maximum bytes of a response
TIMEOUT = 1800  # seconds; a slow GPU loads the checkpoint during the first job


@dataclass(frozen=True)
class Generated:
    """The first image of a job: base64, and its infotext."""

    image: str
    infotext: str


@dataclass(frozen=True)
class Client:
    """A WebUI at a URL. auth: "user:password" of its --api-auth; empty if it needs none."""

    url: str
    auth: str = ""
    _opener: OpenerDirector = field(default_factory=lambda: build_opener(ProxyHandler({})), compare=False)

    def facesnap_version(self) -> str:
        """The version of FaceSnap in this WebUI.

        Raises:
            FaceSnapError: nothing answers at the URL, or FaceSnap is not installed there.
        """
        missing = f"The WebUI at {self.url} has no FaceSnap; install the extension there and restart the WebUI."
        return str(_entry(self._request("/facesnap/version", missing), "version", missing))

    def model(self) -> str:
        """The name of the FaceSnap file that jobs use, such as "InstantID".

        Raises:
            FaceSnapError: a model file is missing, or there are several FaceSnap files to choose from.
        """
        found = self._request("/facesnap/models")
        if missing := _entry(found, "missing", self._unexpected):
            reasons = list(missing.values()) if isinstance(missing, dict) else [missing]
            raise FaceSnapError(f"FaceSnap in the WebUI at {self.url} is not ready: {reason_of(str(reasons[0]), 1000)}")
        names = list(_entry(found, "facesnap", self._unexpected))
        if len(names) != 1:
            raise FaceSnapError(
                f"FaceSnap in the WebUI at {self.url} has several FaceSnap files "
                f"({', '.join(names)}); leave only one in its model folder."
            )
        return str(names[0])

    def checkpoint(self) -> str:
        """The name of the loaded checkpoint."""
        options = self._request("/sdapi/v1/options", f"The WebUI at {self.url} has no API; start it with --api.")
        return str(_entry(options, "sd_model_checkpoint", self._unexpected))

    def generate(self, job: dict[str, Any]) -> Generated:
        """Run a txt2img job.

        Raises:
            FaceSnapError: the WebUI or FaceSnap refuses the job.
        """
        answer = self._request("/sdapi/v1/txt2img", body=job)
        try:
            return Generated(str(answer["images"][0]), str(json.loads(answer["info"])["infotexts"][0]))
        except (LookupError, TypeError, ValueError) as error:
            raise FaceSnapError(self._unexpected) from error

    @property
    def _unexpected(self) -> str:
        return f"The WebUI at {self.url} sent an unexpected answer; check the address and update the WebUI."

    def _request(self, path: str, missing: str = "", body: dict[str, Any] | None = None) -> Any:
        """The JSON answer of a route; `missing` is the error message if there is no such route."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        if self.auth:
            request.add_header("Authorization", f"Basic {base64.b64encode(self.auth.encode()).decode()}")
        try:
            with self._opener.open(request, timeout=TIMEOUT) as answer:
                return json.loads(answer.read(MAX_ANSWER))
        except HTTPError as error:
            raise FaceSnapError(self._refusal(error, missing)) from error
        except (URLError, HTTPException, OSError) as error:
            reason = reason_of(getattr(error, "reason", error))
            raise FaceSnapError(
                f"No WebUI answers at {self.url} ({reason}); start it with --api, or correct the address."
            ) from error
        except ValueError as error:  # not JSON
            raise FaceSnapError(missing or self._unexpected) from error

    def _refusal(self, error: HTTPError, missing: str) -> str:
        if error.code == 401:
            return f"The WebUI at {self.url} requires a login; pass --auth USER:PASSWORD, as in its --api-auth."
        if error.code == 404 and missing:
            return missing
        return _sentence(error) or f"The WebUI at {self.url} answered with HTTP status {error.code}; see its console."


def webui_version(infotext: str) -> str:
    """The version of the WebUI in an infotext; empty if the infotext has no version."""
    found = re.search(r"(?:^|, )Version: ([^,\n]+)", infotext)
    return found[1].strip() if found else ""


def _entry(answer: Any, name: str, message: str) -> Any:
    if not isinstance(answer, dict) or name not in answer:
        raise FaceSnapError(message)
    return answer[name]


def _sentence(error: HTTPError) -> str:
    """FaceSnap's sentence in an error response: A1111 puts it into "errors", Forge into "message"."""
    try:
        answer = json.loads(error.read(2**20))
    except (ValueError, OSError, HTTPException):
        return ""
    values = [answer.get(name) for name in ("errors", "message", "detail")] if isinstance(answer, dict) else []
    return next((reason_of(value, 1000) for value in values if isinstance(value, str) and value), "")
