"""Uploads: the page reads files that were uploaded to it, and no others, regardless of what a client names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from facesnap_ext import photos
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.photos import MAX_NAME, NamedFile, TooManyPhotosError, file_title, titles_of
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
    return [{"name": path, "orig_name": "portrait.png", "size": 8, "data": None, "is_file": True}]


def of_gradio_4(path):
    return SimpleNamespace(root=[SimpleNamespace(path=path, url=None, orig_name="portrait.png", size=8)])


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
def test_an_uploaded_file_is_passed_by_its_path_and_the_users_name(folders, form):
    path = folders / "upload" / "photo.png"
    assert uploads(form(str(path)), folders) == [NamedFile(path.resolve(), "portrait.png")]


def test_a_file_without_the_users_name_is_called_as_it_was_stored(folders):
    path = folders / "upload" / "photo.png"
    assert uploads([{"name": str(path), "is_file": True}], folders)[0].name == "photo.png"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", FOREIGN)
def test_no_other_file_is_read_whatever_path_a_client_names(folders, form, path, monkeypatch):
    monkeypatch.chdir(folders.parent)
    path = path.replace("{folder}", str(folders)) if isinstance(path, str) else path
    (refused,) = uploads(form(path), folders)
    assert isinstance(refused.content, FaceSnapError)
    with pytest.raises(FaceSnapError, match=r"^portrait\.png has not been uploaded to this page, or has been deleted"):
        reference_photos([refused])


@pytest.mark.parametrize("payload", [None, [], SimpleNamespace(root=[])])
def test_no_files_are_no_uploads(folders, payload):
    assert uploads(payload, folders) == []


@pytest.mark.parametrize("payload", [[None], [3], ["/etc/passwd"], "/etc/passwd", [[]], {"name": None}])
def test_malformed_payloads_are_refused(folders, payload):
    assert all(isinstance(one.content, FaceSnapError) for one in uploads(payload, folders))


def test_contents_in_place_of_a_path_are_base64(folders):
    sent = [{"name": "/etc/passwd", "data": "data:image/png;base64,aGVsbG8=", "is_file": False}]
    assert uploads(sent, folders) == [NamedFile("data:image/png;base64,aGVsbG8=", "passwd")]


@pytest.mark.parametrize("attribute", ["DEFAULT_TEMP_DIR", "GRADIO_CACHE"])
def test_the_component_reads_from_the_folder_of_its_gradio(folders, attribute):
    """This also applies to the components that gradio 4 makes of the same class after an update."""
    component = accept_only_uploads(type("File", (), {attribute: str(folders)})())
    path = folders / "upload" / "photo.png"
    for one in (component, type(component)()):
        assert one.preprocess(of_gradio_3(str(path))) == [NamedFile(path.resolve(), "portrait.png")]
    assert type(component).__name__ == "File"


def test_too_many_uploads_are_refused_before_any_is_read(monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    with pytest.raises(TooManyPhotosError, match="more than 100 photos"):
        reference_photos([Path("photo.png")] * 101)


def test_too_large_files_are_refused_before_they_are_read(folders, monkeypatch):
    monkeypatch.setattr(photos, "MAX_BYTES", 7)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    with pytest.raises(FaceSnapError, match="Reference photo 1 is larger than"):
        reference_photos([folders / "upload" / "photo.png"])


@given(st.text(max_size=300) | st.text("ab/\\\\.\u202e\n\x00\ud800é", max_size=80))
@example("../../etc/passwd")
@example("C:\\\\fakepath\\\\photo.png")
@example("a" * 300 + ".jpeg")
@example("x\u202egnp.exe")
def test_any_file_name_becomes_one_short_visible_line(name):
    title = file_title(name)
    assert len(title) <= MAX_NAME
    assert title.isprintable()
    assert not set(title) & set("/\\")
    assert title == title.strip()
    assert file_title(title) == title
    assert title or not any(letter.isalnum() for letter in name.replace("\\", "/").rsplit("/", 1)[-1])


@pytest.mark.parametrize("name", [None, 3, {}, ["a.png"], True])
def test_names_that_are_not_text_are_no_names(name):
    assert file_title(name) == ""


def test_file_names_stay_readable():
    assert file_title("Jürgen am See (2).JPG") == "Jürgen am See (2).JPG"
    assert (
        file_title("a long name of a photo taken on a long holiday.jpeg") == "a long name of a photo tak…holiday.jpeg"
    )


@given(st.lists(st.sampled_from(["", "a.png", "a.png (2)", "b.png"]), max_size=8))
def test_photos_have_different_names_in_their_order(names):
    titles = titles_of([NamedFile(Path("x"), name) for name in names], "Reference photo")
    assert len(set(titles)) == len(names)
    for number, (title, name) in enumerate(zip(titles, names), 1):
        assert title.startswith(name) if name else title == f"Reference photo {number}"
    seen = [name for i, name in enumerate(names) if name and name not in names[:i]]
    assert [title for title in titles if title in seen] or not seen


def test_a_photo_with_a_known_name_is_called_by_it_in_errors():
    given = [NamedFile("bm90IGEgcGljdHVyZQ==", "portrait.jpg"), "bm90IGEgcGljdHVyZQ=="]
    with pytest.raises(FaceSnapError, match=r"^portrait\.jpg is not a readable .* Reference photo 2 is not a readable"):
        reference_photos(given)
