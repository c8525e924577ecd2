"""MediaPipe's landmark detector: recognised by content, converted, found in the model folder, and listed."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("flatbuffers", reason="onnxruntime installs it")

from facesnap_ext.cli.main import main
from facesnap_ext.convert import convert
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights import mediapipe
from facesnap_ext.weights.catalogue import downloadable
from facesnap_ext.weights.model_list import list_models
from facesnap_ext.weights.recognise import Kind, recognise
from facesnap_ext.weights.search import find_models
from tests.support.stand_in_pack import stand_in_face_mesh, stand_in_faces68
from tests.support.tflite_files import TfliteFile, tiny_landmark_detector

CONTENT, WEIGHTS, BIAS = tiny_landmark_detector()
IMAGE = np.random.default_rng(1).uniform(size=(1, 256, 256, 3)).astype(np.float32)
REAL_FILE = "FACESNAP_FACE_LANDMARKER"


def task(content: bytes = CONTENT, member: str = mediapipe.MEMBER, prefix: bytes = b"\0\0") -> bytes:
    """A task file. Google's begins with two zeros."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("face_detector.tflite", b"not read")
        archive.writestr(member, content)
    return prefix + file.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def outputs(path: Path, image: np.ndarray = IMAGE) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": image})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("face_landmarker.task", task()),
        ("face_landmarker.task", task(prefix=b"")),
        ("renamed.bin", task()),
        ("detector.tflite", CONTENT),
    ],
)
def test_converted_detector_computes_the_same(tmp_path, name, content, capsys):
    path = write(tmp_path / name, content)
    assert recognise(path) is Kind.MEDIAPIPE
    main(["convert", str(path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "face_landmarks.onnx")
    expected = WEIGHTS @ IMAGE[0].max((0, 1)) + BIAS
    np.testing.assert_allclose(outputs(tmp_path / "face_landmarks.onnx")[0].ravel(), expected, atol=1e-4)
    assert mediapipe.is_converted(tmp_path / "face_landmarks.onnx")


def other_network() -> bytes:
    file = TfliteFile()
    file.outputs = [file.add("LOGISTIC", [file.input((1, 192, 192, 3))], (1, 192, 192, 3))]
    return file.content()


def unsupported() -> bytes:
    file = TfliteFile()
    file.outputs = [file.add("TANH", [file.input((1, 256, 256, 3))], (1, 1434))]
    return file.content()


def encrypted() -> bytes:
    content = bytearray(task())
    start = content.index(b"PK\1\2", content.index(b"PK\1\2") + 1)
    content[start + 8] |= 1
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (task(other_network()), "it is not MediaPipe's detector for 478 points"),
        (task(unsupported()), "it uses the operation TANH, which FaceSnap cannot convert"),
        (task(CONTENT[:-2000]), "truncated or damaged"),
        (task(b"not a network"), "it is not a TensorFlow Lite file"),
        (encrypted(), "the archive is damaged"),
        (task(bytes(mediapipe.MAX_BYTES + 1)), "it is larger than 64 MiB"),
    ],
    ids=["other", "unsupported", "truncated", "text", "encrypted", "large"],
)
def test_unusable_files_are_reported_with_their_name(tmp_path, content, reason):
    path = write(tmp_path / "face_landmarker.task", content)
    with pytest.raises(FaceSnapError) as error:
        convert(path)
    assert str(error.value).startswith("face_landmarker.task cannot be converted (")
    assert reason in str(error.value)
    assert "download face_landmarker.task again" in str(error.value)
    assert not (tmp_path / "face_landmarks.onnx").exists()


@given(st.data())
def test_damaged_archives_are_refused_or_converted(tmp_path_factory, data):
    content = bytearray(task())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.one_of(st.integers(0, 200), st.integers(len(content) - 300, len(content) - 1)))
        content[at] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.mktemp("damaged") / "face_landmarker.task", bytes(content))
    try:
        assert recognise(path) is not Kind.MEDIAPIPE or convert(path).is_file()
    except FaceSnapError as error:
        assert "face_landmarker.task" in str(error)


def test_model_folder(tmp_path):
    """The original is found but not used, and the converted file is used, wherever it is in FaceSnap's own folder."""
    models, other = tmp_path / "facesnap", tmp_path / "other"
    for folder in (models, other):
        folder.mkdir()
        write(folder / "face_landmarker.task", task())
    files = find_models(models, [other])
    assert files.mediapipe is None
    assert files.passed_over == []
    with pytest.raises(
        FaceSnapError, match=r"face_landmarker\.task must be converted: run python -m facesnap_ext convert"
    ):
        files.require("mediapipe")
    converted = convert(models / "face_landmarker.task")
    assert find_models(models, [other]).mediapipe == converted
    shutil.move(converted, other)
    assert find_models(models, [other]).mediapipe is None
    (models / "deeper").mkdir()
    shutil.move(other / converted.name, models / "deeper" / "renamed.onnx")
    files = find_models(models, [other])
    assert files.mediapipe == models / "deeper" / "renamed.onnx"
    assert not files.usable("face_pack"), "a folder with nothing else is not a face model pack"
    (role,) = [role for role in list_models(files) if role.name == "mediapipe"]
    assert [(model.path, model.used) for model in role.found] == [
        ("face_landmarker.task", False),
        (str(Path("deeper", "renamed.onnx")), True),
    ]
    assert role.found[1].licence == "Apache-2.0 (commercial use allowed)"
    assert not role.needed


def test_detector_in_the_folder_of_a_face_model_pack(tmp_path):
    pack = tmp_path / "antelopev2"
    pack.mkdir()
    stand_in_faces68(pack / "1k3d68.onnx")
    stand_in_face_mesh(pack / "mesh.onnx")
    files = find_models(tmp_path)
    assert (files.face_pack, files.mediapipe) == (pack, pack / "mesh.onnx")


def test_other_onnx_files_are_not_the_detector(tmp_path):
    stand_in_faces68(tmp_path / "1k3d68.onnx")
    write(tmp_path / "damaged.onnx", b"\xff" * 100)
    assert find_models(tmp_path).mediapipe is None


def test_it_is_not_downloaded():
    with pytest.raises(FaceSnapError, match=r"download face_landmarker\.task, then run python -m facesnap_ext convert"):
        downloadable("mediapipe")


@pytest.mark.skipif(REAL_FILE not in os.environ, reason=f"set {REAL_FILE} to the path of Google's face_landmarker.task")
def test_real_file(tmp_path):
    """In Google's own file, a uniform image has no face, and its points are those of a face nevertheless."""
    converted = convert(Path(os.environ[REAL_FILE]), tmp_path / "converted.onnx")
    points, *others = outputs(converted, np.full((1, 256, 256, 3), 0.5, np.float32))
    assert [points.shape, *(other.shape for other in others)] == [(1, 1, 1, 1434), (1, 1, 1, 1), (1, 1)]
    assert 0 <= others[-1].item() <= 1
    xy = points.reshape(478, 3)[:, :2]
    assert (xy > 0).all()
    assert (xy < 256).all()
    assert mediapipe.is_converted(converted)
