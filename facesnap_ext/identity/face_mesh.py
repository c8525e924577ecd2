"""Detect the 478 points of MediaPipe's face mesh, and iBUG's 68 among them, with the converted landmark detector.

As in MediaPipe, the network sees a square around the face, which is rotated so that the eyes are level. Its side is
`CROP_SCALE` times the longer side of the face box, and pixels are RGB in 0…1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.identity.detection import longer_side
from facesnap_ext.identity.face_networks import MAX_COORDINATE
from facesnap_ext.weights.mediapipe import OUTPUTS, POINTS, SIDE, TASK_FILE, is_landmark_detector
from facesnap_ext.weights.onnx_graph import read_bounded_graph

if TYPE_CHECKING:
    from facesnap_ext.identity.faces import Face

CROP_SCALE = 1.5

INDICES_68 = (
    *(127, 234, 93, 132, 58, 172, 150, 176, 152, 400, 379, 397, 288, 361, 323, 454, 356),  # contour
    *(70, 63, 105, 66, 107, 336, 296, 334, 293, 300),  # brows
    *(168, 197, 5, 4, 98, 97, 2, 326, 327),  # nose
    *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),  # eyes
    *(61, 40, 37, 0, 267, 270, 291, 321, 314, 17, 84, 91),  # outer lips
    *(78, 81, 13, 311, 308, 402, 14, 178),  # inner lips
)
"""For each of iBUG's 68 points, the point of MediaPipe's face mesh. The mean face "mediapipe" of the open face model is
made from the same points."""

_ADVICE = f"convert {TASK_FILE} again"


@dataclass(frozen=True, eq=False)
class FaceMesh:
    """The loaded network.

    Attributes:
        path: its file, for messages.
        session: onnxruntime's.
    """

    path: Path
    session: Any


def load_face_mesh(path: Path) -> FaceMesh:
    """Load a converted landmark detector to the CPU.

    Raises:
        FaceSnapError: onnxruntime is missing, or the file cannot be loaded.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise FaceSnapError(
            f"Landmarks cannot be detected because onnxruntime cannot be loaded ({error}): install onnxruntime."
        ) from error
    if not is_landmark_detector(read_bounded_graph(path, _ADVICE)):
        raise FaceSnapError(f"{path} is not MediaPipe's landmark detector: {_ADVICE}.")
    onnxruntime.set_default_logger_severity(3)
    try:
        return FaceMesh(path, onnxruntime.InferenceSession(str(path.absolute()), providers=["CPUExecutionProvider"]))
    except Exception as error:  # onnxruntime raises errors of many types
        raise FaceSnapError(
            f"The landmark detector {path} cannot be loaded ({reason_of(error)}): {_ADVICE}."
        ) from error


def mesh_points(mesh: FaceMesh, face: Face) -> np.ndarray:
    """Detect the points of the face mesh: [478, 2] float32 pixels of the photo; pixel centres are at 0.5.

    Raises:
        FaceSnapError: the network cannot be used, or returns values that are not finite or out of range.
    """
    to_photo = _crop_to_photo(face.box, face.keypoints)
    with np.errstate(invalid="ignore"):
        points = _run(mesh, _crop(face.photo.pixels, to_photo)) @ to_photo[:, :2].T + to_photo[:, 2]
    if not (np.abs(points) < MAX_COORDINATE).all():  # NaN is not below
        raise FaceSnapError(
            f"The landmark detector {mesh.path} returns values that are not finite or out of range: {_ADVICE}."
        )
    return points.astype(np.float32)


def mesh_points68(mesh: FaceMesh, face: Face) -> np.ndarray:
    """Detect iBUG's 68 landmarks: [68, 2] float32; see `mesh_points`."""
    return mesh_points(mesh, face)[list(INDICES_68)]


def _crop_to_photo(box: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    """Return the affine map [2, 3] from positions in the network's input to positions in the photo."""
    across, down = (float(value) for value in keypoints[1] - keypoints[0])  # from eye to eye
    angle, scale = math.atan2(down, across), CROP_SCALE * longer_side(box) / SIDE
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    linear = np.array([[cosine, -sine], [sine, cosine]])
    centre = box.reshape(2, 2).mean(axis=0, dtype=np.float64)
    return np.column_stack([linear, centre - linear @ (SIDE / 2, SIDE / 2)])


def _crop(pixels: np.ndarray, to_photo: np.ndarray) -> np.ndarray:
    """Return the network's input [1, 256, 256, 3] float32 in 0…1. Edge pixels are repeated outside the photo."""
    import cv2

    by_index = to_photo.copy()  # OpenCV's positions are indices, so that pixel centres have integer coordinates
    by_index[:, 2] += to_photo[:, :2] @ (0.5, 0.5) - 0.5
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    crop = cv2.warpAffine(pixels, by_index, (SIDE, SIDE), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return crop[None].astype(np.float32) / 255


def _run(mesh: FaceMesh, crop: np.ndarray) -> np.ndarray:
    """Return x and y of the points in pixels of the network's input: [478, 2] float64."""
    try:
        outputs: Sequence[np.ndarray] = mesh.session.run(None, {mesh.session.get_inputs()[0].name: crop})
        points = next(output for output in outputs if output.size == OUTPUTS)
        return np.asarray(points, np.float64).reshape(POINTS, 3)[:, :2]
    except Exception as error:  # onnxruntime and numpy raise errors of many types
        reason = reason_of(error, 200)
        raise FaceSnapError(f"The landmark detector {mesh.path} cannot be used ({reason}): {_ADVICE}.") from error
