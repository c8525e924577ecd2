"""HTTP routes under /facesnap/ beside those of the WebUI's own API: what a client may ask before a job.

    GET  /facesnap/version    {"version": "…"}
    GET  /facesnap/schema     what a job's `alwayson_scripts.FaceSnap.args` may hold for each person, in JSON Schema
    GET  /facesnap/models     which model files are there, by name, and where the missing ones go; "parts": everything
                              that is known of each (`model_list.Role`); "downloads": how far they are
    POST /facesnap/models/get   {"part": "<a name of the catalogue>"} → {"part", "done", "size", "state", "message"}
    POST /facesnap/models/stop  likewise
    POST /facesnap/detect     {"photos": ["<base64>", …]}
                              → {"photos": [{"width", "height", "faces": [{"box": [l, t, r, b], "score", "padded"}]}]}
    POST /facesnap/landmarks  {"reference", "face_index", "driving", "driving_face_index", "width", "height"}, all
                              optional
                              → {"rig", "points": [72][2] or null, "place": {"x", "y", "size"} or null}

Boxes are pixels of the upright photo, faces by size from the largest. `rig` is what `facesnapPose` of the page's script
wants (`poses.for_browser`). `points` are parts of width and height: of the output picture where these are given, else
of the driving photo. Photos are base64, plain or as data URLs, and never a path or an address. What goes wrong is
`{"detail": "<a sentence>"}`: 400 for a request that cannot be read, 401 without the host's --api-auth or the page's own
login, 413 for one too large, 422 for photos and files that do not do, 500 for what is FaceSnap's own fault.
"""

# no postponed annotations here: FastAPI reads those of the endpoints, whose types are imported at first use

import base64
import binascii
import hmac
import json
import logging
from collections.abc import Callable
from typing import Any

from facesnap_ext import __version__, photos
from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.poses import for_browser, placement
from facesnap_ext.photos import Photo
from facesnap_ext.settings.schema import IMAGE, unit_schema
from facesnap_ext.weights import download
from facesnap_ext.weights.model_files import MISSING_MESSAGES, ModelFiles
from facesnap_ext.weights.model_list import list_models, to_json

MAX_BODY = 32 * 2**20  # bytes of a request
MAX_PHOTOS = 16  # of one request
MAX_SIDE = 16384  # pixels of an output picture

log = logging.getLogger("facesnap")


