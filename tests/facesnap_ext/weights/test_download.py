"""Downloads: whole and of the known hash, or not there; what has arrived is not asked for again."""

from __future__ import annotations

import errno
import random
import socket
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
from facesnap_ext.weights.places import ModelFiles
from tests.support.parts_server import serve

pytest.importorskip("requests")
CONTENT = random.Random(0).randbytes(300_000)


@pytest.fixture
def server():
    with serve(CONTENT) as server:
        yield server


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0)
    monkeypatch.setattr(download, "_jobs", {})
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def left(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_file_arrives_whole_and_is_told_as_it_comes(server, tmp_path):
    told = []
    path = download.download(server.part(), tmp_path, told.append)
    assert path == tmp_path / "things" / "thing.bin"
    assert path.read_bytes() == CONTENT
    assert left(tmp_path) == ["thing.bin"]
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0, len(CONTENT))


def test_what_is_there_is_not_asked_for_again_and_another_file_is_not_overwritten(server, tmp_path):
    path = download.download(server.part(), tmp_path)
    download.download(server.part(), tmp_path)
    assert len(server.asked) == 1
    path.write_bytes(b"mine")
    with pytest.raises(FaceSnapError, match=r"another file .*thing.bin already"):
        download.download(server.part(), tmp_path)
    assert path.read_bytes() == b"mine"


