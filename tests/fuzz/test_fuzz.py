"""Whatever strangers send is read or refused with a sentence; nothing is run, written or taken to the network.

`make test` looks at a fixed sample; `make fuzz` at more than ten thousand new ones.
"""

from __future__ import annotations

import atexit
import base64
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from facesnap_ext import photos
from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity import clip
from facesnap_ext.settings import infotext
from facesnap_ext.settings.infotext import from_infotext, label, to_infotext
from facesnap_ext.settings.unit import CHOICES, UI_ORDER, Unit, from_script_args
from facesnap_ext.ui import routes
from facesnap_ext.weights import facesnap_file, identity_file, instantid
from facesnap_ext.weights.controlnet import controlnet_config
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.search import find_models
from facesnap_ext.weights.tensors import fingerprint, read_index, read_tensors
from facesnap_ext.weights.unpickle import read_pickled_arrays
from tests.fuzz import corpus
from tests.fuzz.mutations import json_values, spoilt
from tests.fuzz.watch import only_reading

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))  # of each kind; 0 is the fixed sample
MEMORY = 2**30  # bytes that all of it may take beyond what was in use before
START = 2**16  # bytes of a large file that are spoilt: Hypothesis keeps what it has drawn
ANSWERS = {200, 400, 404, 405, 413, 422}
FIELDS = [field.name for field in fields(Unit)]

fuzz = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def refused(read: Callable[..., Any], *arguments: Any) -> str | None:
    """With which sentence something was not read; None where it was."""
    try:
        read(*arguments)
    except FaceSnapError as error:
        check_sentence(error)
        return str(error)
    return None


def check_sentence(error: Exception) -> None:
    """A message for people: one line, not endless, without the insides of Python."""
    text = str(error)
    assert text.strip()
    assert text.endswith((".", "!"))
    assert "\n" not in text
    assert len(text) < 2000
    assert "Traceback" not in text


