"""What comes from clients and servers: uploads, photos of all modes and sizes, saved identities, and downloads."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, save

from facesnap_ext import photos
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.photos import MAX_NAME, PhotoReader
from facesnap_ext.settings.script_args import reference_photos
from facesnap_ext.ui.uploads import uploads
from facesnap_ext.weights import connection, download, identity_file
from facesnap_ext.weights.download import Stopped
from facesnap_ext.weights.identity_folder import choose_identity, find_identities
from tests.fuzz import corpus
from tests.fuzz.harness import check_sentence, folder, fuzz, new_folder, refused, sample
from tests.fuzz.mutations import json_values, mutated
from tests.fuzz.watch import NOT_OURS, only_reading
from tests.support.parts_server import Server

MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")
NAMES = [
    "Ada",
    "../Ada",
    "a/b",
    "a\\b",
    "\0",
    "*",
    "[A-Z]da",
    "x" * 5000,
    "\ud800",
    "con",
    "",
    ".",
    "Ada.safetensors",
    "\n",
]


@fuzz
@given(st.data())
def test_photos_of_any_kind(data):
    """Images that are whole, in all modes and formats, with odd sizes and orientations, are read upright."""
    size = data.draw(st.tuples(*[st.sampled_from([1, 2, 3, 7, 16, 33, 257, 258])] * 2))
    mode, form = data.draw(st.sampled_from(MODES)), data.draw(st.sampled_from(FORMATS))
    orientation = data.draw(st.sampled_from([*range(10), -1, 65535, "6", (6, 6), b"\6", 6.5]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new(mode, size)
    file = io.BytesIO()
    try:
        image.save(file, form, exif=exif if data.draw(st.booleans()) else b"")
    except Exception:  # Pillow cannot write this combination
        file = None
    with only_reading(folder()):
        try:
            photo = photos.from_pil(image, "Photo") if file is None else photos.from_bytes(file.getvalue(), "Photo")
        except FaceSnapError as error:
            check_sentence(error)
        else:
            assert photo.pixels.dtype == np.uint8
            assert sorted(photo.pixels.shape[:2]) == sorted(size)


@fuzz
@given(st.data())
def test_base64_and_data_urls(data):
    encoded = base64.b64encode(data.draw(st.sampled_from(corpus.photos()[:6]))).decode()
    parts = [
        "data:",
        "image/png",
        ";base64,",
        ";charset=utf-8",
        ",",
        ";",
        " ",
        "\n",
        "=",
        "%3D",
        "\N{SNOWMAN}",
        "\ud800",
    ]
    text = "".join(data.draw(st.lists(st.sampled_from([*parts, "DATA:", "BASE64", encoded]), max_size=7)))
    text = data.draw(
        st.sampled_from([text, text + encoded, text * 2000, encoded[: len(encoded) // 2] + text + encoded])
    )
    with only_reading(folder()):
        refused(PhotoReader().read, text, "Photo")


@fuzz
@given(st.data())
def test_uploads(data):
    """What a client sends in place of uploaded files: nothing but files in gradio's folder is opened."""
    cache_folder, outside = upload_folder()
    paths = [str(path) for path in sorted(cache_folder.iterdir())]
    paths += [str(outside), NOT_OURS, f"{cache_folder}/../{outside.name}", "..", "", "\0", "x" * 5000, "\ud800", "~"]
    values = json_values(st.sampled_from(paths))
    names = ("name", "path", "data", "is_file", "orig_name", "size")
    file = st.fixed_dictionaries({}, optional=dict.fromkeys(names, values | st.sampled_from(paths) | st.booleans()))
    payload = data.draw(st.lists(file | values, max_size=4) | file | values)
    with only_reading(folder()):
        accepted = uploads(payload, cache_folder)
        for one in accepted:
            assert not isinstance(one.content, Path) or one.content.parent == cache_folder.resolve()
            assert one.name.isprintable()
            assert len(one.name) <= MAX_NAME
        refused(reference_photos, accepted)


@cache
def upload_folder() -> tuple[Path, Path]:
    """Gradio's folder of uploaded files with odd entries, and a photo that is not in it."""
    base = new_folder()
    outside, inside = base / "secret.png", base / "gradio"
    inside.mkdir()
    outside.write_bytes(corpus.photos()[0])
    (inside / "photo.png").write_bytes(corpus.photos()[0])
    (inside / "broken.png").write_bytes(corpus.photos()[0][:40])
    (inside / "link.png").symlink_to(outside)
    (inside / "loop.png").symlink_to(inside / "loop.png")
    (inside / "folder.png").mkdir()
    os.mkfifo(inside / "pipe.png")
    return inside, outside


