"""Downloads are complete and verified, or absent; received data is not requested again."""

from __future__ import annotations

import errno
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights import catalogue, download
from facesnap_ext.weights.model_files import ModelFiles
from tests.support.parts_server import serve

pytest.importorskip("requests")
CONTENT = random.Random(0).randbytes(300_000)


@pytest.fixture
def server():
    with serve(CONTENT) as server:
        yield server


@pytest.fixture(autouse=True)
def no_delay(monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0)
    monkeypatch.setattr(download, "_jobs", {})
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def stop_early(server, folder):
    """Download a part and stop it when something has been received."""
    received = []
    with pytest.raises(download.Stopped, match=r"stopped at .* of 300 kB; download it again to resume"):
        download.download(server.part(), folder, received.append, lambda: any(received))


def test_download_is_complete_and_reports_progress(server, tmp_path):
    received = []
    path = download.download(server.part(), tmp_path, received.append)
    assert path == tmp_path / "things" / "thing.bin"
    assert path.read_bytes() == CONTENT
    assert files_in(tmp_path) == ["thing.bin"]
    assert received == sorted(received)
    assert (received[0], received[-1]) == (0, len(CONTENT))


def test_existing_file_is_kept_and_another_file_is_not_overwritten(server, tmp_path):
    path = download.download(server.part(), tmp_path)
    download.download(server.part(), tmp_path)
    assert len(server.requested) == 1
    path.write_bytes(b"mine")
    with pytest.raises(FaceSnapError, match=r"different file .*thing.bin already exists"):
        download.download(server.part(), tmp_path)
    assert path.read_bytes() == b"mine"


