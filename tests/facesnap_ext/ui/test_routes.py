"""The HTTP routes: their responses, their errors, and who may use them."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from facesnap_ext import __version__, photos
from facesnap_ext.engine import Engine
from facesnap_ext.hosts import fork
from facesnap_ext.landmarks.poses import Pose, Rig, pose_points
from facesnap_ext.photos import Photo, PhotoReader
from facesnap_ext.settings.schema import unit_schema
from facesnap_ext.settings.unit import Unit
from facesnap_ext.ui import routes
from facesnap_ext.weights import catalogue, download
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.search import find_models
from tests.support.parts_server import serve
from tests.support.units import make_unit

fastapi = pytest.importorskip("fastapi")
testclient = pytest.importorskip("fastapi.testclient")


JSON = {"Content-Type": "application/json"}


def client_of(models, engine=None, api_auth=None, cmd_opts=None):
    app = fastapi.FastAPI()
    engine = engine or Engine(lambda: models)
    routes.add_routes(app, lambda: models, lambda: engine, api_auth, routes.cors_origins(cmd_opts))
    return testclient.TestClient(app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def engine(stand_ins):
    return Engine(lambda: find_models(stand_ins))


@pytest.fixture(scope="module")
def client(stand_ins, engine):
    return client_of(find_models(stand_ins), engine)


@pytest.fixture
def empty(tmp_path):
    """A client without model files."""
    return client_of(ModelFiles(tmp_path))


@pytest.fixture(scope="module")
def two(astronaut):
    """A photo with two faces."""
    mirrored = astronaut.pixels[:, ::-1]
    return Photo(np.ascontiguousarray(np.concatenate([astronaut.pixels, mirrored], 1)[:400]), "two")


def encoded(photo: Photo) -> str:
    file = io.BytesIO()
    Image.fromarray(photo.pixels).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


GREY = Photo(np.full((64, 96, 3), 128, np.uint8), "grey")


def test_version_and_model_files(client, stand_ins):
    versions = client.get("/facesnap/version").json()
    assert versions == {"version": __version__, "webui": asdict(fork.current())}
    models = client.get("/facesnap/models").json()
    assert models["facesnap"] == sorted(path.name for path in stand_ins.glob("[!s]*.safetensors"))
    assert models["deca"] == "stand-in-deca.safetensors"
    assert models["missing"] == {}
    assert models["landmarks"] == "DECA and FLAME"


def test_the_schema_of_a_person(client):
    assert client.get("/facesnap/schema").json() == unit_schema()


def test_missing_model_files_are_listed_with_their_folder(empty, tmp_path):
    models = empty.get("/facesnap/models").json()
    assert models["facesnap"] == []
    assert models["clip"] is None
    assert sorted(models["missing"]) == ["clip", "face_pack", "facesnap"]
    assert all(str(tmp_path) in sentence for sentence in models["missing"].values())


def test_only_parts_of_the_catalogue_are_downloaded(tmp_path, monkeypatch):
    pytest.importorskip("requests")
    monkeypatch.setattr(download, "_jobs", {})
    client = client_of(ModelFiles(tmp_path))
    with serve(b"content") as server:
        monkeypatch.setattr(catalogue, "PARTS", (server.part(),))
        for part in (server.url, "../thing", "things/thing.bin", ""):
            answer = client.post("/facesnap/models/get", json={"part": part})
            assert answer.status_code == 422, part
            assert "There is no part named" in answer.json()["detail"]
        for body in ({}, {"part": 1}, {"part": "thing", "url": server.url}, {"part": None}):
            assert client.post("/facesnap/models/get", json=body).status_code == 400, body
        form = {"content": b'{"part": "thing"}', "headers": {"Content-Type": "text/plain"}}
        assert client.post("/facesnap/models/get", **form).status_code == 415, "other sites can send this type"
        assert server.requested == []
        assert client.post("/facesnap/models/stop", json={"part": "thing"}).status_code == 400

        server.hold = threading.Event()
        job = client.post("/facesnap/models/get", json={"part": "thing"}).json()
        assert (job["part"], job["size"], job["state"]) == ("thing", 7, "running")
        server.hold.set()
        deadline = time.monotonic() + 20
        while (
            client.get("/facesnap/models").json()["downloads"][0]["state"] == "running" and time.monotonic() < deadline
        ):
            time.sleep(0.02)
    assert (tmp_path / "things" / "thing.bin").read_bytes() == b"content"
    (job,) = client.get("/facesnap/models").json()["downloads"]
    assert (job["state"], job["done"]) == ("done", 7)
    assert client.post("/facesnap/models/stop", json={"part": "thing"}).json() == job


def test_all_parts_are_described(empty):
    parts = empty.get("/facesnap/models").json()["parts"]
    assert [part["name"] for part in parts] == list(catalogue.ROLES)
    pack = next(part for part in parts if part["name"] == "face_pack")
    assert pack["options"][0]["licence"] == "non-commercial research"


def test_detect_returns_the_faces_that_the_engine_finds(client, engine, two):
    answer = client.post("/facesnap/detect", json={"photos": [encoded(two), encoded(GREY)]})
    assert answer.status_code == 200
    with_faces, without = answer.json()["photos"]
    expected = engine.encoders(engine.files()).faces(two)
    assert len(expected) == 2
    np.testing.assert_allclose([face["box"] for face in with_faces["faces"]], [face.box for face in expected])
    assert [face["score"] for face in with_faces["faces"]] == pytest.approx([face.score for face in expected])
    assert (with_faces["width"], with_faces["height"]) == (1024, 400)
    assert without == {"width": 96, "height": 64, "faces": []}


def test_landmarks_are_those_of_the_job(client, engine, astronaut, two):
    sent = {
        "reference": encoded(astronaut),
        "driving": encoded(two),
        "driving_face_index": 1,
        "width": 640,
        "height": 512,
    }
    answer = client.post("/facesnap/landmarks", json=sent).json()
    unit = Unit(True, (astronaut,), driving=two, driving_face_index=1, model="random.safetensors")
    job = engine.prepare(unit, 640, 512).conditioning.landmarks
    np.testing.assert_allclose(np.array(answer["points"]) * (640, 512), job.points, atol=1e-3)
    middle = (job.box[:2] + job.box[2:]) / 2
    place = [*(middle / (640, 512)), (job.box[3] - job.box[1]) / 512]
    assert [answer["place"][name] for name in ("x", "y", "size")] == pytest.approx(place)

    directions = {name: np.array(values) for name, values in answer["rig"]["directions"].items()}
    rig = Rig(np.array(answer["rig"]["rest"]), directions)
    sliders = make_unit(True, (astronaut,), pose="sliders", yaw=20, x=0.4, y=0.5, size=0.3, model="random.safetensors")
    job = engine.prepare(sliders, 640, 512).conditioning.landmarks
    np.testing.assert_allclose(pose_points(rig, Pose(yaw=20, x=0.4, y=0.5, size=0.3), 640, 512), job.points, atol=1e-3)


def test_several_references_determine_one_shape(client, engine, astronaut, two):
    def rest(sent):
        return client.post("/facesnap/landmarks", json=sent).json()["rig"]["rest"]

    images = [encoded(astronaut), encoded(two)]
    together = rest({"references": images})
    np.testing.assert_allclose(together, engine.preview([astronaut, two]).rig.rest)
    alone = rest({"reference": images[0]})
    assert alone == rest({"references": images[:1]})
    assert np.abs(np.array(together) - alone).max() > 1e-4
    assert rest({"references": []}) == rest({})


def test_without_a_size_points_are_fractions_of_the_driving_photo(client, engine, astronaut, two):
    """The same applies to an init image in img2img."""
    sent = {"reference": encoded(astronaut), "driving": encoded(two)}
    answer = client.post("/facesnap/landmarks", json=sent).json()
    unit = Unit(True, (astronaut,), model="random.safetensors")
    job = engine.prepare(unit, 512, 512, init_image=two).conditioning.landmarks
    assert (job.width, job.height) == (1024, 400)
    np.testing.assert_allclose(np.array(answer["points"]) * (1024, 400), job.points, atol=1e-3)


def test_the_reference_gives_the_pose_and_without_photos_the_rig_is_the_mean_face(client, engine, astronaut):
    alone = client.post("/facesnap/landmarks", json={"reference": encoded(astronaut), "width": 640, "height": 512})
    own = engine.prepare(Unit(True, (astronaut,), pose="own", model="random.safetensors"), 640, 512)
    np.testing.assert_allclose(
        np.array(alone.json()["points"]) * (640, 512), own.conditioning.landmarks.points, atol=1e-3
    )
    mean = client.post("/facesnap/landmarks", json={}).json()
    assert mean["points"] is None
    assert mean["place"] is None
    distance = np.abs(np.array(mean["rig"]["rest"]) - alone.json()["rig"]["rest"])
    assert distance.max() > 1e-3, "the reference's face is not the mean face"


@pytest.mark.parametrize(
    ("route", "sent", "status", "sentence"),
    [
        ("detect", b"not json", 400, "not a JSON object"),
        ("detect", b"[1]", 400, "not a JSON object"),
        ("detect", b"\xff", 400, "not a JSON object"),
        ("detect", b"[" * 100_000, 400, "not a JSON object"),
        ("detect", {}, 400, "1 to 16 images"),
        ("detect", {"photos": ["x"] * 17}, 400, "1 to 16 images"),
        ("detect", {"photos": "x"}, 400, "1 to 16 images"),
        ("detect", {"photos": [3]}, 400, "Photo 1 is not text"),
        ("detect", {"photos": [], "path": "/etc/passwd"}, 400, "no parameter 'path'"),
        ("detect", {"photos": ["/etc/passwd"]}, 422, "Photo 1 is not"),
        ("detect", {"photos": ["https://example.com/a.png"]}, 422, "Photo 1 is not base64"),
        ("detect", {"photos": ["file:///etc/passwd"]}, 422, "Photo 1 is not base64"),
        ("landmarks", {"reference": "aGVsbG8="}, 422, "Reference photo is not a readable image"),
        ("landmarks", {"references": [encoded(GREY), "aGVsbG8="]}, 422, "Reference photo 2 is not a readable image"),
        ("landmarks", {"references": encoded(GREY)}, 400, "references must be a list of 0 to 16 images"),
        ("landmarks", {"references": ["", 3]}, 422, "Reference photo 1"),
        ("landmarks", {"reference": "aGVsbG8=", "references": []}, 400, "send only one of them"),
        ("landmarks", {"driving": encoded(GREY)}, 422, "No face was found in Driving photo"),
        ("landmarks", {"width": 512}, 400, "width and height must be given together"),
        ("landmarks", {"width": 512, "height": True}, 400, "height is True"),
        ("landmarks", {"width": 0, "height": 512}, 400, "width is 0"),
        ("landmarks", {"face_index": -1}, 400, "face_index is -1"),
        ("landmarks", {"face_index": "0"}, 400, "face_index is '0'"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(client, route, sent, status, sentence):
    content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    answer = client.post(f"/facesnap/{route}", content=content, headers=JSON)
    assert answer.status_code == status
    assert list(answer.json()) == ["detail"]
    assert sentence in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]


def test_a_request_that_is_too_large_is_not_read_to_the_end(client, monkeypatch):
    monkeypatch.setattr(routes, "MAX_BODY", 1000)
    assert client.post("/facesnap/detect", content=b" " * 1001, headers=JSON).status_code == 413
    assert client.post("/facesnap/detect", content=b" " * 998 + b"{}", headers=JSON).status_code == 400

    class Upload:
        async def stream(self):
            for _ in range(3):
                yield b" " * 500
            raise AssertionError("the request was read further")

    with pytest.raises(routes.RequestError, match="send smaller images"):
        asyncio.run(routes._values(Upload()))


def test_the_rig_needs_no_model_file(empty):
    answer = empty.post("/facesnap/landmarks", json={})
    assert answer.status_code == 200
    assert len(answer.json()["rig"]["rest"]) == 72
    assert answer.json()["notes"] == []


def test_an_internal_error_is_one_sentence_without_details(stand_ins, caplog):
    class Broken(Engine):
        def preview(self, *args):
            raise ValueError("secret: /home/user/code.py line 3")

    answer = client_of(None, Broken(lambda: find_models(stand_ins))).post("/facesnap/landmarks", json={})
    assert answer.status_code == 500
    assert answer.json() == {
        "detail": "FaceSnap failed (ValueError); please report it with the traceback in the console."
    }
    assert "secret" not in answer.text
    assert "secret" in caplog.text, "the console has the details"


ALL = [
    ("GET", "version"),
    ("GET", "schema"),
    ("GET", "models"),
    ("POST", "models/get"),
    ("POST", "models/stop"),
    ("POST", "detect"),
    ("POST", "landmarks"),
]


@pytest.mark.parametrize(("method", "route"), ALL)
def test_every_route_requires_api_auth(tmp_path, method, route):
    client = client_of(ModelFiles(tmp_path), api_auth="anna:sesame,bert:pass word")

    def status(*user, header=None):
        headers = {"Authorization": header} if header else {}
        return client.request(method, f"/facesnap/{route}", auth=user or None, headers=headers).status_code

    for refused in ((), ("anna", "wrong"), ("anna", "pass word"), ("", ""), ("anna", "sesame,bert:pass word")):
        assert status(*refused) == 401, refused
    token = base64.b64encode(b"anna:sesame").decode()
    for header in ("Basic", "Basic ???", f"Bearer {token}", token, f"Basic {token[:-4]}"):
        assert status(header=header) == 401, header
    assert client.request(method, f"/facesnap/{route}").headers["www-authenticate"] == "Basic"
    for user in (("anna", "sesame"), ("bert", "pass word")):
        assert status(*user) in (200, 415), "authorised"


CONTENT_TYPES = [None, "", "text/plain", "text/plain; application/json", "multipart/form-data; boundary=x"]
CONTENT_TYPES += ["application/x-www-form-urlencoded", "application/jsonp", "application/json-seq", "text/json"]


@pytest.mark.parametrize("route", [route for method, route in ALL if method == "POST"])
@pytest.mark.parametrize("content_type", CONTENT_TYPES)
def test_post_routes_take_nothing_but_json(tmp_path, monkeypatch, route, content_type):
    """Pages on other sites can send other content types without permission, so such a body is not even read."""
    monkeypatch.setattr(routes, "_values", lambda request: pytest.fail("read"))
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = client_of(ModelFiles(tmp_path)).post(f"/facesnap/{route}", content=b"{}", headers=headers)
    assert answer.status_code == 415
    assert "Content-Type: application/json" in answer.json()["detail"]


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON", " application/json ; charset=utf-8"])
def test_json_is_recognised_in_every_spelling(tmp_path, content_type):
    answer = client_of(ModelFiles(tmp_path)).post(
        "/facesnap/models/stop", content=b'{"part": "x"}', headers={"Content-Type": content_type}
    )
    assert answer.status_code == 400


ORIGINS = {  # the Origin of a request to http://testserver, and whether it is answered
    "http://testserver": True,
    "https://testserver": True,
    "HTTP://TestServer": True,
    "http://proxy.example": True,
    "http://testserver.evil.example": False,
    "http://evil.example": False,
    "http://testserver:81": False,
    "http://testserver@evil.example": False,
    "null": False,
    "": False,
    "file://": False,
    "https://allowed.example": True,
    "https://a.pattern.example": True,
    "https://a.pattern.example.evil": False,
}


@pytest.mark.parametrize(("method", "route"), ALL)
@pytest.mark.parametrize("origin", ORIGINS)
def test_pages_of_other_sites_get_nothing(tmp_path, method, route, origin):
    cmd_opts = SimpleNamespace(
        cors_allow_origins="https://other.example,https://allowed.example",
        cors_allow_origins_regex=r"https://\w+\.pattern\.example",
    )
    client = client_of(ModelFiles(tmp_path), cmd_opts=cmd_opts)
    headers = {"Origin": origin, "X-Forwarded-Host": "proxy.example"}
    answer = client.request(method, f"/facesnap/{route}", headers=headers)
    assert (answer.status_code != 403) == ORIGINS[origin]
    if not ORIGINS[origin]:
        assert list(answer.json()) == ["detail"]


def test_requests_that_hold_photos_wait_for_each_other_and_are_limited(tmp_path, monkeypatch):
    inside, most, hold = [], [], threading.Event()

    def slow(self, value, name):
        inside.append(name)
        most.append(len(inside))
        hold.wait(0.05)
        inside.remove(name)
        return GREY

    monkeypatch.setattr(PhotoReader, "read", slow)
    monkeypatch.setattr(routes, "MAX_REQUESTS", 4)

    class Faceless(Engine):
        def encoders(self, files=None):
            return SimpleNamespace(faces=lambda photo: [])

    client = client_of(ModelFiles(tmp_path), Faceless(lambda: ModelFiles(tmp_path)))
    with client, ThreadPoolExecutor(12) as pool:
        send = lambda i: client.post("/facesnap/detect", json={"photos": ["x"] * 4}).status_code  # noqa: E731
        statuses = list(pool.map(send, range(12)))
    assert max(most) == 1
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 4


@pytest.mark.parametrize("route", ["detect", "landmarks"])
def test_photos_of_one_request_are_limited_in_total_size(client, monkeypatch, route):
    monkeypatch.setattr(photos, "MAX_TOTAL_PIXELS", 64 * 96 + 1)
    two = (
        {"photos": [encoded(GREY)] * 2} if route == "detect" else {"reference": encoded(GREY), "driving": encoded(GREY)}
    )
    answer = client.post(f"/facesnap/{route}", json=two)
    assert answer.status_code == 422
    assert "million pixels in total" in answer.json()["detail"]


@pytest.mark.parametrize("api_auth", [None, "anna:sesame"])
def test_a_page_with_a_login_requires_a_session(tmp_path, api_auth):
    client = client_of(ModelFiles(tmp_path), api_auth=api_auth)
    client.app.auth, client.app.tokens = {"bert": "pass word"}, {"a session": "bert"}  # set by gradio on its app
    refused = client.get("/facesnap/models")
    assert refused.status_code == 401
    assert "Log in to the page" in refused.json()["detail"]
    assert ("www-authenticate" in refused.headers) == bool(api_auth)
    assert client.post("/facesnap/models/get", json={"part": "deca"}).status_code == 401
    for cookie, status in (("access-token=guessed", 401), ("access-token=a session", 200)):
        assert client.get("/facesnap/models", headers={"Cookie": cookie}).status_code == status
    if api_auth:
        assert client.get("/facesnap/models", auth=("anna", "sesame")).status_code == 200


def test_no_api_auth_admits_everyone_and_an_unusable_one_admits_no_one():
    assert routes.authorised(None, None)
    assert routes.authorised(None, "")
    assert not routes.authorised(None, "anna")
    assert not routes.authorised("Basic " + base64.b64encode(b"anna").decode(), "anna")
    assert not routes.authorised("Basic ", ",")


def test_answers_are_computed_outside_the_event_loop(tmp_path):
    threads = []

    def models():
        threads.append(threading.current_thread())
        return ModelFiles(tmp_path)

    app = fastapi.FastAPI()
    routes.add_routes(app, models, lambda: None)

    @app.get("/loop")
    async def loop():
        threads.append(threading.current_thread())

    with testclient.TestClient(app) as client:
        client.get("/loop")
        client.get("/facesnap/models")
    assert threads[0] is not threads[1]


def test_openapi_describes_the_routes_and_their_parameters(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert sorted(
        (method.upper(), path.removeprefix("/facesnap/")) for path, ways in paths.items() for method in ways
    ) == sorted(ALL)
    body = paths["/facesnap/landmarks"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    names = ["driving", "driving_face_index", "face_index", "height", "reference", "references", "width"]
    assert sorted(body["properties"]) == names
