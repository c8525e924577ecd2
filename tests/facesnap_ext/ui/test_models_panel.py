"""The panel of model files: its contents, and the effect of its buttons."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace

import pytest

from facesnap_ext.weights import catalogue, download
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.model_list import compute_hashes, list_models
from facesnap_ext.weights.search import find_models
from tests.support.face_packs import PACKS, write_pack
from tests.support.panel import NestedTags, OwnTags, mocked_panel
from tests.support.parts_server import serve
from tests.support.weight_files import KINDS, write


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The module with a mock of gradio."""
    with mocked_panel(tmp_path) as module:
        monkeypatch.setattr(module, "POLL_INTERVAL", 0.01)
        monkeypatch.setattr(download, "_jobs", {})
        yield module


class Panel:
    """The panel of a folder, with the responses to its buttons."""

    def __init__(self, module, folder):
        files = ModelFiles(folder)
        needed = module.starter.missing(files)
        top = module.top(files, needed, lambda name: name)
        module.panel(files, needed, lambda: find_models(folder), lambda name: name, "status", top)
        (self.stop, *_), (self.act, _, self.outputs) = top[-1].listeners

    def click(self, action):
        """The updates of the starter, the progress, the list and the status."""
        self.stop(f"{action} 1")
        return self.act(f"{action} 1")


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
    assert OwnTags(module.status_html(files, module.starter.missing(files)))
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
        assert f"{part.licence} :  {part.use}" in text
    for role in roles:
        assert all(file.sha256[:12] in text for model in role.found for file in model.files)
    assert str(other / "h.safetensors") in text
    assert text.count("notes.safetensors is damaged") == 1
    assert all(gap in text for gap in catalogue.COMMERCIAL_GAPS)
    assert states(html) == {
        "InstantID": "optional",
        "Face model pack": "needed",
        "FaceSnap file": "installed",
        "CLIP-ViT-H": "installed",
        **dict.fromkeys(("DECA", "FLAME", "MediaPipe's landmarks", "Image classifier"), "optional"),
    }


def states(html):
    return dict(re.findall(r"<b>([^<]*)</b> <span class='facesnap-badge' data-state='(\w+)'>", html))


def words(html):
    return "".join(NestedTags(html).text)


def actions(html):
    return re.findall(r"data-facesnap-action='([^']*)'", html)


def test_nothing_that_nobody_has_published_is_needed(module, tmp_path):
    """An empty installation needs the parts of the starter, and each of them has a download button."""
    files = ModelFiles(tmp_path)
    html = module.html(list_models(files), files, module.starter.missing(files))
    found = states(html)
    assert len(found) == len(catalogue.ROLES)
    assert {name for name, state in found.items() if state == "needed"} == {"InstantID", "Face model pack"}
    assert set(found.values()) == {"needed", "optional"}
    assert actions(html) == ["get instantid", "get antelopev2", "refresh", "hash"]
    assert "none has been published yet" in html


def test_instantid_and_antelopev2_are_a_complete_installation(module, tmp_path):
    pytest.importorskip("onnx")
    write_instantid(tmp_path)
    write_pack(tmp_path / "antelopev2", "antelopev2")
    files = find_models(tmp_path)
    from facesnap_ext.ui import accordion

    needed = module.starter.missing(files)
    assert needed == ()
    assert module.status_html(files, needed) == ""
    assert "facesnap-problem" not in accordion.status(files, needed)
    html = module.html(list_models(files), files, needed)
    assert "facesnap-problem" not in html
    assert {name for name, state in states(html).items() if state == "installed"} == {"InstantID", "Face model pack"}
    assert "needed" not in states(html).values()
    assert actions(html) == ["refresh", "hash"]


def test_instantid_needs_antelopev2_although_a_different_pack_is_installed(module, tmp_path):
    pytest.importorskip("onnx")
    write_instantid(tmp_path)
    write_pack(tmp_path / "buffalo_l", "buffalo_l")
    files = find_models(tmp_path)
    needed = module.starter.missing(files)
    assert {part.role for part in needed} == {"face_pack"}
    assert states(module.html(list_models(files), files, needed))["Face model pack"] == "needed"


def test_the_status_mentions_mediapipes_landmarks_where_they_are_in_use(module, tmp_path):
    pytest.importorskip("onnx")
    from facesnap_ext.ui import accordion

    for name in ("antelopev2", "AuraFace"):
        write_pack(tmp_path / name, name)
    (tmp_path / "face_landmarks.onnx").touch()
    for pack, in_use in (("antelopev2", False), ("AuraFace", True)):
        files = ModelFiles(tmp_path, face_pack=tmp_path / pack, mediapipe=tmp_path / "face_landmarks.onnx")
        assert ("fitted to MediaPipe's landmarks (face_landmarks.onnx)" in words(accordion.status(files))) == in_use


