"""The panel of model files: its contents, and the effect of its buttons."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from typing import ClassVar

import pytest

from facesnap_ext.weights import catalogue, download
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.model_list import compute_hashes, list_models
from facesnap_ext.weights.search import find_models
from tests.support import mock_webui
from tests.support.face_packs import PACKS, write_pack
from tests.support.panel import NestedTags, OwnTags, mocked_panel
from tests.support.parts_server import serve
from tests.support.weight_files import KINDS, write

LISTS = ["list", "list of person 2"]  # of FaceSnap files


class Clicks(mock_webui.Component):
    """Components that record what a click calls."""

    by_id: ClassVar[dict[str, Clicks]] = {}

    def __init__(self, *args, **values):
        super().__init__(*args, **values)
        self.by_id[values["elem_id"]] = self

    def click(self, function, inputs, outputs, **options):
        self.function, self.outputs = function, outputs


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The module with a mock of gradio."""
    with mocked_panel(tmp_path) as module:
        monkeypatch.setattr(module, "POLL_INTERVAL", 0.01)
        monkeypatch.setattr(Clicks, "by_id", {})
        for name in ("Button", "HTML"):
            monkeypatch.setattr(module.gr, name, Clicks)
        monkeypatch.setattr(download, "_jobs", {})
        yield module


def draw(module, folder, monkeypatch):
    monkeypatch.setattr(module.starter, "downloadable", lambda bundle: catalogue.PARTS)
    top = module.starter.Controls("text", "progress", Clicks(elem_id="get"), Clicks(elem_id="pause"))
    module.panel(ModelFiles(folder), lambda: ModelFiles(folder), lambda name: name, "status", LISTS, top)


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "'><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "<\x2ftable><\x2fdiv><iframe src=javascript:alert(1)>",
    "&lt;script&gt;",
    "</code><a href=javascript:alert(1)>x",
    "<!--",
    "\u202egnp.exe",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_never_becomes_markup(module, tmp_path, text, monkeypatch):
    """The text is in names of files and folders, metadata, stored hashes and the outcome of downloads."""
    name = text.replace("/", "\u2215")  # this character looks like a slash
    own, other = tmp_path / name, tmp_path / f"other {name}"
    own.mkdir()
    other.mkdir()
    facesnap = write(own / f"{name}.safetensors", {"ffrnet.x": (1,)}, format="facesnap", license=text, source=text)
    (own / f"damaged {name}.safetensors").write_bytes(text.encode())
    pack = own / f"pack {name}"
    pack.mkdir()
    for file in ("scrfd_10g_bnkps.onnx", f"glintr100 {name}.onnx"):
        (pack / file).touch()
    write(other / f"{name}.safetensors", KINDS["CLIP_VISION"])
    state = facesnap.stat()
    (own / "hashes.json").write_text(json.dumps({str(facesnap): [state.st_size, state.st_mtime_ns, text]}))
    files = find_models(own, [other])
    roles = list_models(files)
    html = module.html(roles, files)
    shown = "".join(OwnTags(html).text)
    assert name in shown
    assert str(own) in shown
    from facesnap_ext.ui import accordion

    OwnTags(accordion.status(files))
    part = replace(catalogue.PARTS[-1], title=text, page="https://example.org/'\"<", note=text, licence=text)
    OwnTags(module._option(part))
    for state in ("done", "failed", "stopped"):
        OwnTags(module.progress_html([download.Job(part.name, (part,), state=state, message=text)]))
    role = replace(roles[0], found=tuple(replace(model, kind=text, licence=text) for model in roles[0].found))
    role = replace(role, purpose=text)
    poisoned = [replace(file, sha256=text, verdict=text, name=text) for file in role.found[0].files]
    OwnTags(module.html([replace(role, found=(replace(role.found[0], files=tuple(poisoned)),))], files))


def test_the_panel_lists_everything_known_and_escapes_foreign_text(module, tmp_path):
    own = tmp_path / "<b>own"
    own.mkdir()
    write(own / "a.safetensors", {"ffrnet.x": (1,)}, format="facesnap", license="<script>alert(1)</script>")
    (own / "notes.safetensors").write_bytes(b"notes")
    other = tmp_path / "other"
    other.mkdir()
    write(other / "h.safetensors", KINDS["CLIP_VISION"])
    files = find_models(own, [other])
    compute_hashes(files)
    roles = list_models(files)
    html = module.html(roles, files)
    assert "<script>" not in html
    text = " ".join(NestedTags(html).text)
    for part in catalogue.PARTS:
        assert part.title in text
        assert f"{part.licence}: {part.use}" in text
    for role in roles:
        assert all(file.sha256[:12] in text for model in role.found for file in model.files)
    assert str(other / "h.safetensors") in text
    assert text.count("missing") == sum(role.needed and bool(role.missing) for role in roles) == 1
    assert text.count("notes.safetensors is damaged") == 1
    assert all(gap in text for gap in catalogue.COMMERCIAL_GAPS)
    assert len(re.findall("<tr>", html)) == 1 + len(roles)


