"""HTTP routes under /facesnap/, next to the WebUI's own API, with information that a client needs before a job.

    GET  /facesnap/version    {"version": "…", "webui": `hosts.fork.Fork` as an object}
    GET  /facesnap/schema     JSON Schema of one person's dictionary in a job's `alwayson_scripts.FaceSnap.args`
    GET  /facesnap/models     installed model files by name; "missing": where to put each missing file; "parts":
                              everything known about each part (`model_list.Role`); "downloads": their progress
    POST /facesnap/models/get   {"part": "<name in the catalogue>"} → {"part", "done", "size", "state", "message"}
    POST /facesnap/models/stop  likewise
    POST /facesnap/detect     {"photos": ["<base64>", …]}
                              → {"photos": [{"width", "height",
                                             "faces": [{"box": [l, t, r, b], "score", "padded", "turn"}]}]}
    POST /facesnap/landmarks  {"references", "face_index", "driving", "driving_face_index", "width", "height"}, all
                              optional; "reference" is a single photo instead of "references"
                              → {"rig", "points": [72][2] or null, "place": {"x", "y", "size"} or null,
                               "notes": ["<sentence>", …]}

Boxes are in pixels of the upright photo. Faces are ordered by size, the largest first. `rig` is for `facesnapAttach` in
javascript/facesnap_canvas.js (see `poses.for_browser`). `points` are fractions of the width and height of the output
image if these are given, otherwise of the driving photo. Photos are base64, plain or as data URLs, never paths or URLs.

An error is answered with `{"detail": "<one sentence>"}` by `add_routes`: 400 for a malformed request, 401 without the
credentials of the host's --api-auth or a session of the page's login, 403 for a page on a different site, 413 for a
request that is too large, 415 for one that is not JSON, 422 for unusable photos or model files, 500 for an internal
error, 503 while too many other requests are being answered.
"""

# No postponed annotations here, because FastAPI evaluates the endpoints' annotations, and their types are imported only
# when needed.

import base64
import binascii
import hmac
import json
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from facesnap_ext import __version__, photos
from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts import fork
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.identity.predictors import predictor_title
from facesnap_ext.landmarks.poses import for_browser, placement
from facesnap_ext.photos import Photo, PhotoReader
from facesnap_ext.settings.schema import IMAGE, unit_schema
from facesnap_ext.weights import download
from facesnap_ext.weights.model_files import MISSING_MESSAGES, ModelFiles
from facesnap_ext.weights.model_list import list_models, to_json

MAX_BODY = 32 * 2**20  # maximum bytes of a request
MAX_REQUESTS = 8  # maximum number of requests answered or waiting at the same time
MAX_PHOTOS = 16  # maximum number of photos in one request
MAX_SIDE = 16384  # maximum side of an output image in pixels
MAX_FACE_INDEX = 999

log = logging.getLogger("facesnap")

Values = dict[str, Any]
"""A JSON object: the body of a request or response."""


class RequestError(Exception):
    """A request that cannot be answered, with an HTTP status and one sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


def add_routes(
    app: Any,
    find_models: Callable[[], ModelFiles],
    engine: Callable[[], Engine],
    api_auth: str | None = None,
    allowed_origins: Callable[[str], bool] = lambda origin: False,
) -> None:
    """Add the routes to a host's FastAPI app.

    Args:
        engine: returns the engine of this process. It is called only for requests that need it.
        api_auth: the host's `cmd_opts.api_auth`: "user:password", several of them separated by commas. See `admitted`.
        allowed_origins: returns whether pages of an origin, such as "https://example.org", may use the host's API.
    """
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from starlette.concurrency import run_in_threadpool

    places = threading.BoundedSemaphore(MAX_REQUESTS)

    async def answer(request: Request, compute: Callable[[Values], Values]) -> JSONResponse:
        headers = {}
        try:
            if not admitted(request, api_auth):
                headers = {"WWW-Authenticate": "Basic"} if api_auth else {}
                advice = (
                    "or start the WebUI with --api-auth USER:PASSWORD and send these with HTTP Basic authentication"
                )
                raise RequestError(401, f"Log in to the page, {advice}.")
            if is_foreign(request) and not allowed_origins(request.headers["origin"]):
                raise RequestError(
                    403, "Pages on other sites may not use this route; start the WebUI with --cors-allow-origins."
                )
            if request.method != "POST":
                return JSONResponse(await run_in_threadpool(compute, {}))
            # forms and scripts on other sites cannot send this type unless the host allows it
            if not _is_json(request):
                raise RequestError(415, "This route requires the header Content-Type: application/json; add it.")
            if not places.acquire(blocking=False):  # each request may have `MAX_BODY` bytes
                headers = {"Retry-After": "10"}
                raise RequestError(503, f"FaceSnap is answering {MAX_REQUESTS} other requests; try again later.")
            try:
                # run in a thread, so that the event loop stays free for other requests
                return JSONResponse(await run_in_threadpool(compute, await _values(request)))
            finally:
                places.release()
        except RequestError as error:
            status, sentence = error.status, str(error)
        except FaceSnapError as error:
            status, sentence = 422, str(error)
        except Exception as error:
            log.exception("FaceSnap failed to answer %s", request.url.path)
            status = 500
            sentence = f"FaceSnap failed ({type(error).__name__}); please report it with the traceback in the console."
        return JSONResponse({"detail": sentence}, status, headers)

    def add(
        path: str,
        method: str,
        summary: str,
        compute: Callable[[Values], Values],
        schema: Values | None = None,
    ) -> None:
        async def endpoint(request: Request) -> JSONResponse:
            return await answer(request, compute)

        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        extra = {"openapi_extra": {"requestBody": body}} if schema else {}
        name = f"facesnap_{path.rsplit('/', 1)[1]}"
        app.add_api_route(path, endpoint, methods=[method], summary=summary, name=name, tags=["FaceSnap"], **extra)

    add("/facesnap/version", "GET", "Version of FaceSnap", lambda values: describe_versions())
    add("/facesnap/schema", "GET", "Settings of one person", lambda values: unit_schema())
    add("/facesnap/models", "GET", "Model files", lambda values: describe_models(find_models()))
    add("/facesnap/models/get", "POST", "Download a part", lambda values: get_part(find_models(), values), PART)
    add("/facesnap/models/stop", "POST", "Stop a download", stop_part, PART)
    add("/facesnap/detect", "POST", "Faces in photos", lambda values: detect(engine(), values), DETECT)
    add("/facesnap/landmarks", "POST", "Landmarks of a pose", lambda values: landmarks(engine(), values), LANDMARKS)


def describe_versions() -> Values:
    """FaceSnap's version, and the WebUI that it runs in."""
    return {"version": __version__, "webui": asdict(fork.current())}