def test_broken_connections_are_resumed(server, tmp_path):
    server.breaks_after = 100_000
    path = download.download(server.part(), tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.requested[0] is None
    starts = [int(span[6:-1]) for span in server.requested[1:]]
    assert len(starts) >= 2
    assert starts == sorted(set(starts)), "every connection transferred something"
    assert files_in(tmp_path) == ["thing.bin"]


def test_stopped_download_is_resumed_by_the_next_call(server, tmp_path):
    stop_early(server, tmp_path)
    assert ".thing.bin.part" in files_in(tmp_path)
    assert "thing.bin" not in files_in(tmp_path)
    arrived = (tmp_path / "things" / ".thing.bin.part").stat().st_size
    assert 0 < arrived < len(CONTENT)
    assert download.download(server.part(), tmp_path).read_bytes() == CONTENT
    assert server.requested[-1] == f"bytes={arrived}-"


def test_download_restarts_if_the_server_does_not_support_ranges(server, tmp_path):
    stop_early(server, tmp_path)
    server.ranges = False
    assert download.download(server.part(), tmp_path).read_bytes() == CONTENT


def test_wrong_received_data_is_deleted_and_the_next_call_restarts(server, tmp_path):
    arrived = tmp_path / "things" / ".thing.bin.part"
    arrived.parent.mkdir()
    arrived.write_bytes(b"x" * 1000)
    with pytest.raises(FaceSnapError, match="was deleted; try again"):
        download.download(server.part(), tmp_path)
    assert download.download(server.part(), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("sends_length", [True, False])
def test_received_data_survives_the_login_page_of_a_proxy(server, tmp_path, sends_length):
    stop_early(server, tmp_path)
    arrived = tmp_path / "things" / ".thing.bin.part"
    before = arrived.read_bytes()
    server.page, server.sends_length = b"<html>Please log in</html>", sends_length
    with pytest.raises(FaceSnapError, match="A web page or an error message was received instead of the thing; log in"):
        download.download(server.part(), tmp_path)
    assert arrived.read_bytes() == before
    server.page, server.sends_length = None, True
    assert download.download(server.part(), tmp_path).read_bytes() == CONTENT
    assert server.requested[-1] == f"bytes={len(before)}-"


NOT_THE_FILE = {  # what proxies and servers send instead of the file: body, type, whether the length is sent
    "JSON": (b'{"error": "quota"}', "application/json", False),
    "JSON of a problem": (b'{"title": "quota"}', "application/problem+json", False),
    "JSON with its length": (b'{"error": "quota"}', "application/json; charset=utf-8", True),
    "a page": (b"<html>Please log in</html>", "text/html", False),
    "a page in upper case": (b"<html>Please log in</html>", "Text/HTML", False),
    "XML": (b"<Error/>", "application/xml", False),
    "a few bytes without a type": (b"quota", None, False),
    "many bytes without a type": (b"q" * 250_000, None, False),
    "a file": (b"quota" * 20, "application/octet-stream", False),
    "a file with its length": (b"quota" * 20, "application/octet-stream", True),
    "nothing": (b"", None, False),
}


@pytest.mark.parametrize("kept", [0, 100, 200_000])
@pytest.mark.parametrize("answer", NOT_THE_FILE)
def test_received_data_survives_whatever_is_sent_instead_of_the_file(server, tmp_path, answer, kept):
    arrived = tmp_path / "things" / ".thing.bin.part"
    arrived.parent.mkdir()
    arrived.write_bytes(CONTENT[:kept])
    server.page, server.page_type, server.sends_length = NOT_THE_FILE[answer]
    with pytest.raises(FaceSnapError) as error:
        download.download(server.part(), tmp_path)
    assert "\n" not in str(error.value)
    assert (arrived.read_bytes() if arrived.exists() else b"") == CONTENT[:kept]
    assert files_in(tmp_path) in ([], [".thing.bin.part"])
    server.page, server.sends_length = None, True
    assert download.download(server.part(), tmp_path).read_bytes() == CONTENT
    assert server.requested[-1] == (f"bytes={kept}-" if kept else None)


@pytest.mark.parametrize("kept", [0, 200_000])
@pytest.mark.parametrize(
    "fault",
    [{"silent_after": -1}, {"silent_after": 0}, {"silent_after": 70_000}, {"drip": 0.05}],
    ids=["no answer", "no data", "silent in the middle", "drip"],
)
def test_stop_takes_effect_at_once_on_a_silent_or_slow_line(server, tmp_path, fault, kept):
    arrived = tmp_path / "things" / ".thing.bin.part"
    arrived.parent.mkdir()
    arrived.write_bytes(CONTENT[:kept])
    for name, value in fault.items():
        setattr(server, name, value)
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    start = time.monotonic()
    with pytest.raises(download.Stopped, match="download it again to resume"):
        download.download(server.part(), tmp_path, stopped=stop.is_set)
    assert time.monotonic() - start < 2
    assert arrived.stat().st_size >= kept
    server.silent_after, server.drip = None, 0
    assert download.download(server.part(), tmp_path).read_bytes() == CONTENT


def test_stop_takes_effect_at_once_between_two_connections(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "WAIT", 20)
    server.status = 503
    start = time.monotonic()
    with pytest.raises(download.Stopped):
        download.download(server.part(), tmp_path, stopped=lambda: bool(server.requested))
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    "location",
    [
        "",
        "http://[::1",
        "file:///etc/passwd",
        "ftp://example.org/x",
        "javascript:alert(1)",
    ],
)
def test_unusable_redirect_is_reported_in_one_sentence(server, tmp_path, location):
    server.location = location
    with pytest.raises(FaceSnapError, match=r"^The server for the thing redirects to an unusable address; download it"):
        download.download(server.part(), tmp_path)
    assert files_in(tmp_path) == []
    assert len(server.requested) == 1


@pytest.mark.parametrize("location", ["http://a..b/x", "http://\xfc\xff/x", "http://x:99999/", "http://" + "a" * 300])
def test_redirect_to_an_impossible_host_is_reported_like_a_lost_connection(server, tmp_path, location):
    server.location = location
    with pytest.raises(FaceSnapError, match=r"cannot be downloaded|unusable address"):
        download.download(server.part(), tmp_path)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("location", ["/thing.bin", "http://", "//", "http:///x", "?", "#x"])
def test_endless_redirects_are_reported(server, tmp_path, location):
    server.location = location
    with pytest.raises(FaceSnapError, match="redirects endlessly"):
        download.download(server.part(), tmp_path)


def test_redirects_are_followed(server, tmp_path):
    with serve(CONTENT) as first:
        first.location = server.url
        assert download.download(first.part(), tmp_path).read_bytes() == CONTENT


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1, with its key, in one file."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "certificate.pem"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"there is no openssl that can make a certificate: {error}")
    return folder


def test_redirect_from_https_to_http_is_refused(server, tmp_path, certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "certificate.pem", certificate / "key.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate / "certificate.pem"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(CONTENT, context) as encrypted:
        encrypted.location = server.url
        with pytest.raises(FaceSnapError, match=r"redirects to an unencrypted address \(http://127\.0\.0\.1\)"):
            download.download(encrypted.part(), tmp_path)
        assert server.requested == []
        assert files_in(tmp_path) == []
        encrypted.location = "/thing.bin"
        with pytest.raises(FaceSnapError, match="redirects endlessly"):
            download.download(encrypted.part(), tmp_path)
        encrypted.location = None
        assert download.download(encrypted.part(), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["thing.bin", ".thing.bin.part"])
def test_folder_in_the_place_of_the_file_is_reported(server, tmp_path, name):
    (tmp_path / "things" / name).mkdir(parents=True)
    with pytest.raises(FaceSnapError, match="is a folder, but the thing is a file; move the folder away"):
        download.download(server.part(), tmp_path)
    assert server.requested == []


def test_file_in_the_place_of_the_folder_is_reported(server, tmp_path):
    (tmp_path / "things").write_bytes(b"mine")
    with pytest.raises(FaceSnapError, match=r"thing.bin cannot be written"):
        download.download(server.part(), tmp_path)


def test_two_processes_do_not_write_to_one_file(server, tmp_path):
    """The other process is a WebUI with the same folder, halfway through the download."""
    code = f"""
import threading
from pathlib import Path
from facesnap_ext.weights import download
from facesnap_ext.weights.catalogue import Part
def halfway(done):
    if done:
        print("halfway", flush=True)
        input()
download.download({server.part()!r}, Path({str(tmp_path)!r}), halfway)
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    with other:
        assert other.stdout.readline() == "halfway\n"
        with pytest.raises(FaceSnapError, match="Another FaceSnap process is downloading the thing to this folder"):
            download.download(server.part(), tmp_path)
        other.stdin.write("\n" * 100)
        other.stdin.close()
        assert other.wait(60) == 0
    assert (tmp_path / "things" / "thing.bin").read_bytes() == CONTENT
    assert files_in(tmp_path) == ["thing.bin"]


def test_file_with_wrong_hash_is_deleted_and_reported(server, tmp_path):
    part = server.part(CONTENT[::-1])
    with pytest.raises(FaceSnapError, match=r"not the expected file \(SHA-256 .*deleted"):
        download.download(part, tmp_path)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("length", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_unexpected_length_is_reported_before_anything_is_kept(server, tmp_path, length):
    server.length = length
    with pytest.raises(FaceSnapError, match=f"not the expected one .{length} bytes instead of 300000"):
        download.download(server.part(), tmp_path)
    assert files_in(tmp_path) == []


def test_download_without_content_length_stops_at_the_expected_length(server, tmp_path):
    server.sends_length = False
    with pytest.raises(FaceSnapError, match=r"not the expected one \(more than 1000 bytes"):
        download.download(server.part(CONTENT[:1000]), tmp_path)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "no longer at its address .HTTP status 404.; look for it at its page"),
        (403, "requires a login"),
        (503, "cannot be downloaded .HTTP status 503"),
        (302, "redirects to an unusable address; download it by hand"),
        (300, "sent HTTP status 300"),
    ],
)
def test_refusal_of_the_server_is_reported(server, tmp_path, status, message):
    server.status = status
    with pytest.raises(FaceSnapError, match=message):
        download.download(server.part(), tmp_path)
    assert files_in(tmp_path) == []
    assert len(server.requested) == (download.MAX_FAILURES if status == 503 else 1)


def test_missing_network_is_reported_and_received_data_is_kept(server, tmp_path):
    stop_early(server, tmp_path)
    kept = files_in(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    with pytest.raises(FaceSnapError, match="check your network connection") as error:
        download.download(server.part(url=url), tmp_path)
    assert "\n" not in str(error.value)
    assert files_in(tmp_path) == kept


def test_full_disk_is_reported_before_and_during_a_download(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda path: usage(free=1000))
        with pytest.raises(FaceSnapError, match="has 1 kB left, but 300 kB are needed"):
            download.download(server.part(), tmp_path)
    assert server.requested == []

    def full(*args, **values):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(FaceSnapError, match=r"disk with .* is full"):
        download.download(server.part(), tmp_path)


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")])
def test_download_works_in_a_folder_without_locks(server, tmp_path, monkeypatch, error):
    """Some network drives do not support locks."""
    import filelock

    def acquire(self, *args, **values):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    assert download.download(server.part(), tmp_path).read_bytes() == CONTENT


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3000),
    st.lists(st.integers(1, 2000), min_size=1, max_size=6),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_file_is_complete_or_absent_whatever_breaks(tmp_path_factory, size, breaks, ranges, honest, data):
    """Connections end at any point, with and without ranges, and the content is right or wrong."""
    folder = tmp_path_factory.mktemp("broken")
    content = data.draw(st.binary(min_size=size, max_size=size))
    with serve(content) as server:
        server.ranges = ranges
        part = server.part(content if honest else bytes([content[0] ^ 1]) + content[1:])
        for length in (*breaks, None):
            server.breaks_after = length
            try:
                path = download.download(part, folder)
            except FaceSnapError:
                assert "thing.bin" not in files_in(folder)
            else:
                assert honest
                assert path.read_bytes() == content
                break
        else:
            assert not honest, "the last connection was complete"


def wait_for(state, job):
    end = time.monotonic() + 20
    while job.state != state and time.monotonic() < end:
        time.sleep(0.02)
    assert job.state == state, job.message


def test_a_job_runs_in_the_background_and_each_part_has_one(server, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "PARTS", (server.part(),))
    server.hold = threading.Event()
    job = download.start("thing", ModelFiles(tmp_path))
    assert download.start("thing", ModelFiles(tmp_path)) is job
    assert download.jobs() == [job]
    server.hold.set()
    wait_for("done", job)
    assert job.done == len(CONTENT)
    assert "thing.bin" in job.message
    assert len(server.requested) == 1


def test_a_job_can_be_stopped_and_reports_failures(server, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "PARTS", (server.part(),))
    server.hold = threading.Event()
    job = download.start("thing", ModelFiles(tmp_path))
    job.stop.set()
    server.hold.set()
    wait_for("stopped", job)
    server.status = 404
    job = download.start("thing", ModelFiles(tmp_path))
    wait_for("failed", job)
    assert "no longer at its address" in job.message


def test_only_parts_with_a_known_hash_are_downloaded(tmp_path):
    for name in ("https://example.org/x", "../x", "", "nothing"):
        with pytest.raises(FaceSnapError, match="There is no part named"):
            download.start(name, ModelFiles(tmp_path))
    with pytest.raises(FaceSnapError, match="cannot download DECA, because it does not know its hash; register"):
        download.start("deca", ModelFiles(tmp_path))


def test_importing_and_listing_models_do_not_use_the_network(tmp_path):
    """Run in a process where opening a socket is an error."""
    code = f"""
import socket, sys
def refuse(*args, **values): raise SystemExit("a socket was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from pathlib import Path
from facesnap_ext.cli.main import main
import facesnap_ext.weights.download, facesnap_ext.ui.routes
assert main(["models", "--models", {str(tmp_path)!r}]) == 0
assert "requests" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def bundle_of(server, monkeypatch, *targets):
    parts = tuple(server.part(name=target, title=target, target=f"{target}/{target}.bin") for target in targets)
    monkeypatch.setattr(catalogue, "PARTS", parts)
    monkeypatch.setattr(catalogue, "BUNDLES", {"all": targets})
    return parts


def test_a_bundle_is_downloaded_part_by_part_with_one_progress(server, tmp_path, monkeypatch):
    parts = bundle_of(server, monkeypatch, "one", "two", "three")
    received = []
    paths = download.download_all(download.parts_to_download("all", ModelFiles(tmp_path)), tmp_path, received.append)
    assert paths == [tmp_path / part.target for part in parts]
    assert received == sorted(received)
    assert (received[0], received[-1]) == (0, 3 * len(CONTENT))


def test_a_stopped_bundle_is_resumed_without_what_is_complete(server, tmp_path, monkeypatch):
    parts = bundle_of(server, monkeypatch, "one", "two")
    received = []
    with pytest.raises(download.Stopped, match="The download of two was stopped"):
        download.download_all(parts, tmp_path, received.append, lambda: received[-1:] > [len(CONTENT)])
    assert (tmp_path / "one" / "one.bin").read_bytes() == CONTENT
    count, arrived = len(server.requested), (tmp_path / "two" / ".two.bin.part").stat().st_size
    download.download_all(parts, tmp_path, received.append)
    assert server.requested[count:] == [f"bytes={arrived}-"]
    assert files_in(tmp_path) == ["one.bin", "two.bin"]


def test_space_is_checked_for_all_parts_before_the_first(server, tmp_path, monkeypatch):
    parts = bundle_of(server, monkeypatch, "one", "two")
    usage = namedtuple("usage", "total used free")(0, 0, len(CONTENT) + 1)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FaceSnapError, match="has 300 kB left, but 600 kB are needed"):
        download.download_all(parts, tmp_path / "models")
    assert server.requested == []


def test_a_bundle_and_one_of_its_parts_are_not_downloaded_at_once(server, tmp_path, monkeypatch):
    bundle_of(server, monkeypatch, "one", "two")
    server.hold = threading.Event()
    job = download.start("all", ModelFiles(tmp_path))
    assert download.start("all", ModelFiles(tmp_path)) is job
    with pytest.raises(FaceSnapError, match="two is already being downloaded"):
        download.start("two", ModelFiles(tmp_path))
    server.hold.set()
    wait_for("done", job)
    assert (job.done, job.size) == (2 * len(CONTENT), 2 * len(CONTENT))