class RequestError(Exception):
    """A request that cannot be answered, with its HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


def add_routes(
    app: Any,
    find_models: Callable[[], ModelFiles],
    engine: Callable[[], Engine],
    api_auth: str | None = None,
) -> None:
    """Add the routes to a host's FastAPI app.

    Args:
        engine: gives the process's one engine; asked at the first request that needs it.
        api_auth: the host's `cmd_opts.api_auth`, "user:password" and more of them after commas. With it every route
            wants HTTP Basic credentials, as the host's own API does, or that of a page with a login; see `admitted`.
    """
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from starlette.concurrency import run_in_threadpool

    async def answer(request: Request, compute: Callable[[dict], dict], changes: bool) -> JSONResponse:
        headers = {}
        try:
            if not admitted(request, api_auth):
                headers = {"WWW-Authenticate": "Basic"} if api_auth else {}
                raise RequestError(
                    401, "Log in to the page, or start the WebUI with --api-auth and send its user by HTTP Basic."
                )
            values = await _values(request) if request.method == "POST" else {}
            if changes and not _is_json(request):
                raise RequestError(400, "Send this with Content-Type: application/json, which no foreign page can.")
            # not in the event loop, which serves everybody else meanwhile
            return JSONResponse(await run_in_threadpool(compute, values))
        except RequestError as error:
            status, sentence = error.status, str(error)
        except FaceSnapError as error:
            status, sentence = 422, str(error)
        except Exception as error:
            log.exception("FaceSnap failed to answer %s", request.url.path)
            status = 500
            sentence = f"FaceSnap failed ({type(error).__name__}); the console has the whole story, please report it."
        return JSONResponse({"detail": sentence}, status, headers)

    def add(
        path: str,
        method: str,
        summary: str,
        compute: Callable[[dict], dict],
        schema: dict | None = None,
        changes: bool = False,  # something here, so that no form of a foreign page may reach it
    ) -> None:
        async def endpoint(request: Request):
            return await answer(request, compute, changes)

        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        extra = {"openapi_extra": {"requestBody": body}} if schema else {}
        name = f"facesnap_{path.rsplit('/', 1)[1]}"
        app.add_api_route(path, endpoint, methods=[method], summary=summary, name=name, tags=["FaceSnap"], **extra)

    add("/facesnap/version", "GET", "Version of FaceSnap", lambda values: {"version": __version__})
    add("/facesnap/schema", "GET", "Settings of one person", lambda values: unit_schema())
    add("/facesnap/models", "GET", "Model files", lambda values: describe_models(find_models()))
    add("/facesnap/models/get", "POST", "Download a part", lambda values: get_part(find_models(), values), PART, True)
    add("/facesnap/models/stop", "POST", "Stop a download", stop_part, PART, True)
    add("/facesnap/detect", "POST", "Faces in photos", lambda values: detect(engine(), values), DETECT)
    add("/facesnap/landmarks", "POST", "Points of a pose", lambda values: landmarks(engine(), values), LANDMARKS)


def admitted(request: Any, api_auth: str | None) -> bool:
    """Whether a request may be answered: it has the session of somebody who is logged in to the page, or a user and
    password of --api-auth; or the host wants neither."""
    page = getattr(request.app, "auth", None)  # of gradio's app, None without --gradio-auth
    if page and any(value in request.app.tokens for value in request.cookies.values()):
        return True
    return authorised(request.headers.get("authorization"), api_auth) if api_auth else not page


def authorised(header: str | None, api_auth: str | None) -> bool:
    """Whether an Authorization header has a user and password of the host's --api-auth, compared in constant time."""
    if not api_auth:
        return True
    scheme, _, encoded = (header or "").partition(" ")
    try:
        given = base64.b64decode(encoded.strip(), validate=True) if scheme.lower() == "basic" else b""
    except (binascii.Error, ValueError):
        given = b""
    # "user:password" as a whole: every pair is compared, so that the time tells nothing
    matches = [hmac.compare_digest(given, pair.encode()) for pair in api_auth.split(",") if ":" in pair]
    return any(matches)


def describe_models(files: ModelFiles) -> dict[str, Any]:
    """Model files by name, what is missing with where it goes, and what was passed over and why."""
    paths = {part: getattr(files, part) for part in MISSING_MESSAGES if part != "facesnap"}
    names = {part: path and path.name for part, path in paths.items()}
    return {
        "facesnap": sorted(files.facesnap),
        **names,
        "missing": files.missing(),
        "passed_over": files.passed_over,
        "parts": to_json(list_models(files)),
        "downloads": [_job(job) for job in download.jobs()],
    }


def get_part(files: ModelFiles, values: dict[str, Any]) -> dict[str, Any]:
    """Start the download of a part, and say how far it is."""
    return _job(download.start(_part_name(values), files))


def stop_part(values: dict[str, Any]) -> dict[str, Any]:
    """Stop the download of a part; what has arrived is kept."""
    name = _part_name(values)
    for job in download.jobs():
        if job.part.name == name:
            job.stop.set()
            return _job(job)
    raise RequestError(400, "FaceSnap downloads no part of this name.")