def write_instantid(folder):
    write(folder / "ip-adapter.bin", KINDS["INSTANTID_ADAPTER"], "torch")
    write(folder / "net.safetensors", KINDS["SDXL_CONTROLNET"])


def test_the_download_button_shows_progress_and_then_the_new_state(module, tmp_path, monkeypatch):
    pytest.importorskip("requests")
    with serve(b"x" * 1000) as server:
        server.hold = threading.Event()
        monkeypatch.setattr(catalogue, "PARTS", (*catalogue.PARTS, server.part()))
        panel = Panel(module, tmp_path)
        steps = panel.click("get thing")
        begin, progress, *_ = next(steps)
        assert (
            "FaceSnap needs these files before it can generate an image. Nothing is downloaded until you click."
            in words(begin)
        )
        assert "the thing: " in words(progress)
        assert "<progress max='100'" in progress
        begin, progress, *others = next(steps)
        assert "the thing: " in words(progress)
        assert begin == {}, "nothing else is drawn again, so that buttons can be clicked"
        assert others == [{}] * 2
        server.hold.set()
        *_, (begin, progress, table, status) = steps
    assert words(progress) == "Downloaded: the thing"
    assert table.startswith("<div class='facesnap-models' ")
    assert status == "", "the top of the accordion still says what is needed"
    assert (tmp_path / "things" / "thing.bin").is_file()


def test_a_running_download_can_be_paused_at_the_top_and_in_its_row(module, tmp_path, monkeypatch):
    jobs = [download.Job("starter", catalogue.downloadable("starter"), done=10)]
    monkeypatch.setattr(download, "jobs", lambda: jobs)
    files = ModelFiles(tmp_path)
    needed = module.starter.missing(files)
    assert actions(module.status_html(files, needed)) == ["stop"]
    html = module.html(list_models(files), files, needed)
    assert actions(html) == ["stop", "stop", "refresh", "hash"]
    assert html.count("data-facesnap-progress='starter'") == 2
    assert "data-facesnap-job='starter'" in module.progress_html(jobs)
    Panel(module, tmp_path).stop("refresh 1")
    assert not jobs[0].stop.is_set()
    Panel(module, tmp_path).stop("stop 2")
    assert jobs[0].stop.is_set()


def test_a_new_page_follows_a_running_download_and_forgets_finished_ones(module, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POLL_INTERVAL", 0)
    parts = catalogue.downloadable("starter")
    running, finished = download.Job("starter", parts), download.Job("x", parts[:1], state="done", message="x: done.")
    monkeypatch.setattr(download, "jobs", lambda: [finished, running])
    steps = Panel(module, tmp_path).click("refresh")
    begin, progress, *_ = next(steps)
    assert "The files are being downloaded." in begin
    assert "InstantID, antelopev2: " in words(progress)
    assert "x: done." not in progress
    running.done = 100
    assert "100 bytes / " in next(steps)[1]
    running.state, running.message = "done", "InstantID and antelopev2: downloaded."
    assert words(list(steps)[-1][1]) == "Downloaded: InstantID, antelopev2"
    *_, (_, progress, *_) = Panel(module, tmp_path).click("refresh")
    assert progress == ""


def test_the_panel_shows_why_a_download_failed(module, tmp_path, monkeypatch):
    pytest.importorskip("requests")
    with serve(b"x" * 1000) as server:
        monkeypatch.setattr(catalogue, "PARTS", (*catalogue.PARTS, server.part(b"y" * 1000)))
        panel = Panel(module, tmp_path)
        *_, (_, progress, *_) = panel.click("get thing")
        assert "not the expected file" in progress
        assert "facesnap-problem" in progress
        ((_, progress, *_),) = panel.click("get nothing")
        assert "There is no part named" in progress


def test_creating_and_refreshing_the_panel_downloads_nothing(module, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "start", lambda *args: pytest.fail("a download was started"))
    panel = Panel(module, tmp_path)
    for action in ("refresh", "stop", "hash", ""):
        ((_, progress, table, *_),) = panel.click(action)
        assert progress == ""
        assert str(tmp_path) in table


def test_an_empty_installation_is_examined_once_to_draw_it(module, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(module.starter, "downloadable", lambda name: calls.append(name) or ())
    Panel(module, tmp_path)
    assert calls == ["starter"]


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
            write_instantid(tmp_path)
    files = find_models(tmp_path)
    starter = module.starter
    parts = starter.missing(files)
    text = starter.html(files, parts)
    assert (words(starter.label(parts)) if expected else text) == expected
    assert actions(text) == (["get"] if expected else [])
    for part in parts:
        assert str(tmp_path / part.target) in text
        assert part.licence in text