def test_broken_connections_are_gone_on_from_where_they_ended(server, tmp_path):
    server.breaks_after = 100_000
    path = download.download(server.part(), tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.asked[0] is None
    starts = [int(asked[6:-1]) for asked in server.asked[1:]]
    assert len(starts) >= 2
    assert starts == sorted(set(starts)), "every connection brought something"
    assert left(tmp_path) == ["thing.bin"]


def test_a_stopped_download_goes_on_at_the_next_call(server, tmp_path):
    with pytest.raises(download.Stopped, match=r"stopped at .* of 300 kB, which are kept"):
        download.download(server.part(), tmp_path, stopped=lambda: True)
    assert ".thing.bin.part" in left(tmp_path)
    assert "thing.bin" not in left(tmp_path)
    arrived = (tmp_path / "things" / ".thing.bin.part").stat().st_size
    assert 0 < arrived < len(CONTENT)
    assert download.download(server.part(), tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == f"bytes={arrived}-"


def test_a_server_that_knows_no_ranges_starts_anew(server, tmp_path):
    with pytest.raises(download.Stopped):
        download.download(server.part(), tmp_path, stopped=lambda: True)
    server.ranges = False
    assert download.download(server.part(), tmp_path).read_bytes() == CONTENT


def test_what_arrived_of_something_else_is_removed_and_the_next_call_starts_anew(server, tmp_path):
    arrived = tmp_path / "things" / ".thing.bin.part"
    arrived.parent.mkdir()
    arrived.write_bytes(b"x" * 1000)
    with pytest.raises(FaceSnapError, match="it was removed; try again"):
        download.download(server.part(), tmp_path)
    assert download.download(server.part(), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("announces", [True, False])
def test_a_proxys_page_in_place_of_the_file_costs_nothing_of_what_arrived(server, tmp_path, announces):
    with pytest.raises(download.Stopped):
        download.download(server.part(), tmp_path, stopped=lambda: True)
    arrived = tmp_path / "things" / ".thing.bin.part"
    before = arrived.read_bytes()
    server.page, server.announces = b"<html>Please log in</html>", announces
    with pytest.raises(FaceSnapError, match="a web page came: log in"):
        download.download(server.part(), tmp_path)
    assert arrived.read_bytes() == before
    server.page, server.announces = None, True
    assert download.download(server.part(), tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == f"bytes={len(before)}-"


def test_two_processes_do_not_write_into_one_file(server, tmp_path):
    """Another WebUI on the same folder: here one that has taken half of it so far."""
    code = f"""
import threading
from pathlib import Path
from facesnap_ext.weights import download
from facesnap_ext.weights.catalogue import Part
def half_way(done):
    if done:
        print("half way", flush=True)
        input()
download.download({server.part()!r}, Path({str(tmp_path)!r}), half_way)
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    with other:
        assert other.stdout.readline() == "half way\n"
        with pytest.raises(FaceSnapError, match="Another FaceSnap is downloading the thing into this folder"):
            download.download(server.part(), tmp_path)
        other.stdin.write("\n" * 100)
        other.stdin.close()
        assert other.wait(60) == 0
    assert (tmp_path / "things" / "thing.bin").read_bytes() == CONTENT
    assert left(tmp_path) == ["thing.bin"]


def test_wrong_bytes_are_removed_and_told(server, tmp_path):
    part = server.part(CONTENT[::-1])
    with pytest.raises(FaceSnapError, match=r"another file than the known one \(SHA-256 .*removed"):
        download.download(part, tmp_path)
    assert left(tmp_path) == []


@pytest.mark.parametrize("length", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_a_length_that_is_not_the_known_one_is_told_before_anything_is_kept(server, tmp_path, length):
    server.length = length
    with pytest.raises(FaceSnapError, match=f"another file than the known one .{length} bytes in place of 300000"):
        download.download(server.part(), tmp_path)
    assert left(tmp_path) == []


def test_from_a_server_that_announces_no_length_no_more_than_the_known_one_is_taken(server, tmp_path):
    server.announces = False
    with pytest.raises(FaceSnapError, match=r"another file than the known one \(more than 1000 bytes"):
        download.download(server.part(CONTENT[:1000]), tmp_path)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "no longer where it was .404.: look for it at its page"),
        (403, "wants a login"),
        (503, "cannot be downloaded .the server answered 503"),
        (302, "answered 302"),
    ],
)
def test_what_a_server_refuses_is_told(server, tmp_path, status, message):
    server.status = status
    with pytest.raises(FaceSnapError, match=message):
        download.download(server.part(), tmp_path)
    assert left(tmp_path) == []
    assert len(server.asked) == (download.TRIES if status == 503 else 1)


def test_without_a_network_one_sentence_says_so_and_what_arrived_is_kept(server, tmp_path):
    with pytest.raises(download.Stopped):
        download.download(server.part(), tmp_path, stopped=lambda: True)
    kept = left(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    with pytest.raises(FaceSnapError, match="check that this computer is online") as told:
        download.download(server.part(url=url), tmp_path)
    assert "\n" not in str(told.value)
    assert left(tmp_path) == kept


def test_a_full_disk_is_told_before_and_while_it_fills(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda path: usage(free=1000))
        with pytest.raises(FaceSnapError, match="has 1 kB left, and 300 kB are needed"):
            download.download(server.part(), tmp_path)
    assert server.asked == []

    def full(*args, **values):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(FaceSnapError, match=r"disk of .* is full"):
        download.download(server.part(), tmp_path)


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")])
def test_a_folder_without_locks_is_downloaded_into(server, tmp_path, monkeypatch, error):
    """As some network drives are."""
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
def test_whatever_breaks_the_file_is_whole_or_not_there(tmp_path_factory, size, breaks, ranges, honest, data):
    """Against the content itself: connections that end anywhere, with and without ranges, right and wrong bytes."""
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
                assert "thing.bin" not in left(folder)
            else:
                assert honest
                assert path.read_bytes() == content
                break
        else:
            assert not honest, "the last connection was whole"


def wait_for(state, job):
    end = time.monotonic() + 20
    while job.state != state and time.monotonic() < end:
        time.sleep(0.02)
    assert job.state == state, job.message


def test_a_job_runs_beside_and_is_one_for_each_part(server, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "PARTS", (server.part(),))
    server.hold = threading.Event()
    job = download.start("thing", ModelFiles(tmp_path))
    assert download.start("thing", ModelFiles(tmp_path)) is job
    assert download.jobs() == [job]
    server.hold.set()
    wait_for("done", job)
    assert job.done == len(CONTENT)
    assert "thing.bin" in job.message
    assert len(server.asked) == 1


def test_a_job_stops_when_it_is_told_to_and_says_what_failed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "PARTS", (server.part(),))
    server.hold = threading.Event()
    job = download.start("thing", ModelFiles(tmp_path))
    job.stop.set()
    server.hold.set()
    wait_for("stopped", job)
    server.status = 404
    job = download.start("thing", ModelFiles(tmp_path))
    wait_for("failed", job)
    assert "no longer where it was" in job.message


def test_only_names_of_the_catalogue_with_a_hash_are_downloaded(tmp_path):
    for name in ("https://example.org/x", "../x", "", "nothing"):
        with pytest.raises(FaceSnapError, match="There is no part"):
            download.start(name, ModelFiles(tmp_path))
    with pytest.raises(FaceSnapError, match="does not download DECA, whose hash it does not know: register"):
        download.start("deca", ModelFiles(tmp_path))


def test_importing_and_looking_reach_for_no_network(tmp_path):
    """In a process where opening a socket is an error."""
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
