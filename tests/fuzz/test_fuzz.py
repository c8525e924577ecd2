"""Untrusted input is either accepted or rejected with a one-sentence error. It never runs code,
writes files, uses the network or takes longer than 20 seconds.

`make test` uses fixed examples, and `make fuzz` more than ten thousand new ones.
"""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from facesnap_ext import photos
from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity import clip
from facesnap_ext.settings import infotext
from facesnap_ext.settings.infotext import from_infotext, label, to_infotext
from facesnap_ext.settings.script_args import UI_ORDER, from_script_args
from facesnap_ext.settings.unit import CHOICES, Unit, defaults, from_values
from facesnap_ext.ui import routes
from facesnap_ext.weights import instantid
from facesnap_ext.weights.controlnet import controlnet_config
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.search import find_models
from facesnap_ext.weights.unpickle import read_pickled_arrays
from tests.fuzz import corpus
from tests.fuzz.harness import check_sentence, folder, fuzz, read_all, refused
from tests.fuzz.mutations import json_values, mutated
from tests.fuzz.watch import only_reading

START = 2**16  # only this many bytes of a large file are mutated, because Hypothesis keeps all examples in memory
ANSWERS = {200, 400, 404, 405, 413, 422}
NAMES = list(defaults())  # the names of all settings


@fuzz
@given(st.data())
def test_photos(data):
    content = data.draw(mutated(corpus.photos()))
    text = base64.b64encode(content).decode()
    with only_reading(folder()):
        try:
            photo = photos.from_bytes(content, "Photo")
            # the same image in base64
            assert photos.from_base64(f"data:image/png;base64,{text}", "Photo").digest == photo.digest
        except FaceSnapError as error:
            check_sentence(error)
            assert "Photo" in str(error)
        else:
            assert photo.pixels.dtype == np.uint8
            assert photo.pixels.shape[0] * photo.pixels.shape[1] <= photos.MAX_PIXELS


@fuzz
@given(st.data())
def test_weight_files(data):
    path = folder() / "mutated.safetensors"
    path.write_bytes(data.draw(mutated(corpus.weights())))
    with only_reading(folder()):
        read_all(path)


@fuzz
@given(st.data())
def test_inconsistent_safetensors_headers(data):
    """The header is JSON that locates the tensors. Some of its values are replaced."""
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
    path = folder() / "header.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text + numbers)
    with only_reading(folder()):
        read_all(path)


@fuzz
@given(st.data())
def test_inconsistent_metadata(data):
    """The tensors are intact, but one to three values in the metadata, which describes the networks, are replaced."""
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
def test_config_files(data):
    """`config.json` of a CLIP model and of a ControlNet."""
    valid = {
        "model_type": "clip_vision_model",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "_class_name": "ControlNetModel",
        "block_out_channels": [32, 32],
        "attention_head_dim": 1,
    }
    values = json_values(st.sampled_from(["clip", "clip_vision_model", "someone/kernel", "gelu"]))
    names = st.sampled_from([*valid, "vision_config", "hidden_act", "_attn_implementation", "addition_time_embed_dim"])
    content = data.draw(st.dictionaries(names, values, max_size=4).map(lambda some: {**valid, **some}) | values)
    path = folder() / "config.json"
    path.write_bytes(data.draw(st.just(json.dumps(content).encode()) | mutated([json.dumps(content).encode()])))
    shapes = {f"down_blocks.{i}.resnets.0.conv1.weight": (32, 32, 3, 3) for i in range(2)}
    with only_reading(folder()):
        for read, arguments in ((clip._read_config, (path, 8, 2)), (controlnet_config, (path.parent, shapes))):
            refusal = refused(read, *arguments)
            assert refusal is None or path.name in refusal


@fuzz
@given(st.data())
def test_instantid_files(data):
    place = folder() / "InstantID"
    place.mkdir(exist_ok=True)
    mutated_name = data.draw(st.sampled_from(sorted(corpus.instantid())))
    for name, content in corpus.instantid().items():
        start, rest = content[:START], content[START:]
        (place / name).write_bytes(data.draw(mutated([start])) + rest if name == mutated_name else content)
    net, adapter = place / Path(instantid.IDENTITYNET).name, place / instantid.ADAPTER
    with only_reading(folder()):
        for read, paths in ((instantid.load, (net, adapter)), (instantid.load_adapter, (adapter,))):
            refusal = refused(read, *paths)
            assert refusal is None or any(path.name in refusal for path in (*paths, place / mutated_name))


@fuzz
@given(st.data())
def test_pickles(data):
    path = folder() / "mutated.pkl"
    path.write_bytes(data.draw(st.sampled_from(corpus.pickles()) | mutated(corpus.pickles())))
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
    second = from_values({"enabled": True, "template": "left", "x": 0.5, "block_weights": (1.0,) * 10})
    valid = to_infotext({1: Unit(enabled=True), 2: second})
    names = st.sampled_from([*valid, *(label(name, n) for name in NAMES for n in (1, 2, 3))]) | st.text(max_size=20)
    texts = st.text(max_size=40) | st.sampled_from(
        ["True", "nan", "inf", "-1", "1e400", "9" * 5000, "\N{ARABIC-INDIC DIGIT ONE}", "1_0", "None"]
    )
    parameters = {**valid, **data.draw(st.dictionaries(names, texts, max_size=6))}
    with only_reading(folder()):
        for number in (1, 2, 3):
            try:
                values = from_infotext(parameters, number)
            except ValueError:
                continue
            assert set(values) == {"enabled", *NAMES} - set(infotext.PHOTOS)


@fuzz
@given(st.data())
def test_script_arguments(data):
    """The arguments of the script, from a request to /sdapi/v1/txt2img and from the page."""
    image = st.sampled_from([base64.b64encode(photo).decode() for photo in corpus.photos()])
    words = st.sampled_from(sorted({word for words in CHOICES.values() for word in words})) | image
    values = json_values(words)
    names = st.sampled_from(NAMES) | st.text(max_size=10)
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
    image = st.sampled_from([base64.b64encode(photo).decode() for photo in corpus.photos()])
    values = json_values(image | st.sampled_from(["/etc/passwd", "http://127.0.0.1:9/x.png", "file:///etc/passwd"]))
    bodies = {
        "detect": {"photos": st.lists(image, max_size=3) | values},
        "landmarks": {
            **dict.fromkeys(("reference", "driving"), image | values),
            **dict.fromkeys(("face_index", "driving_face_index", "width", "height"), st.integers(-1, 70) | values),
        },
        "models/get": {"part": st.sampled_from(["deca", "clip", "../deca"]) | values},
        "models/stop": {"part": st.sampled_from(["deca", "clip"]) | values},
        "version": {},
    }
    path = data.draw(st.sampled_from([*bodies, "models", "schema"]))
    known = st.fixed_dictionaries({}, optional=bodies.get(path, {}))
    foreign = st.dictionaries(st.text(max_size=6), values, max_size=2)
    body = data.draw(
        known.map(lambda some: json.dumps(some).encode())
        | st.tuples(known, foreign).map(lambda both: json.dumps({**both[0], **both[1]}).encode())
        | mutated([b'{"photos": ["aGVsbG8="]}', b'{"width": 64, "height": 64}', b"[" * 5000])
    )
    method = "POST" if path in bodies and data.draw(st.integers(0, 9)) else "GET"
    with only_reading(folder()):
        answer = client().request(
            method, f"/facesnap/{path}", content=body, headers={"content-type": "application/json"}
        )
    assert answer.status_code in ANSWERS, answer.text
    if answer.status_code != 200:
        assert "Traceback" not in answer.json()["detail"]