def admitted(request: Any, api_auth: str | None) -> bool:
    """Whether a request may be answered: it has a session of the page's login or the credentials of --api-auth, or the
    host requires neither."""
    login = getattr(request.app, "auth", None)  # set on gradio's app; None without --gradio-auth
    if login and any(value in request.app.tokens for value in request.cookies.values()):
        return True
    return authorised(request.headers.get("authorization"), api_auth) if api_auth else not login


def authorised(header: str | None, api_auth: str | None) -> bool:
    """Whether an Authorization header matches the host's --api-auth, compared in constant time."""
    if not api_auth:
        return True
    scheme, _, encoded = (header or "").partition(" ")
    try:
        credentials = base64.b64decode(encoded.strip(), validate=True) if scheme.lower() == "basic" else b""
    except (binascii.Error, ValueError):
        credentials = b""
    # compare with every "user:password", so that the timing reveals nothing
    matches = [hmac.compare_digest(credentials, pair.encode()) for pair in api_auth.split(",") if ":" in pair]
    return any(matches)


def is_foreign(request: Any) -> bool:
    """Whether a browser sends the request from a page on a different site. Other clients send no Origin header."""
    origin = request.headers.get("origin")
    if origin is None:
        return False
    hosts = [request.headers.get(name, "").lower() for name in ("host", "x-forwarded-host")]
    return not origin.lower().startswith(("http://", "https://")) or origin.lower().partition("://")[2] not in hosts


def cors_origins(cmd_opts: Any) -> Callable[[str], bool]:
    """Whether the host's --cors-allow-origins or --cors-allow-origins-regex names an origin."""
    origins = (getattr(cmd_opts, "cors_allow_origins", None) or "").split(",")
    pattern = getattr(cmd_opts, "cors_allow_origins_regex", None)
    return lambda origin: origin in origins or "*" in origins or bool(pattern and re.fullmatch(pattern, origin))


def describe_models(files: ModelFiles) -> Values:
    """The model files by name, missing and skipped ones, the Landmark Predictor, and the downloads."""
    paths = {part: getattr(files, part) for part in MISSING_MESSAGES if part != "facesnap"}
    names = {part: path and path.name for part, path in paths.items()}
    return {
        "facesnap": sorted(files.facesnap),
        **names,
        "missing": files.missing(),
        "passed_over": files.passed_over,
        "landmarks": predictor_title(files),
        "parts": to_json(list_models(files)),
        "downloads": [_job(job) for job in download.jobs()],
    }


def get_part(files: ModelFiles, values: Values) -> Values:
    """Start downloading a part, and return the progress."""
    return _job(download.start(_part_name(values), files))


def stop_part(values: Values) -> Values:
    """Stop downloading a part, and return the progress. The data received so far is kept."""
    name = _part_name(values)
    for job in download.jobs():
        if job.name == name:
            job.stop.set()
            return _job(job)
    raise RequestError(400, "No download of a part with this name has been started.")


def detect(engine: Engine, values: Values) -> Values:
    """The faces in each photo."""
    _check_names(values, DETECT)
    images = _images(values, "photos", 1)
    with photos.one_request:
        return _detect(engine.encoders(engine.files()), images)