@pytest.fixture(autouse=True)
def bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder, and take no more memory than there is a reason for."""
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MEMORY
    assert not list(tmp_path.rglob("facesnap-was-here"))


@cache
def folder() -> Path:
    """The model folder, the only one that may be written to."""
    made = Path(tempfile.mkdtemp(prefix="facesnap-fuzz-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    (made / "identities").mkdir()
    for content in corpus.weights():  # what libraries do at their first use is not the reading's doing
        (made / "whole.safetensors").write_bytes(content)
        read_all(made / "whole.safetensors")
    return made


@fuzz
@given(st.data())
def test_photos(data):
    content = data.draw(spoilt(corpus.photos()))
    text = base64.b64encode(content).decode()
    with only_reading(folder()):
        try:
            found = photos.from_bytes(content, "Photo")
            # base64 is another way to the same picture
            assert photos.from_base64(f"data:image/png;base64,{text}", "Photo").digest == found.digest
        except FaceSnapError as error:
            check_sentence(error)
            assert "Photo" in str(error)
        else:
            assert found.pixels.dtype == np.uint8
            assert found.pixels.shape[0] * found.pixels.shape[1] <= photos.MAX_PIXELS


@fuzz
@given(st.data())
def test_weight_files(data):
    path = folder() / "strange.safetensors"
    path.write_bytes(data.draw(spoilt(corpus.weights())))
    with only_reading(folder()):
        read_all(path)


@fuzz
@given(st.data())
def test_safetensors_headers_that_lie(data):
    """The header is JSON that says where which numbers are: every value in it is spoilt in turn."""
    header, numbers = corpus.safetensors_headers(data.draw(st.sampled_from(corpus.weights()[:3])))
    values = json_values(st.sampled_from(["F32", "F64", "BF16", "F8_E4M3", "I64", "../../x", "facesnap"]))
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        if not isinstance(header[name], dict) or not header[name] or not data.draw(st.integers(0, 5)):
            header[name] = data.draw(values)
        else:
            field = data.draw(st.sampled_from(sorted(header[name])))
            header[name] = {**header[name], field: data.draw(values)}
    text = json.dumps(header).encode()
    length = len(text) if data.draw(st.integers(0, 9)) else data.draw(st.integers(0, 2**64 - 1))
    path = folder() / "lies.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text + numbers)
    with only_reading(folder()):
        read_all(path)


@fuzz
@given(st.data())
def test_metadata_that_lie(data):
    """The tensors are whole; what the file says of its networks, JSON in text, has one to three values spoilt."""
    header, numbers = corpus.safetensors_headers(data.draw(st.sampled_from(corpus.weights()[:2])))
    header["__metadata__"] = metadata = dict(header["__metadata__"])
    values = json_values(st.sampled_from(["facial attributes", "resampler", "72 points", "a", ""]))
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(set(metadata) - {"format"})))
        try:
            content = json.loads(metadata[name])
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict) and content and data.draw(st.integers(0, 5)):
            content[data.draw(st.sampled_from(sorted(content)))] = data.draw(values | st.integers(-1, 10**6))
        else:
            content = data.draw(values)
        metadata[name] = json.dumps(content) if data.draw(st.integers(0, 19)) else "[" * 5000
    text = json.dumps(header).encode()
    path = folder() / "metadata.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    with only_reading(folder()):
        read_all(path)
        find_models(path.parent).missing()


@fuzz
@given(st.data())
def test_configurations_beside_weights(data):
    """`config.json` of a CLIP and of a ControlNet."""
    good = {
        "model_type": "clip_vision_model",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "_class_name": "ControlNetModel",
        "block_out_channels": [32, 32],
        "attention_head_dim": 1,
    }
    values = json_values(st.sampled_from(["clip", "clip_vision_model", "somebody/kernel", "gelu"]))
    names = st.sampled_from([*good, "vision_config", "hidden_act", "_attn_implementation", "addition_time_embed_dim"])
    content = data.draw(st.dictionaries(names, values, max_size=4).map(lambda some: {**good, **some}) | values)
    path = folder() / "config.json"
    path.write_bytes(data.draw(st.just(json.dumps(content).encode()) | spoilt([json.dumps(content).encode()])))
    shapes = {f"down_blocks.{i}.resnets.0.conv1.weight": (32, 32, 3, 3) for i in range(2)}
    with only_reading(folder()):
        for read, arguments in ((clip._described, (path, 8, 2)), (controlnet_config, (path.parent, shapes))):
            refusal = refused(read, *arguments)
            assert refusal is None or path.name in refusal


def read_all(path: Path) -> None:
    """Everything that FaceSnap does with a weight file that somebody has put into its folder."""
    find_models(path.parent)
    for read in (read_index, fingerprint, read_tensors, facesnap_file.load, identity_file.load):
        refusal = refused(read, path)
        assert refusal is None or path.name in refusal


@fuzz
@given(st.data())
def test_instantids_files(data):
    place = folder() / "InstantID"
    place.mkdir(exist_ok=True)
    spoilt_one = data.draw(st.sampled_from(sorted(corpus.instantid())))
    for name, content in corpus.instantid().items():
        start, rest = content[:START], content[START:]
        (place / name).write_bytes(data.draw(spoilt([start])) + rest if name == spoilt_one else content)
    net, adapter = place / Path(instantid.IDENTITYNET).name, place / instantid.ADAPTER
    with only_reading(folder()):
        for read, paths in ((instantid.load, (net, adapter)), (instantid.load_adapter, (adapter,))):
            refusal = refused(read, *paths)
            assert refusal is None or any(path.name in refusal for path in (*paths, place / spoilt_one))


@fuzz
@given(st.data())
def test_pickles(data):
    path = folder() / "strange.pkl"
    path.write_bytes(data.draw(st.sampled_from(corpus.pickles()) | spoilt(corpus.pickles())))
    with only_reading(folder()):
        try:
            arrays = read_pickled_arrays(path)
        except FaceSnapError as error:
            check_sentence(error)
            assert path.name in str(error)
        else:
            assert all(isinstance(array, np.ndarray) and array.dtype.kind in "biufc" for array in arrays.values())


@fuzz
@given(st.data())
def test_infotexts(data):
    good = to_infotext({1: Unit(enabled=True), 2: Unit(enabled=True, template="left", x=0.5, blocks=(1.0,) * 10)})
    names = st.sampled_from([*good, *(label(name, n) for name in FIELDS for n in (1, 2, 3))]) | st.text(max_size=20)
    texts = st.text(max_size=40) | st.sampled_from(
        ["True", "nan", "inf", "-1", "1e400", "9" * 5000, "\N{ARABIC-INDIC DIGIT ONE}", "1_0", "None"]
    )
    parameters = {**good, **data.draw(st.dictionaries(names, texts, max_size=6))}
    with only_reading(folder()):
        for number in (1, 2, 3):
            try:
                values = from_infotext(parameters, number)
            except ValueError:
                continue
            assert set(values) == {"enabled", *FIELDS} - set(infotext.PHOTOS)


@fuzz
@given(st.data())
def test_script_arguments(data):
    """What a request to /sdapi/v1/txt2img carries, and what the page hands over."""
    picture = st.sampled_from([base64.b64encode(photo).decode() for photo in corpus.photos()])
    words = st.sampled_from(sorted({word for words in CHOICES.values() for word in words})) | picture
    values = json_values(words)
    names = st.sampled_from(FIELDS) | st.text(max_size=10)
    unit = st.dictionaries(names, values, max_size=6).map(lambda some: {"references": [], **some})
    if data.draw(st.booleans()):
        arguments = data.draw(st.lists(unit, min_size=1, max_size=3))
    else:
        count = len(UI_ORDER) * data.draw(st.integers(1, 2))
        arguments = [True, *data.draw(st.lists(values, min_size=count - 1, max_size=count - 1))]
    with only_reading(folder()):
        try:
            units = from_script_args(arguments)
        except FaceSnapError as error:
            check_sentence(error)
        else:
            assert all(isinstance(unit, Unit) and unit.active for unit in units.values())
            json.dumps(to_infotext(units))


@cache
def client() -> Any:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    app, files = FastAPI(), ModelFiles(folder())
    routes.add_routes(app, lambda: files, lambda: Engine(lambda: files))
    return TestClient(app, raise_server_exceptions=False)


@fuzz
@given(st.data())
def test_routes(data):
    picture = st.sampled_from([base64.b64encode(photo).decode() for photo in corpus.photos()])
    values = json_values(picture | st.sampled_from(["/etc/passwd", "http://127.0.0.1:9/x.png", "file:///etc/passwd"]))
    bodies = {
        "detect": {"photos": st.lists(picture, max_size=3) | values},
        "landmarks": {
            **dict.fromkeys(("reference", "driving"), picture | values),
            **dict.fromkeys(("face", "driving_face", "width", "height"), st.integers(-1, 70) | values),
        },
        "models/get": {"part": st.sampled_from(["deca", "clip", "../deca"]) | values},
        "models/stop": {"part": st.sampled_from(["deca", "clip"]) | values},
        "version": {},
    }
    path = data.draw(st.sampled_from([*bodies, "models", "schema"]))
    fields = st.fixed_dictionaries({}, optional=bodies.get(path, {}))
    foreign = st.dictionaries(st.text(max_size=6), values, max_size=2)
    body = data.draw(
        fields.map(lambda some: json.dumps(some).encode())
        | st.tuples(fields, foreign).map(lambda both: json.dumps({**both[0], **both[1]}).encode())
        | spoilt([b'{"photos": ["aGVsbG8="]}', b'{"width": 64, "height": 64}', b"[" * 5000])
    )
    method = "POST" if path in bodies and data.draw(st.integers(0, 9)) else "GET"
    with only_reading(folder()):
        answer = client().request(
            method, f"/facesnap/{path}", content=body, headers={"content-type": "application/json"}
        )
    assert answer.status_code in ANSWERS, answer.text
    if answer.status_code != 200:
        assert "Traceback" not in answer.json()["detail"]
