"""Uploads: the page reads files that were uploaded to it, and no others, regardless of what a client names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from facesnap_ext import photos
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.photos import TooManyPhotosError
from facesnap_ext.settings.script_args import reference_photos
from facesnap_ext.ui.uploads import accept_only_uploads, uploads


@pytest.fixture
def folders(tmp_path: Path):
    """Gradio's folder with an uploaded file, and other files around it."""
    folder = tmp_path / "gradio"
    (folder / "upload").mkdir(parents=True)
    (folder / "upload" / "photo.png").write_bytes(b"uploaded")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "gradio2").mkdir()
    (tmp_path / "gradio2" / "secret.png").write_bytes(b"secret")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    return folder


def of_gradio_3(path):
    return [{"name": path, "orig_name": "photo.png", "size": 8, "data": None, "is_file": True}]


def of_gradio_4(path):
    return SimpleNamespace(root=[SimpleNamespace(path=path, url=None, orig_name="photo.png", size=8)])


def one_file(path):
    return of_gradio_3(path)[0]


FORMS = [of_gradio_3, of_gradio_4, one_file]
FOREIGN = [
    "/etc/passwd",
    "{folder}/../secret.png",
    "{folder}/upload/../../secret.png",
    "{folder}2/secret.png",
    "{folder}/link.png",
    "{folder}/loop.png",
    "{folder}/upload",
    "{folder}",
    "{folder}/gone.png",
    "secret.png",
    "http://example.org/a.png",
    "file://{folder}/upload/photo.png",
    "\x00",
    "~",
    "",
    "x" * 5000,
    None,
    3,
    {},
    ["{folder}/upload/photo.png"],
]


@pytest.mark.parametrize("form", FORMS)
def test_an_uploaded_file_is_passed_by_its_path(folders, form):
    path = folders / "upload" / "photo.png"
    assert uploads(form(str(path)), folders) == [path.resolve()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", FOREIGN)
def test_no_other_file_is_read_whatever_path_a_client_names(folders, form, path, monkeypatch):
    monkeypatch.chdir(folders.parent)
    path = path.replace("{folder}", str(folders)) if isinstance(path, str) else path
    (refused,) = uploads(form(path), folders)
    assert isinstance(refused, FaceSnapError)
    with pytest.raises(FaceSnapError, match="Reference photo 1 has not been uploaded to this page, or is gone"):
        reference_photos([refused])


@pytest.mark.parametrize("payload", [None, [], SimpleNamespace(root=[])])
def test_no_files_are_no_uploads(folders, payload):
    assert uploads(payload, folders) == []


@pytest.mark.parametrize("payload", [[None], [3], ["/etc/passwd"], "/etc/passwd", [[]], {"name": None}])
def test_malformed_payloads_are_refused(folders, payload):
    assert all(isinstance(one, FaceSnapError) for one in uploads(payload, folders))


def test_contents_in_place_of_a_path_are_base64(folders):
    sent = [{"name": "/etc/passwd", "data": "data:image/png;base64,aGVsbG8=", "is_file": False}]
    assert uploads(sent, folders) == ["data:image/png;base64,aGVsbG8="]


@pytest.mark.parametrize("attribute", ["DEFAULT_TEMP_DIR", "GRADIO_CACHE"])
def test_the_component_reads_from_the_folder_of_its_gradio(folders, attribute):
    component = accept_only_uploads(SimpleNamespace(**{attribute: str(folders)}))
    path = folders / "upload" / "photo.png"
    assert component.preprocess(of_gradio_3(str(path))) == [path.resolve()]


def test_too_many_uploads_are_refused_before_any_is_read(monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    with pytest.raises(TooManyPhotosError, match="more than 100 photos"):
        reference_photos([Path("photo.png")] * 101)


def test_too_large_files_are_refused_before_they_are_read(folders, monkeypatch):
    monkeypatch.setattr(photos, "MAX_BYTES", 7)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    with pytest.raises(FaceSnapError, match="Reference photo 1 is larger than"):
        reference_photos([folders / "upload" / "photo.png"])
