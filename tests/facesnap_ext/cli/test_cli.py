"""The commands, as they are typed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from facesnap_ext.cli.main import main
from facesnap_ext.files import sha256
from facesnap_ext.landmarks.points72 import Landmarks, draw
from facesnap_ext.weights import catalogue
from tests.support.parts_server import serve
from tests.support.weight_files import KINDS, write

needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")


@pytest.fixture
def photo(astronaut, tmp_path):
    path = tmp_path / "astronaut.png"
    Image.fromarray(astronaut.pixels).save(path)
    return path


@pytest.fixture
def mirrored(astronaut, tmp_path):
    path = tmp_path / "mirrored.png"
    Image.fromarray(np.ascontiguousarray(astronaut.pixels[:, ::-1])).save(path)
    return path


def prepare(stand_ins, out, *arguments):
    models = ["--models", str(stand_ins), "--model", "random.safetensors"]
    return main(["prepare", *map(str, arguments), *models, "--out", str(out), "--json"])


def test_prepare_writes_tokens_points_and_drawings(stand_ins, photo, mirrored, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(stand_ins, out, photo, "--drive", mirrored, "--width", 640, "--height", 512) == 0
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
    before, framed = Image.open(photo), Image.open(out / "reference-1.png")
    changed = np.argwhere((np.asarray(before) != np.asarray(framed)).any(axis=2))
    np.testing.assert_allclose(changed.min(axis=0), (top, left), atol=4)
    np.testing.assert_allclose(changed.max(axis=0), (bottom, right), atol=4)


def test_without_a_driving_photo_the_pose_is_the_references_own(stand_ins, photo, tmp_path, capsys):
    assert prepare(stand_ins, tmp_path / "out", photo) == 0
    assert json.loads(capsys.readouterr().out)["driving"]["photo"] == "astronaut.png"
    assert not (tmp_path / "out" / "driving.png").exists()


def test_prepare_with_real_face_networks(stand_ins, face_pack_folder, photo, tmp_path, capsys):
    """A detector and an embedding that were trained on faces, in place of the stand-in pack."""
    models = shutil.copytree(stand_ins, tmp_path / "models")
    shutil.rmtree(models / "stand-in-pack")
    shutil.copytree(face_pack_folder, models / "real-pack")
    tokens = []
    for folder, out in ((stand_ins, "stand-in"), (models, "real")):
        assert prepare(folder, tmp_path / out, photo) == 0
        tokens.append(load_file(tmp_path / out / "tokens.safetensors")["tokens"].numpy())
    capsys.readouterr()
    assert tokens[0].shape == tokens[1].shape
    assert np.abs(tokens[0] - tokens[1]).max() > 1e-3  # another embedding, another identity


def identity(stand_ins, *arguments):
    return main(["identity", *map(str, arguments), "--models", str(stand_ins)])


def test_identity_looks_at_photos_and_saves_the_person(stand_ins, photo, mirrored, tmp_path, capsys):
    models = shutil.copytree(stand_ins, tmp_path / "models")
    assert identity(models, photo, mirrored, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["written"] is None
    assert not (models / "identities").exists()
    assert [described["photo"] for described in report["photos"]] == ["astronaut.png", "mirrored.png"]
    assert report["cosines"][0][1] == report["cosines"][1][0] == report["photos"][0]["likeness"]

    assert identity(models, photo, mirrored, "--out", "Eileen: 1") == 0
    *lines, written = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("astronaut.png, face of ")
    assert written == str(models / "identities" / "Eileen_ 1.safetensors")
    tensors = load_file(written)
    assert len(tensors["embeddings"]) == 2
    embeddings = tensors["embeddings"].numpy() / np.linalg.norm(tensors["embeddings"], axis=1, keepdims=True)
    assert embeddings[0] @ embeddings[1] == pytest.approx(report["cosines"][0][1], abs=1e-4)

    elsewhere = tmp_path / "deep" / "eileen.safetensors"
    assert identity(models, photo, "--out", elsewhere, "--json") == 0
    assert json.loads(capsys.readouterr().out)["written"] == str(elsewhere)
    assert identity(models, mirrored, "--out", elsewhere) == 1
    assert "already an identity eileen" in capsys.readouterr().err
    assert identity(models, mirrored, "--out", elsewhere, "--overwrite") == 0
    assert np.array_equal(load_file(elsewhere)["embeddings"][0], tensors["embeddings"][1])


def test_identity_tells_of_a_photo_without_a_face_and_saves_nothing(stand_ins, photo, tmp_path, capsys):
    grey = tmp_path / "grey.png"
    Image.new("RGB", (200, 200), "grey").save(grey)
    assert identity(stand_ins, photo, grey, "--out", tmp_path / "x.safetensors") == 1
    told = capsys.readouterr()
    assert "  No face was found in grey.png" in told.out
    assert "facesnap: No face was found in grey.png" in told.err
    assert not (tmp_path / "x.safetensors").exists()


def test_models_lists_every_part_and_hashes_on_demand(tmp_path, capsys):
    folder, other = tmp_path / "facesnap", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    write(folder / "mine.safetensors", {"ffrnet.x": (1,)}, format="facesnap")
    clip = write(other / "clip.safetensors", KINDS["CLIP_VISION"])
    assert main(["models", "--models", str(folder), "--also-look-in", str(other), "--json", "--hash"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert (listed["folder"], listed["elsewhere"]) == (str(folder), [str(other)])
    parts = {part["name"]: part for part in listed["parts"]}
    assert [part for part, described in parts.items() if described["missing"]] == ["face_pack", "deca", "flame"]
    assert parts["clip"]["found"][0]["files"][0]["sha256"] == sha256(clip)
    assert main(["models", "--models", str(folder), "--also-look-in", str(other)]) == 0
    table = capsys.readouterr().out
    assert sha256(clip) in table
    assert table.count("MISSING") == 1  # not every picture needs DECA and FLAME


def test_models_get_downloads_and_says_where_something_is_already(tmp_path, capsys, monkeypatch):
    pytest.importorskip("requests")
    with serve(b"content") as server:
        monkeypatch.setattr(catalogue, "PARTS", (server.part(),))
        for arguments in (["get", "thing", "--models", str(tmp_path)], ["--models", str(tmp_path), "get", "thing"]):
            assert main(["models", *arguments]) == 0
            told = capsys.readouterr()
            assert told.out.strip() == str(tmp_path / "things" / "thing.bin")
        assert len(server.requested) == 1
        assert "the thing: 100 %" in told.err or not told.err.strip()
        assert (tmp_path / "things" / "thing.bin").read_bytes() == b"content"
        assert main(["models", "--models", str(tmp_path), "get", "another"]) == 1
        assert "There is no part 'another'; choose one of thing." in capsys.readouterr().err


def test_models_outside_a_webui_asks_for_the_folder(capsys):
    assert main(["models"]) == 1
    assert "--models" in capsys.readouterr().err


def test_errors_are_one_line_and_exit_code_1(stand_ins, tmp_path, capsys):
    grey = tmp_path / "grey.png"
    Image.new("RGB", (200, 200), "grey").save(grey)
    assert prepare(stand_ins, tmp_path / "out", grey) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("facesnap: No face")
    assert "grey.png" in told
    assert not (tmp_path / "out").exists()

    assert main(["convert", str(stand_ins / "random.safetensors")]) == 1
    assert "random.safetensors is a FaceSnap file" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "none.safetensors"), "--out", str(tmp_path / "x.safetensors")]) == 1
    assert "none.safetensors" in capsys.readouterr().err


def test_it_runs_as_a_module():
    run = subprocess.run([sys.executable, "-m", "facesnap_ext", "--help"], capture_output=True, text=True, check=True)
    for command in ("convert", "init", "prepare", "demo", "bench"):
        assert command in run.stdout


@needs_diffusers
def test_the_demo_puts_every_stage_into_one_picture(tmp_path, capsys):
    out = tmp_path / "deep" / "demo.png"
    assert main(["demo", "--out", str(out)]) == 0
    stages = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert [line[:5] for line in stages] == [f"[{i}/7]" for i in range(1, 8)]
    picture = np.asarray(Image.open(out))
    panels = picture[64:, 20:]
    ground = picture[5, 5]
    cells = [panels[i * 322 : i * 322 + 256, j * 276 : j * 276 + 256] for i in range(3) for j in range(5)]
    drawn = [(cell != ground).any(axis=2).mean() > 0.99 for cell in cells]
    assert drawn == [True] * 15
    without, *with_facesnap = cells[10:]
    assert all((without != picture).mean() > 0.1 for picture in with_facesnap)