def _detect(encoders: Encoders, images: list[Any]) -> Values:
    results, reader = [], PhotoReader()
    for number, text in enumerate(images, 1):
        photo = _photo(text, f"Photo {number}", reader)
        faces = [
            {"box": face.box.tolist(), "score": float(face.score), "padded": face.padded, "turn": face.turn}
            for face in encoders.faces(photo)
        ]
        height, width = photo.pixels.shape[:2]
        results.append({"width": width, "height": height, "faces": faces})
    return {"photos": results}


def landmarks(engine: Engine, values: Values) -> Values:
    """The rig of a person, whose shape all reference photos determine, and the landmarks of a photo's pose."""
    _check_names(values, LANDMARKS)
    if ("width" in values) != ("height" in values):
        raise RequestError(400, "FaceSnap's width and height must be given together; send both or neither.")
    size = None
    if "width" in values:
        size = _integer(values, "width", 1, MAX_SIDE), _integer(values, "height", 1, MAX_SIDE)
    face_index, driving_face_index = (
        _integer({name: 0, **values}, name, 0, MAX_FACE_INDEX) for name in ("face_index", "driving_face_index")
    )
    images = _reference_images(values)
    with photos.one_request:
        reader = PhotoReader()
        references = [
            _photo(image, f"Reference photo {number}" if len(images) > 1 else "Reference photo", reader)
            for number, image in enumerate(images, 1)
        ]
        driving = _photo(values["driving"], "Driving photo", reader) if values.get("driving") else None
        preview = engine.preview(references, driving, size, face_index, driving_face_index)
    predicted, points, place = preview.landmarks, None, None
    if predicted is not None:
        points = (predicted.points / (predicted.width, predicted.height)).tolist()
        place = dict(zip(("x", "y", "size"), placement(predicted)))
    return {"rig": for_browser(preview.rig), "points": points, "place": place, "notes": list(preview.notes)}


def _reference_images(values: Values) -> list[Any]:
    """The reference photos as they were sent: `references`, or the single `reference`."""
    if "references" not in values:
        return [values["reference"]] if values.get("reference") else []
    if values.get("reference"):
        raise RequestError(400, "FaceSnap's reference and references are the same setting; send only one of them.")
    return _images(values, "references", 0)


def _images(values: Values, name: str, least: int) -> list[Any]:
    images = values.get(name)
    if not isinstance(images, list) or not least <= len(images) <= MAX_PHOTOS:
        raise RequestError(400, f"FaceSnap's {name} must be a list of {least} to {MAX_PHOTOS} images in base64.")
    return images


_SIDE = {"type": "integer", "minimum": 1, "maximum": MAX_SIDE}
_FACE_INDEX = {
    "type": "integer",
    "minimum": 0,
    "default": 0,
    "description": "index of the face by size; 0 is the largest",
}
DETECT = {
    "type": "object",
    "properties": {"photos": {"type": "array", "items": IMAGE, "minItems": 1, "maxItems": MAX_PHOTOS}},
    "required": ["photos"],
}
PART = {
    "type": "object",
    "properties": {"part": {"type": "string", "description": "name of the part in the catalogue"}},
    "required": ["part"],
}
LANDMARKS = {
    "type": "object",
    "properties": {
        "reference": IMAGE,
        "references": {"type": "array", "items": IMAGE, "maxItems": MAX_PHOTOS},
        "face_index": _FACE_INDEX,
        "driving": IMAGE,
        "driving_face_index": _FACE_INDEX,
        "width": _SIDE,
        "height": _SIDE,
    },
}


def _part_name(values: Values) -> str:
    _check_names(values, PART)
    if not isinstance(name := values.get("part"), str):
        raise RequestError(400, "FaceSnap's part must be a string, the name of a part in the catalogue.")
    return name


def _job(job: download.Job) -> Values:
    return {
        "part": job.name,
        "done": job.done,
        "size": job.size,
        "state": job.state,
        "message": job.message,
    }


def _is_json(request: Any) -> bool:
    return request.headers.get("content-type", "").split(";")[0].strip().lower() == "application/json"


async def _values(request: Any) -> Values:
    """The JSON object in a request. Reading stops at `MAX_BODY`."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise RequestError(413, f"The request is larger than {MAX_BODY // 2**20} MB; send smaller images.")
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise RequestError(400, "The request is not a JSON object; /docs describes the requests to FaceSnap's routes.")
    return values


def _check_names(values: Values, schema: Values) -> None:
    known = schema["properties"]
    if unknown := sorted(set(values) - set(known)):
        raise RequestError(400, f"This route has no parameter {unknown[0]!r}; its parameters are {', '.join(known)}.")


def _photo(text: Any, name: str, reader: PhotoReader) -> Photo:
    if not isinstance(text, str):
        raise RequestError(400, f"{name} is not text; send the contents of an image file in base64.")
    return reader.read(text, name)


def _integer(values: Values, name: str, low: int, high: int) -> int:
    value = values[name]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(400, f"FaceSnap's {name} is {value!r}; use an integer from {low} to {high}.")
    return value