@fuzz
@given(st.data())
def test_saved_identities(data):
    """Identity files with changed bits, sizes, types and metadata, whose digest may be right, and odd names."""
    models = identities()
    identity = corpus.identity()
    path = models / "identities" / "Ada.safetensors"
    path.unlink(missing_ok=True)
    identity_file.save(path, identity)
    content = path.read_bytes()
    kind = data.draw(st.sampled_from(["bit", "bytes", "sizes"]))
    if kind == "bit":
        at = data.draw(st.integers(0, 8 * len(content) - 1))
        content = content[: at // 8] + bytes([content[at // 8] ^ 1 << at % 8]) + content[at // 8 + 1 :]
    elif kind == "bytes":
        content = data.draw(mutated([content]))
    else:
        header, _ = corpus.safetensors_headers(content)
        tensors, metadata = load(content), header["__metadata__"]
        sizes = st.lists(st.sampled_from([0, 1, 2, 3, 8, 16]), max_size=4)
        for name in data.draw(st.lists(st.sampled_from([*tensors, "more"]), max_size=2, unique=True)):
            dtype = data.draw(st.sampled_from([torch.float32] * 4 + [torch.float16, torch.int64]))
            tensors[name] = torch.full(data.draw(sizes), data.draw(st.sampled_from([1.0, 0.0, torch.nan]))).to(dtype)
        if data.draw(st.booleans()):
            field = data.draw(st.sampled_from(sorted(metadata)))
            metadata[field] = data.draw(
                st.sampled_from(["", "1", "[]", "{}", "[" * 5000, '["0123456789"]', "x" * 5000])
            )
        metadata["digest"] = identity_file._digest(tensors, metadata)
        content = save(tensors, metadata)
    path.write_bytes(content)
    with only_reading(models):
        find_identities(models)
        refused(choose_identity, models, data.draw(st.sampled_from(NAMES)))
        message = refused(identity_file.load, path)
        if kind == "bit":
            assert message is not None
        if message is None:
            loaded = identity_file.load(path)
            assert loaded.embeddings.isfinite().all()
            assert len(loaded.embeddings) == len(loaded.photos)
    name = data.draw(st.sampled_from(NAMES) | st.text(max_size=20))
    with only_reading(models, may_change=True):
        if refused(identity_file.safe_name, name) is None:
            place = models / "identities" / "new" / f"{identity_file.safe_name(name)}.safetensors"
            identity_file.save(place, replace(identity, name=name), overwrite=True)
            assert refused(identity_file.load, place) is None
            place.unlink()


@cache
def identities() -> Path:
    models = new_folder()
    (models / "identities" / "new").mkdir(parents=True)
    return models


class Connection:
    """A fake of requests' adapter: returns the answers that were drawn, and then none."""

    answers: list[Any]

    def send(self, adapter: Any, request: Any, **options: Any) -> Any:
        from requests import ConnectionError as NoConnection
        from requests import Response
        from urllib3 import HTTPResponse

        if not self.answers:
            raise NoConnection("no more answers")
        status, headers, body = self.answers.pop(0)
        response = Response()
        response.status_code, response.url, response.request = status, request.url, request
        response.headers.update(headers)
        response.raw = HTTPResponse(io.BytesIO(body), headers=headers, status=status, preload_content=False)
        return response


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from requests.adapters import HTTPAdapter

    fake = Connection()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HTTPAdapter, "send", lambda adapter, request, **options: fake.send(adapter, request, **options))
        patch.setattr(download, "WAIT", 0)
        patch.setattr(connection, "POLL", 0.01)
        yield fake


@sample(60)
@given(data=st.data())
def test_downloads(data, server):
    """Answers of a server or a proxy with any status, headers and body; received data is kept or complete."""
    content = bytes(range(256)) * 4
    place = download_folder()
    part = Server(content, "https://host.invalid/thing.bin").part()
    target, arrived = place / part.target, (place / part.target).with_name(".thing.bin.part")
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    kept = data.draw(st.sampled_from([0, 1, 100, len(content) - 1, len(content)]))
    arrived.write_bytes(content[:kept])
    if not kept:
        arrived.unlink()
    server.answers = data.draw(st.lists(answer(content, kept), max_size=5))
    stops = data.draw(st.sampled_from([None, None, None, 0, 1, 3]))
    calls = iter(range(10**6))
    with only_reading(place, may_change=True):
        try:
            path = download.download(part, place, lambda done: None, lambda: stops is not None and next(calls) >= stops)
        except FaceSnapError as error:
            check_sentence(error)
            assert isinstance(error, Stopped) or "the thing" in str(error) or "thing.bin" in str(error)
            assert not target.exists()
            assert "was deleted" in str(error) or kept == 0 or arrived.read_bytes().startswith(content[:kept])
        else:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == part.sha256


@cache
def download_folder() -> Path:
    return new_folder()


@st.composite
def answer(draw: st.DrawFn, content: bytes, kept: int) -> tuple[int, dict[str, str], bytes]:
    status = draw(st.sampled_from([200, 200, 206, 206, 204, 301, 302, 304, 307, 401, 404, 416, 429, 500, 503, 999]))
    odd = ["", "-1", "0", "1e3", "\N{ARABIC-INDIC DIGIT ONE}", "9" * 30, "nan", "bytes", "\xff"]
    lengths = [str(len(content)), str(len(content) - kept), *odd]
    ranges = [f"bytes {start}-{len(content) - 1}/{total}" for start in (0, kept, 7) for total in (len(content), "*", 5)]
    places = [
        "https://host.invalid/other",
        "http://host.invalid/",
        "//[",
        "/relative",
        "file:///etc/passwd",
        "\0",
        "ftp://x",
    ]
    choices = {
        "Content-Length": lengths,
        "Content-Range": [*ranges, *odd],
        "Location": [
            *places,
            "https://",
            "javascript:alert(1)",
            "https://\N{SNOWMAN}",
            "x" * 5000,
            "https://a:b:c/",
            *odd,
        ],
        "Content-Type": ["application/octet-stream", "text/html", "application/json", *odd],
        "Content-Encoding": ["gzip", "identity", *odd],
    }
    headers = draw(
        st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in choices.items()})
    )
    if draw(st.booleans()):
        headers.pop("Content-Encoding", None)
    body = draw(
        st.sampled_from([content[kept:], content, content[kept : kept + 9], b"", content * 3, b"{}", b"<html>"])
    )
    return status, headers, body
