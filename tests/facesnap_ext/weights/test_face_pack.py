"""Face model packs are recognised by the graphs of their files, regardless of the state of users' folders."""

from __future__ import annotations

import time

import numpy as np
import pytest

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity import faces
from facesnap_ext.weights.face_pack import MAX_FILES, onnx_files, pack_files
from facesnap_ext.weights.onnx_graph import UNBOUNDED, read_graph
from facesnap_ext.weights.search import find_models
from tests.support.face_packs import PACKS, write_layout, write_pack

onnx = pytest.importorskip("onnx")
pytest.importorskip("insightface")


@pytest.mark.parametrize("name", PACKS)
def test_roles_follow_from_the_graphs_in_every_published_pack(tmp_path, name):
    folder = write_pack(tmp_path / "models" / name, name)
    files = pack_files(folder)
    *_, detector, recognition = PACKS[name]
    assert (files.detector, files.recognition) == (folder / detector, folder / recognition)
    assert files.landmarks68 == (folder / "1k3d68.onnx" if "1k3d68.onnx" in PACKS[name] else None)
    assert (files.embedding, files.problems) == (512, ())
    assert find_models(tmp_path / "models").face_pack == folder
    loaded = faces.load_pack(folder)
    assert (loaded.detector.taskname, loaded.recognition.taskname) == ("detection", "recognition")
    assert (faces.load_landmarks68(folder) is None) == ("1k3d68.onnx" not in PACKS[name])


def macos(folder):
    for file in list(folder.iterdir()):
        (folder / f"._{file.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(64))
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder.parent / "__MACOSX" / folder.name).mkdir(parents=True)
    (folder.parent / "__MACOSX" / folder.name / "._glintr100.onnx").write_bytes(b"\0\5\x16\7")


def spare(content):
    def write(folder):
        for name in ("1k3d68.onnx", "2d106det.onnx", "genderage.onnx"):
            (folder / name).write_bytes(content)

    return write


def truncated(folder):
    path = folder / "1k3d68.onnx"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def links(folder):
    (folder / "0gone.onnx").symlink_to(folder / "nowhere.onnx")
    (folder / "0loop.onnx").symlink_to(folder / "0loop.onnx")
    (folder / "again").symlink_to(folder)


def other_networks(folder):
    """Networks of face swappers and restorers, which users keep in the same folder."""
    text = '<ir_version: 7, opset_import: ["" : 13]> net (float[1, 3, {0}, {0}] x{1}) => (float[1, 3, {0}, {0}] y)'
    for name, side, source in (("0inswapper_128", 128, ", float[1, 512] source"), ("0GFPGANv1.4", 512, "")):
        network = onnx.parser.parse_model(text.format(side, source) + " { y = Relu (x) }")
        onnx.save(network, str(folder / f"{name}.onnx"))


LEFTOVERS = {
    "macOS": macos,
    "HTML pages": spare(b"<!DOCTYPE html><html>404</html>"),
    "empty files": spare(b""),
    "LFS pointers": spare(b"version https://git-lfs.github.com/spec/v1\n"),
    "a truncated file": truncated,
    "links": links,
    "other networks": other_networks,
}


@pytest.mark.parametrize("leftover", LEFTOVERS)
@pytest.mark.parametrize("place", ["models", "models [v1] (copy)", "mod*els?"])
def test_a_pack_works_whatever_else_is_in_its_folder(tmp_path, leftover, place):
    folder = write_pack(tmp_path / place / "antelopev2", "antelopev2")
    LEFTOVERS[leftover](folder)
    files = find_models(tmp_path / place)
    assert files.face_pack == folder
    assert [model.path for model in files.found] == [folder]
    assert faces.load_pack(folder).recognition.model_file == str(folder / "glintr100.onnx")
    faces.load_landmarks68(folder)
    assert not any(name.startswith(("._", "0gone", "0loop")) for name in (path.name for path in onnx_files(folder)))


