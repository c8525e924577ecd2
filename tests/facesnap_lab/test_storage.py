"""Files in an object store, which may fail for a while, are read and written completely, and without any secrets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from facesnap_ext.errors import FaceSnapError
from facesnap_lab import storage
from facesnap_lab.storage import Url, file_names, location, read_range, redact, write
from tests.support.s3_server import BUCKET, SECRET, S3Server, s3_server

pytest.importorskip("moto")
s3fs = pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def server(running: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    monkeypatch.setattr(storage, "WAITS", (0.01, 0.02, 0.03))
    running.fail = 0
    running.requests.clear()
    yield running
    running.fail = 0


def put(url: Url, data: bytes) -> Url:
    with write(url) as file:
        file.write(data)
    return url


def test_files_are_written_listed_read_and_deleted(server):
    folder = location(f"s3://{BUCKET}/a/")
    assert str(folder) == f"s3://{BUCKET}/a"
    for name in ("one.tar", "two.tar", "sub/three.txt", "ünd ?#.txt"):
        put(folder / name, name.encode())
    put(location(f"s3://{BUCKET}/ab"), b"not in the folder")
    assert folder.list_files() == {"one.tar": 7, "two.tar": 7, "sub/three.txt": 13, "ünd ?#.txt": 11}
    assert file_names(folder) == {"one.tar", "two.tar", "ünd ?#.txt"}
    assert folder.glob("*.tar") == [folder / "one.tar", folder / "two.tar"]
    assert (folder / "ünd ?#.txt").read_text(encoding="utf-8") == "ünd ?#.txt"
    assert read_range(folder / "one.tar", 1, 4) == b"ne."
    assert (folder / "two.tar").size() == 7
    assert [(folder / name).exists() for name in ("one.tar", "three.tar")] == [True, False]
    (folder / "sub").delete()
    assert "sub/three.txt" not in folder.list_files()
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(f"{BUCKET}/a/five.tar", b"from another machine")
    assert (folder / "five.tar").exists()
    assert folder.list_files()["five.tar"] == 20


def test_missing_file_is_the_same_error_as_for_a_path(server):
    url = location(f"s3://{BUCKET}/nothing/here.txt")
    for read in (url.read_bytes, url.size, lambda: url.read_range(0, 1)):
        with pytest.raises(FileNotFoundError) as error:
            read()
        assert (error.value.filename, error.value.strerror) == (str(url), "No such file or directory")


@pytest.mark.parametrize(
    "use",
    [
        Url.read_bytes,
        Url.size,
        Url.exists,
        lambda url: url.read_range(0, 2),
        lambda url: url.parent.list_files(),
        lambda url: url.parent.glob("*"),
        lambda url: put(url, b"new"),
        Url.delete,
    ],
)
def test_store_that_fails_for_a_while_is_tried_again_and_then_named(use, server):
    url = put(location(f"s3://{BUCKET}/retry/file"), b"old")
    server.fail = 3
    use(url)
    assert server.fail == 0
    put(url, b"old")
    server.fail = 1000
    with pytest.raises(FaceSnapError, match=rf"^s3://{BUCKET}/retry.* cannot be .*Service Unavailable.*; check the"):
        use(url)


@pytest.mark.parametrize("target", ["path", "url"])
def test_failed_write_leaves_the_old_file(target, server, tmp_path):
    url = tmp_path / "file" if target == "path" else location(f"s3://{BUCKET}/atomic/file")
    put(url, b"old")
    with pytest.raises(ZeroDivisionError), write(url) as file:
        file.writelines(b"half of the new"[: 7 // number] for number in (1, 0))
    assert url.read_bytes() == b"old"
    assert file_names(url.parent) == {"file"}


@pytest.mark.parametrize("kind", [PermissionError, type("NoCredentialsError", (Exception,), {})])
def test_denied_access_is_reported_at_once(kind, monkeypatch):
    def deny(url):
        raise kind("denied")

    monkeypatch.setattr(storage, "WAITS", (100,))
    monkeypatch.setattr(storage, "_file_system", deny)
    with pytest.raises(FaceSnapError, match=r"^s3://bucket/file cannot be read \(denied\); check"):
        location("s3://bucket/file").read_bytes()


@pytest.mark.parametrize(
    "url",
    [
        f"s3://key:{SECRET}@bucket/folder",
        f"https://example.com/x.tar?a=1&X-Amz-Signature={SECRET}&b=2",
        f"abfs://container@account/x?sig={SECRET}",
    ],
)
def test_url_with_credentials_is_rejected_without_showing_them(url):
    with pytest.raises(FaceSnapError, match="contains credentials; put them where") as error:
        location(url)
    assert SECRET not in str(error.value)


def test_errors_of_a_store_show_no_credentials(monkeypatch):
    def fail(url):
        raise OSError(f"no connection to http://user:{SECRET}@proxy/x and https://h/x?token={SECRET}&b=1")

    monkeypatch.setattr(storage, "_file_system", fail)
    monkeypatch.setattr(storage, "WAITS", ())
    with pytest.raises(FaceSnapError, match=r"http://…@proxy/x and https://h/x\?token=…&b=1") as error:
        Url("s3://bucket/x").read_bytes()
    assert error.value.__cause__ is None
    assert SECRET not in str(error.value)


def test_missing_package_of_a_store_is_named():
    with pytest.raises(FaceSnapError, match=r"^gs://bucket/x requires another package \(.*gcsfs.*\); install it\.$"):
        location("gs://bucket/x").read_bytes()


@pytest.mark.parametrize("text", ["photos", "/tmp/a b", "C:\\photos", "./s3:/x", "a:b"])
def test_paths_are_not_urls(text):
    assert location(text) == Path(text)


@pytest.mark.skipif(os.name == "nt", reason="a Windows path has a drive")
def test_file_url_is_a_path():
    assert location("file:///tmp/a%20b") == Path("/tmp/a b")


def test_text_without_secrets_is_unchanged():
    for text in ("s3://bucket/shard-00000?.tar", "sftp://me@host/x", "a@b", "what? key = 3"):
        assert redact(text).replace("…@", "me@") == text