def test_the_download_button_shows_progress_and_then_the_new_state(module, tmp_path, monkeypatch):
    pytest.importorskip("requests")
    with serve(b"x" * 1000) as server:
        server.hold = threading.Event()
        monkeypatch.setattr(catalogue, "PARTS", (server.part(),))
        monkeypatch.setattr(module, "PARTS", (server.part(),))
        draw(module, tmp_path, monkeypatch)
        steps = Clicks.by_id["models_get_thing"].function()
        progress, *others = next(steps)
        assert "the thing: " in progress
        assert "<progress max='100'" in progress
        assert others == [{}] * 5 + [progress, {"visible": False}, {"visible": True}]  # {}: no change
        assert server.requested == [] or len(server.requested) == 1
        server.hold.set()
        *_, (progress, table, status, *lists, text, again, get, pause) = steps
    assert "the thing: downloaded to " in progress
    assert table.startswith("<div class='facesnap-models'>")
    assert "Model files found: none" in status
    assert again == progress
    assert "FaceSnap needs these files for its first image" in text
    assert get["visible"]
    assert not pause["visible"]
    assert lists == [{"choices": [""]}] * 2
    assert (tmp_path / "things" / "thing.bin").is_file()


def test_the_panel_shows_why_a_download_failed(module, tmp_path, monkeypatch):
    pytest.importorskip("requests")
    with serve(b"x" * 1000) as server:
        monkeypatch.setattr(catalogue, "PARTS", (server.part(b"y" * 1000),))
        monkeypatch.setattr(module, "PARTS", catalogue.PARTS)
        draw(module, tmp_path, monkeypatch)
        *_, (progress, *_) = Clicks.by_id["models_get_thing"].function()
        assert "not the expected file" in progress
        assert "facesnap-problem" in progress
        monkeypatch.setattr(catalogue, "PARTS", ())
        ((progress, *_),) = Clicks.by_id["models_get_thing"].function()
        assert "There is no part named" in progress


def test_creating_and_refreshing_the_panel_downloads_nothing(module, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "start", lambda *args: pytest.fail("a download was started"))
    draw(module, tmp_path, monkeypatch)
    progress, table, *_ = Clicks.by_id["models_again"].function()
    assert progress == ""
    assert str(tmp_path) in table
    Clicks.by_id["models_stop"].function()
    buttons = [name for name in Clicks.by_id if name.startswith("models_get_")]
    assert buttons == [f"models_get_{part.name}" for part in catalogue.PARTS if part.url]


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ((), "Download InstantID and antelopev2 (4.61 GB)"),
        (("antelopev2",), "Download InstantID (4.19 GB)"),
        (("buffalo_l",), "Download InstantID and antelopev2 (4.61 GB)"),
        (("instantid",), "Download antelopev2 (421 MB)"),
        (("facesnap",), "Download antelopev2 (421 MB)"),
        (("instantid", "antelopev2"), ""),
        (("facesnap", "buffalo_l"), ""),
    ],
    ids=str,
)
def test_the_starter_downloads_what_a_first_image_lacks(module, tmp_path, installed, expected):
    pytest.importorskip("onnx")
    for name in installed:
        if name in PACKS:
            write_pack(tmp_path / name, name)
        elif name == "facesnap":
            write(tmp_path / "own.safetensors", {"ffrnet.x": (1,)}, format="facesnap")
        else:
            write(tmp_path / "ip-adapter.bin", KINDS["INSTANTID_ADAPTER"], "torch")
            write(tmp_path / "net.safetensors", KINDS["SDXL_CONTROLNET"])
    files = find_models(tmp_path)
    starter = module.starter
    assert (starter.label(starter.missing(files)) if expected else starter.html(files)) == expected
    text = starter.html(files)
    for part in starter.missing(files):
        assert str(tmp_path / part.target) in text
        assert part.licence in text
    assert starter.controls(files, lambda name: name).get.values["visible"] == bool(expected)