@pytest.mark.parametrize("damage", [b"", b"<html>", b"\x3a\xff\xff\xff\xff\x0f", bytes(1000), b"\x3a\x00"])
@pytest.mark.parametrize("part", ["scrfd_10g_bnkps.onnx", "glintr100.onnx"])
def test_a_damaged_needed_file_is_named(tmp_path, part, damage):
    folder = write_pack(tmp_path / "antelopev2", "antelopev2")
    (folder / part).write_bytes(damage)
    with pytest.raises(FaceSnapError, match=rf"{part} is not a valid ONNX file"):
        faces.load_pack(folder)


def body(operation):
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    value = helper.make_tensor_value_info("v", floats, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["c"], ["v"])], "body", [], [value])
    names = {"If": ("then_branch", "else_branch")}.get(operation, ("body",))
    return helper.make_node(operation, ["c"], ["r"], **dict.fromkeys(names, graph))


@pytest.mark.parametrize("operation", UNBOUNDED)
@pytest.mark.parametrize("place", ["graph", "function"])
@pytest.mark.parametrize("part", ["scrfd_10g_bnkps.onnx", "glintr100.onnx", "1k3d68.onnx"])
def test_graphs_that_may_never_end_are_not_run(tmp_path, monkeypatch, operation, place, part):
    from insightface import model_zoo

    folder = write_pack(tmp_path / "antelopev2", "antelopev2")
    network = onnx.load(str(folder / part))
    if place == "graph":
        network.graph.node.append(body(operation))
    else:
        opsets = [onnx.helper.make_opsetid("", 13)]
        network.functions.append(onnx.helper.make_function("own", "F", ["c"], ["r"], [body(operation)], opsets))
    onnx.save(network, str(folder / part))
    real = model_zoo.get_model
    monkeypatch.setattr(model_zoo, "get_model", lambda path, **options: part not in path and real(path, **options))
    load = faces.load_landmarks68 if part == "1k3d68.onnx" else faces.load_pack
    with pytest.raises(FaceSnapError, match=rf"{part} uses the operation {operation}, which may never end"):
        load(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_are_reported_with_the_file(tmp_path, face_pack_folder, astronaut, value):
    import shutil

    folder = shutil.copytree(face_pack_folder, tmp_path / "pack")
    recognition = pack_files(folder).recognition
    write_layout(recognition)
    network = onnx.load(str(recognition))
    weights = onnx.numpy_helper.to_array(network.graph.initializer[0]).copy()
    weights[3, 5] = value
    network.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "projection"))
    onnx.save(network, str(recognition))
    with pytest.raises(FaceSnapError, match=rf"{recognition.name} returns values that are not finite"):
        faces.find_faces(faces.load_pack(folder), astronaut)


def test_reading_a_graph_takes_bounded_time(tmp_path):
    many = tmp_path / "many.onnx"
    many.write_bytes(b"\x3a" + b"\x80\x80\x80\x10" + b"\x30\x00" * 2**24)  # 2²⁴ fields in one graph
    start = time.perf_counter()
    with pytest.raises(FaceSnapError, match="too many parts"):
        read_graph(many)
    assert time.perf_counter() - start < 20


def test_the_zeros_of_an_unfinished_download_are_no_graph(tmp_path):
    zeros = tmp_path / "zeros.onnx"
    with zeros.open("wb") as file:
        file.truncate(2**28)
    with pytest.raises(FaceSnapError, match="not a protobuf message"):
        read_graph(zeros)


def test_a_folder_of_many_models_takes_bounded_time(tmp_path):
    folder = write_pack(tmp_path / "models" / "antelopev2", "antelopev2")
    for i in range(5000):
        (folder / f"x{i:05d}.onnx").touch()
        (folder / f"{i:05d}.txt").touch()
    assert len(onnx_files(folder)) == MAX_FILES
    start = time.perf_counter()
    assert find_models(tmp_path / "models").face_pack == folder
    assert time.perf_counter() - start < 5


def test_the_usual_recognition_model_is_preferred_to_others(tmp_path):
    folder = write_pack(tmp_path / "pack", "buffalo_l")
    network = onnx.load(str(folder / "w600k_r50.onnx"))
    network.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 128
    onnx.save(network, str(folder / "a.onnx"))
    assert pack_files(folder).recognition == folder / "w600k_r50.onnx"
