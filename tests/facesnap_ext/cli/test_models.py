"""`facesnap models` lists model files and downloads missing ones."""

from __future__ import annotations

import json

import pytest

from facesnap_ext.cli.main import main
from facesnap_ext.files import sha256
from facesnap_ext.weights import catalogue
from tests.support.parts_server import serve
from tests.support.weight_files import KINDS, write


def test_models_lists_every_part_and_hashes_on_request(tmp_path, capsys):
    folder, other = tmp_path / "facesnap", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    write(folder / "mine.safetensors", {"ffrnet.x": (1,)}, format="facesnap")
    clip = write(other / "clip.safetensors", KINDS["CLIP_VISION"])
    assert main(["models", "--models", str(folder), "--also-look-in", str(other), "--json", "--hash"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert (listed["folder"], listed["elsewhere"]) == (str(folder), [str(other)])
    parts = {part["name"]: part for part in listed["parts"]}
    assert [part for part, described in parts.items() if described["missing"]] == ["face_pack"]
    assert parts["clip"]["found"][0]["files"][0]["sha256"] == sha256(clip)
    assert main(["models", "--models", str(folder), "--also-look-in", str(other)]) == 0
    table = capsys.readouterr().out
    assert sha256(clip) in table
    assert table.count("MISSING") == 1  # DECA and FLAME are optional


def test_models_get_downloads_once_and_prints_the_path(tmp_path, capsys, monkeypatch):
    pytest.importorskip("requests")
    with serve(b"content") as server:
        monkeypatch.setattr(catalogue, "PARTS", (server.part(),))
        for arguments in (["get", "thing", "--models", str(tmp_path)], ["--models", str(tmp_path), "get", "thing"]):
            assert main(["models", *arguments]) == 0
            output = capsys.readouterr()
            assert output.out.strip() == str(tmp_path / "things" / "thing.bin")
        assert len(server.requested) == 1
        assert "the thing: 100 %" in output.err or not output.err.strip()
        assert (tmp_path / "things" / "thing.bin").read_bytes() == b"content"
        assert main(["models", "--models", str(tmp_path), "get", "another"]) == 1
        assert (
            "There is no part named 'another'; choose one of antelopev2, instantid, starter, thing."
            in capsys.readouterr().err
        )


def test_interrupted_download_says_how_to_resume(tmp_path, capsys, monkeypatch):
    from facesnap_ext.weights import download

    def interrupt(*args):
        raise KeyboardInterrupt

    with serve(b"content") as server:
        monkeypatch.setattr(catalogue, "PARTS", (server.part(),))
        monkeypatch.setattr(download, "download", interrupt)
        assert main(["models", "get", "thing", "--models", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip()
    assert error == "facesnap: The download was interrupted; run the same command again to resume it."


def test_models_outside_a_webui_needs_the_folder(capsys):
    assert main(["models"]) == 1
    assert "--models" in capsys.readouterr().err
