"""MediaPipe's landmark detector for 478 points of a face: recognise its files, and convert it to ONNX.

Google publishes `face_landmarker.task` (Apache-2.0), a zip archive with the detector `face_landmarks_detector.tflite`
in it. The converted file is recognised by its input, a square of 256 × 256 pixels, and by its output, 478 points.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.files import user_write
from facesnap_ext.weights.onnx_graph import OnnxGraph, read_graph
from facesnap_ext.weights.tflite import MAGIC, read_tflite
from facesnap_ext.weights.tflite_onnx import to_onnx

TASK_FILE = "face_landmarker.task"
MEMBER = "face_landmarks_detector.tflite"  # in the task file
CONVERTED_FILE = "face_landmarks.onnx"
SIDE = 256  # of the input, in pixels
POINTS = 478
OUTPUTS = 3 * POINTS  # x, y and z of each point, in pixels of the input
MAX_BYTES = 64 * 2**20  # maximum size of a detector; MediaPipe's has 2.6 MB

_INPUT = (SIDE, SIDE, 3)
_ADVICE = f"download {TASK_FILE} again"


def is_mediapipe(path: Path) -> bool:
    """Return whether a file is a TensorFlow Lite file, or an archive with MediaPipe's landmark detector in it.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(8)
    if start[4:] == MAGIC:
        return True
    if not start.lstrip(b"\0").startswith(b"PK"):  # Google's file begins with two zeros
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return MEMBER in archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def is_landmark_detector(graph: OnnxGraph) -> bool:
    """Return whether an ONNX file takes MediaPipe's input and returns its points."""
    return (
        len(graph.inputs) == 1
        and graph.inputs[0][1:] == _INPUT
        and [math.prod(shape[1:]) for shape in graph.outputs].count(OUTPUTS) == 1
    )


def is_converted(path: Path) -> bool:
    """Return whether a file is an ONNX file of the landmark detector; False if it cannot be read."""
    try:
        return is_landmark_detector(read_graph(path))
    except FaceSnapError:
        return False


def convert_mediapipe(source: Path, out: Path) -> None:
    """Convert `face_landmarker.task`, or the detector in it, to an ONNX file that returns the same values.

    Raises:
        FaceSnapError: the file is damaged or a different network, uses operations that are not supported, or `out`
            cannot be written.
    """
    try:
        import onnx
    except ImportError as error:
        raise FaceSnapError(
            f"{source.name} cannot be converted because onnx cannot be loaded ({reason_of(error)}): install onnx."
        ) from error
    try:
        graph = read_tflite(_detector_in(source))
        shapes = [graph.tensors[index].shape for index in graph.inputs]
        counts = [math.prod(graph.tensors[index].shape) for index in graph.outputs]
        if shapes != [(1, *_INPUT)] or counts.count(OUTPUTS) != 1:
            raise ValueError(f"it is not MediaPipe's detector for {POINTS} points")
        content = to_onnx(graph).SerializeToString()
    except ValueError as error:
        raise FaceSnapError(f"{source.name} cannot be converted ({reason_of(error)}); {_ADVICE}.") from error
    except OSError as error:
        raise FaceSnapError(f"{source.name} cannot be read ({error.strerror or error}); check the file.") from error
    del onnx
    with user_write(out) as part:
        part.write_bytes(content)


def _detector_in(source: Path) -> bytes:
    """Return the detector's file.

    Raises:
        ValueError: the archive is damaged or has no detector, or the detector is too large.
    """
    try:
        with source.open("rb") as file:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                content = file.read(MAX_BYTES + 1)
            else:
                with zipfile.ZipFile(file) as archive, archive.open(MEMBER) as member:
                    content = member.read(MAX_BYTES + 1)
    except KeyError:
        raise ValueError(f"it does not contain {MEMBER}") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise ValueError(f"the archive is damaged: {reason_of(error)}") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
    return content
