"""`facesnap prepare` writes the conditioning that a job would use."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from facesnap_ext.cli.main import main
from facesnap_ext.landmarks.points72 import Landmarks, draw


def prepare(models, out, *arguments):
    folders = ["--models", str(models), "--model", "random.safetensors"]
    return main(["prepare", *map(str, arguments), *folders, "--out", str(out), "--json"])


def test_prepare_writes_tokens_landmarks_and_images(stand_ins, photo_file, mirrored_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(stand_ins, out, photo_file, "--drive", mirrored_file, "--width", 640, "--height", 512) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.split("/")[-1] for path in result["written"])

    tokens = load_file(out / "tokens.safetensors")["tokens"]
    assert list(tokens.shape) == result["tokens"] == [1, 16, 48]
    stored = json.loads((out / "landmarks.json").read_text())
    points = np.array(stored["points"], np.float32)
    assert (points.shape, stored["width"], stored["height"]) == ((72, 2), 640, 512)
    drawn = np.asarray(Image.open(out / "landmarks.png")).astype(int)
    assert np.abs(drawn - draw(Landmarks(points, 640, 512), 640, 512)).max() <= 16  # points are rounded to 0.01

    left, top, right, bottom = result["faces"][0]["box"]
    assert 150 < left < 200 < 240 < right < 290
    assert 40 < top < 110 < 150 < bottom < 220
    assert result["driving"]["photo"] == "mirrored.png"
    before, framed = Image.open(photo_file), Image.open(out / "reference-1.png")
    changed = np.argwhere((np.asarray(before) != np.asarray(framed)).any(axis=2))
    np.testing.assert_allclose(changed.min(axis=0), (top, left), atol=4)
    np.testing.assert_allclose(changed.max(axis=0), (bottom, right), atol=4)


def test_pose_defaults_to_the_references_own(stand_ins, photo_file, tmp_path, capsys):
    assert prepare(stand_ins, tmp_path / "out", photo_file) == 0
    assert json.loads(capsys.readouterr().out)["driving"]["photo"] == "astronaut.png"
    assert not (tmp_path / "out" / "driving.png").exists()


def test_reference_mode_changes_the_tokens(stand_ins, photo_file, mirrored_file, tmp_path, capsys):
    tokens = {}
    for mode in ("fused", "averaged"):
        assert prepare(stand_ins, tmp_path / mode, photo_file, mirrored_file, "--reference-mode", mode) == 0
        tokens[mode] = load_file(tmp_path / mode / "tokens.safetensors")["tokens"].numpy()
    assert np.abs(tokens["fused"] - tokens["averaged"]).max() > 1e-3
    assert prepare(stand_ins, tmp_path / "default", photo_file, mirrored_file) == 0
    capsys.readouterr()
    np.testing.assert_array_equal(load_file(tmp_path / "default" / "tokens.safetensors")["tokens"], tokens["fused"])
    with pytest.raises(SystemExit):
        prepare(stand_ins, tmp_path / "batch", photo_file, mirrored_file, "--reference-mode", "batch")


def test_prepare_with_real_face_networks(stand_ins, face_pack_folder, photo_file, tmp_path, capsys):
    """The detector and the embedding were trained on real faces, unlike the stand-in pack's embedding."""
    models = shutil.copytree(stand_ins, tmp_path / "models")
    shutil.rmtree(models / "stand-in-pack")
    shutil.copytree(face_pack_folder, models / "real-pack")
    tokens = []
    for folder, out in ((stand_ins, "stand-in"), (models, "real")):
        assert prepare(folder, tmp_path / out, photo_file) == 0
        tokens.append(load_file(tmp_path / out / "tokens.safetensors")["tokens"].numpy())
    capsys.readouterr()
    assert tokens[0].shape == tokens[1].shape
    assert np.abs(tokens[0] - tokens[1]).max() > 1e-3  # a different embedding produces a different identity


def test_photo_without_a_face_is_reported_and_nothing_is_written(stand_ins, faceless_file, tmp_path, capsys):
    assert prepare(stand_ins, tmp_path / "out", faceless_file) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("facesnap: No face")
    assert "grey.png" in error
    assert not (tmp_path / "out").exists()