def detect(engine: Engine, values: dict[str, Any]) -> dict[str, Any]:
    """The faces in each photo; a photo without one has none."""
    _known(values, DETECT)
    given = values.get("photos")
    if not isinstance(given, list) or not 0 < len(given) <= MAX_PHOTOS:
        raise RequestError(400, f"FaceSnap's photos must be a list of 1 to {MAX_PHOTOS} pictures in base64.")
    encoders = engine.encoders(engine.files())
    found = []
    for number, text in enumerate(given, 1):
        photo = _photo(text, f"Photo {number}")
        faces = encoders.faces(photo)
        height, width = photo.pixels.shape[:2]
        described = [{"box": face.box.tolist(), "score": float(face.score), "padded": face.padded} for face in faces]
        found.append({"width": width, "height": height, "faces": described})
    return {"photos": found}


def landmarks(engine: Engine, values: dict[str, Any]) -> dict[str, Any]:
    """The rig of a person, and the points of a photo's pose."""
    _known(values, LANDMARKS)
    reference, driving = (
        _photo(values[name], title) if values.get(name) else None
        for name, title in (("reference", "Reference photo"), ("driving", "Driving photo"))
    )
    if ("width" in values) != ("height" in values):
        raise RequestError(400, "FaceSnap's width and height belong together: give both, or none.")
    size = tuple(_number(values, name, 1, MAX_SIDE) for name in ("width", "height")) if "width" in values else None
    which, driving_which = (_number({name: 0, **values}, name, 0, 999) for name in ("face_index", "driving_face_index"))
    rig, found = engine.preview(reference, driving, size, which, driving_which)
    points = place = None
    if found is not None:
        points = (found.points / (found.width, found.height)).tolist()
        place = dict(zip(("x", "y", "size"), placement(found)))
    return {"rig": for_browser(rig), "points": points, "place": place}


_SIDE = {"type": "integer", "minimum": 1, "maximum": MAX_SIDE}
_WHICH = {"type": "integer", "minimum": 0, "default": 0, "description": "which face, by size from the largest"}
DETECT = {
    "type": "object",
    "properties": {"photos": {"type": "array", "items": IMAGE, "minItems": 1, "maxItems": MAX_PHOTOS}},
    "required": ["photos"],
}
PART = {
    "type": "object",
    "properties": {"part": {"type": "string", "description": "what the catalogue calls it"}},
    "required": ["part"],
}
LANDMARKS = {
    "type": "object",
    "properties": {
        "reference": IMAGE,
        "face_index": _WHICH,
        "driving": IMAGE,
        "driving_face_index": _WHICH,
        "width": _SIDE,
        "height": _SIDE,
    },
}


def _part_name(values: dict[str, Any]) -> str:
    _known(values, PART)
    if not isinstance(name := values.get("part"), str):
        raise RequestError(400, "FaceSnap's part is the name of one in the catalogue, as text.")
    return name


def _job(job: download.Job) -> dict[str, Any]:
    return {
        "part": job.part.name,
        "done": job.done,
        "size": job.part.size,
        "state": job.state,
        "message": job.message,
    }


def _is_json(request: Any) -> bool:
    return request.headers.get("content-type", "").split(";")[0].strip().lower() == "application/json"


async def _values(request: Any) -> dict[str, Any]:
    """The JSON object in a request, which is read no further than `MAX_BODY`."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise RequestError(413, f"The request has more than {MAX_BODY // 2**20} MB: send smaller pictures.")
    try:
        values = json.loads(bytes(body))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise RequestError(400, "The request is not a JSON object; see /docs for what FaceSnap's routes take.")
    return values


def _known(values: dict[str, Any], schema: dict[str, Any]) -> None:
    known = schema["properties"]
    if unknown := sorted(set(values) - set(known)):
        raise RequestError(400, f"FaceSnap knows no {unknown[0]!r} here; it knows {', '.join(known)}.")


def _photo(text: Any, name: str) -> Photo:
    if not isinstance(text, str):
        raise RequestError(400, f"{name} is not text: send a picture file's contents in base64.")
    return photos.from_base64(text, name)


def _number(values: dict[str, Any], name: str, low: int, high: int) -> int:
    value = values[name]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(400, f"FaceSnap's {name} is {value!r}; give a whole number from {low} to {high}.")
    return value
