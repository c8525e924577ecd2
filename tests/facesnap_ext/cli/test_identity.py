"""`facesnap identity` checks reference photos and saves identities."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file

from facesnap_ext.cli.main import main


def identity(models, *arguments):
    return main(["identity", *map(str, arguments), "--models", str(models)])


def test_identity_reports_on_photos_and_saves_them(stand_ins, photo_file, mirrored_file, tmp_path, capsys):
    models = shutil.copytree(stand_ins, tmp_path / "models")
    assert identity(models, photo_file, mirrored_file, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["written"] is None
    assert not (models / "identities").exists()
    assert [described["photo"] for described in report["photos"]] == ["astronaut.png", "mirrored.png"]
    assert report["cosines"][0][1] == report["cosines"][1][0] == report["photos"][0]["likeness"]

    assert identity(models, photo_file, mirrored_file, "--out", "Eileen: 1") == 0
    *lines, written = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("astronaut.png, face size ")
    assert written == str(models / "identities" / "Eileen_ 1.safetensors")
    tensors = load_file(written)
    assert len(tensors["embeddings"]) == 2
    embeddings = tensors["embeddings"].numpy() / np.linalg.norm(tensors["embeddings"], axis=1, keepdims=True)
    assert embeddings[0] @ embeddings[1] == pytest.approx(report["cosines"][0][1], abs=1e-4)

    elsewhere = tmp_path / "deep" / "eileen.safetensors"
    assert identity(models, photo_file, "--out", elsewhere, "--json") == 0
    assert json.loads(capsys.readouterr().out)["written"] == str(elsewhere)
    assert identity(models, mirrored_file, "--out", elsewhere) == 1
    assert "already an identity named eileen" in capsys.readouterr().err
    assert identity(models, mirrored_file, "--out", elsewhere, "--overwrite") == 0
    assert np.array_equal(load_file(elsewhere)["embeddings"][0], tensors["embeddings"][1])


def test_photo_without_a_face_is_reported_and_nothing_is_saved(stand_ins, photo_file, faceless_file, tmp_path, capsys):
    assert identity(stand_ins, photo_file, faceless_file, "--out", tmp_path / "x.safetensors") == 1
    output = capsys.readouterr()
    assert "  No face was found in grey.png" in output.out
    assert "facesnap: No face was found in grey.png" in output.err
    assert not (tmp_path / "x.safetensors").exists()
