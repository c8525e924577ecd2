"""Detect faces in a photo and compute their ArcFace embeddings, with insightface and a local face model pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.identity.detection import LEVEL_FROM, detect_faces, longer_side
from facesnap_ext.identity.face_networks import embed, landmarks68
from facesnap_ext.photos import Photo
from facesnap_ext.turns import roll_of, turn_box, turn_points, turned
from facesnap_ext.weights.face_pack import onnx_files, pack_files
from facesnap_ext.weights.onnx_graph import read_bounded_graph

CROP_SCALE = 1.5
"""Side of the crop for CLIP, relative to the longer side of the face box. The crop includes hair, ears and chin."""

_PACK_ADVICE = (
    "unpack an insightface face model pack there (antelopev2, buffalo_l or AuraFace), with a detector such as"
    " scrfd_10g_bnkps.onnx and a recognition model such as glintr100.onnx"
)
# onnxruntime's execution providers by device. onnxruntime's default may be TensorRT, which spends minutes building an
# engine for each new input size.
_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}


class NoFaceError(FaceSnapError):
    """No face was found in a photo."""


@dataclass(frozen=True, eq=False)
class FacePack:
    """Detector and recognition model of a face model pack (insightface).

    Attributes:
        folder: folder that contains the models.
        detector: insightface's SCRFD, or RetinaFace in insightface 0.7.
        recognition: insightface's ArcFaceONNX.
    """

    folder: Path
    detector: Any
    recognition: Any

    @property
    def providers(self) -> list[str]:
        """The onnxruntime providers that the detector actually uses, in order of preference.

        onnxruntime-gpu offers CUDA even on machines without it, and then silently falls back to the CPU.
        """
        return self.detector.session.get_providers()


@dataclass(frozen=True, eq=False)
class Face:
    """A detected face. Coordinates are in pixels of the photo, x right and y down, and may lie outside it.

    Attributes:
        photo: the photo that shows the face.
        box: [4] float32 left, top, right, bottom.
        keypoints: [5, 2] float32 left eye, right eye, nose, left and right corner of the mouth, as seen when the face
            is upright.
        embedding: [E] float32 ArcFace embedding, not normalised; E = 512 in the known packs.
        score: the detector's confidence, 0…1.
        padded: whether the face was detected only after adding a black border to the photo.
        detector_size: side in pixels of the detector's square input, which contained the photo and its border, if any.
        turn: clockwise rotation of the photo at this face, in degrees: 0, 90, 180 or 270.
    """

    photo: Photo
    box: np.ndarray
    keypoints: np.ndarray
    embedding: np.ndarray
    score: float
    padded: bool
    detector_size: int
    turn: int = 0

    @property
    def crop(self) -> np.ndarray:
        """The upright crop of the face for CLIP, [S, S, 3] uint8 RGB; see `square_crop`."""
        crop = square_crop(self.photo.pixels, self.box)
        if not self.tilt:
            return np.ascontiguousarray(turned(crop, self.turn))
        return _levelled(self.photo.pixels, self.box, self.turn + self.tilt, len(crop))

    @property
    def tilt(self) -> float:
        """The clockwise tilt of the head that is levelled in addition to `turn`, in degrees; 0 if it is at most
        `LEVEL_FROM`."""
        roll = roll_of(self.keypoints, self.turn)
        return roll if abs(roll) > LEVEL_FROM else 0.0

    @property
    def turned_box(self) -> np.ndarray:
        """The box in pixels of the upright photo."""
        height, width = self.photo.pixels.shape[:2]
        return turn_box(self.box, self.turn, width, height).astype(np.float32)


def load_pack(folder: str | Path, device: str = "cpu", threads: int | None = None) -> FacePack:
    """Load the detector and the recognition model of a face model pack, file by file. Nothing is downloaded.

    Args:
        folder: folder that contains the models, directly or in its only subfolder with models (as when antelopev2 is
            unpacked).
        device: "cpu", which leaves the GPU memory to image generation, or "cuda".
        threads: CPU threads per model; by default one per core.

    Raises:
        FaceSnapError: the folder, one of the two models or insightface is missing or cannot be loaded.
    """
    files = pack_files(_folder_of_models(Path(folder).expanduser()))
    if not files.is_complete and files.problems:
        raise FaceSnapError(f"The face models in {files.folder} cannot be read ({files.problems[0]}): {_PACK_ADVICE}.")
    if files.detector is None:
        raise FaceSnapError(f"{files.folder} has no face detector with five keypoints: {_PACK_ADVICE}.")
    if files.recognition is None:
        raise FaceSnapError(f"{files.folder} has no face recognition model: {_PACK_ADVICE}.")
    detector = _load_model(files.detector, "detection", device, threads)
    if not detector.use_kps:
        raise FaceSnapError(f"{files.folder} has no face detector with five keypoints: {_PACK_ADVICE}.")
    return FacePack(files.folder, detector, _load_model(files.recognition, "recognition", device, threads))


def load_landmarks68(folder: str | Path) -> Any:
    """Load a pack's model for 68 landmarks, such as `1k3d68.onnx` in antelopev2 and buffalo_l.

    Returns:
        insightface's `Landmark`, or None if the pack has no such model.

    Raises:
        FaceSnapError: the model cannot be loaded, see `load_pack`.
    """
    path = landmarks68_file(folder)
    return None if path is None else _load_model(path, "landmark_3d_68")


def landmarks68_file(folder: str | Path) -> Path | None:
    """Return the file of a pack's model for 68 landmarks; None if the pack has no such model.

    Raises:
        FaceSnapError: the folder contains no face models, or several packs.
    """
    return pack_files(_folder_of_models(Path(folder).expanduser())).landmarks68


def detect_landmarks68(model: Any, face: Face) -> np.ndarray:
    """Detect iBUG's 68 landmarks of a face.

    Args:
        model: from `load_landmarks68`.
        face: a face found by `find_faces`.

    Returns:
        [68, 2] float32 pixel indices of the photo (pixel centres have integer coordinates).
    """
    bgr = np.ascontiguousarray(turned(face.photo.pixels[:, :, ::-1], face.turn))
    points = landmarks68(model, bgr, face.turned_box)
    if not face.turn:
        return points
    height, width = bgr.shape[:2]
    return turn_points(points + 0.5, -face.turn, width, height).astype(np.float32) - 0.5


def _load_model(path: Path, task: str, device: str = "cpu", threads: int | None = None) -> Any:
    """Load one network for an insightface task.

    Raises:
        FaceSnapError: insightface is missing, or the file cannot be loaded.
    """
    try:
        import onnxruntime
        from insightface import model_zoo
        from insightface.app import common  # noqa: F401 (its Face is used with the models)
    except ImportError as error:
        raise FaceSnapError(
            f"Faces cannot be detected because insightface cannot be loaded ({error}): install insightface and"
            " onnxruntime."
        ) from error
    read_bounded_graph(path, _PACK_ADVICE)
    onnxruntime.set_default_logger_severity(3)
    session: dict[str, Any] = {"providers": _PROVIDERS[device]}
    if threads is not None:
        session["sess_options"] = onnxruntime.SessionOptions()
        session["sess_options"].intra_op_num_threads = threads
    try:
        model = model_zoo.get_model(str(path.absolute()), **session)
        if model is None or model.taskname != task:
            raise ValueError(f"it is not a model for the task {task}")
        return model
    except Exception as error:  # onnxruntime, onnx and insightface raise errors of many types
        reason = reason_of(error)
        raise FaceSnapError(f"The face model {path} cannot be loaded ({reason}): {_PACK_ADVICE}.") from error


def find_faces(pack: FacePack, photo: Photo) -> list[Face]:
    """Detect all faces in a photo and sort them by the area of their boxes, largest first; see `detect_faces`.

    Raises:
        NoFaceError: no face was found.
    """
    bgr = np.ascontiguousarray(photo.pixels[:, :, ::-1])
    detections = detect_faces(pack.detector, bgr)
    if not detections:
        raise no_face_error(photo)
    return [
        Face(
            photo,
            one.box,
            one.keypoints,
            embed(pack.recognition, bgr, one.keypoints),
            one.score,
            one.padded,
            one.size,
            one.turn,
        )
        for one in detections
    ]


def no_face_error(photo: Photo) -> NoFaceError:
    """Return the error for a photo in which no face was found."""
    return NoFaceError(
        f"No face was found in {photo.name}: use a photo with a larger, well-lit face that is seen from the front."
    )


def select_face(faces: Sequence[Face], face_index: int | None = None) -> Face:
    """Return one of the faces found in a photo.

    Args:
        faces: all faces of the photo, at least one, from `find_faces`.
        face_index: index of the face by area, 0 = largest; None means the largest.

    Raises:
        FaceSnapError: the index is out of range.
    """
    face_index = face_index or 0
    if not 0 <= face_index < len(faces):
        count = f"{len(faces)} faces" if len(faces) > 1 else "1 face"
        raise FaceSnapError(
            f"{faces[0].photo.name} has no face {face_index}: it shows {count}, numbered from 0 (the largest); choose "
            "one of these."
        )
    return faces[face_index]


def square_crop(pixels: np.ndarray, box: np.ndarray, scale: float = CROP_SCALE) -> np.ndarray:
    """Cut out the square that is centred on a box and has `scale` times the longer side of the box.

    A square that extends beyond the image is moved inside. If the image is too small for it, it is shrunk, but not
    below the visible part of the box. If it still extends beyond the image, the edge pixels are repeated.

    Args:
        pixels: [H, W, 3].
        box: [4] left, top, right, bottom in pixels.
        scale: side of the square, relative to the longer side of the box.

    Returns:
        [S, S, 3] with the dtype of `pixels`.
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = np.clip(box, 0, [width, height, width, height])
    visible = max(right - left, bottom - top)
    side = max(1, round(min(scale * longer_side(box), max(visible, min(width, height)))))
    rows = _span((box[1] + box[3]) / 2, side, height)
    columns = _span((box[0] + box[2]) / 2, side, width)
    return pixels[rows[:, None], columns]


def _levelled(pixels: np.ndarray, box: np.ndarray, angle: float, side: int) -> np.ndarray:
    """Return the square [side, side, 3] around a box, after rotating the photo counterclockwise by `angle` degrees
    about the box's centre. Edge pixels are repeated outside the photo."""
    import cv2

    x, y = (float(value) for value in box.reshape(2, 2).mean(axis=0))
    transform = cv2.getRotationMatrix2D((x, y), angle, 1.0)
    transform[0, 2] += side / 2 - x
    transform[1, 2] += side / 2 - y
    return cv2.warpAffine(pixels, transform, (side, side), borderMode=cv2.BORDER_REPLICATE)


def _span(centre: float, side: int, length: int) -> np.ndarray:
    """Return `side` consecutive pixel indices around `centre`, moved into 0…length - 1 or clipped to it."""
    start = round(centre - side / 2)
    start = min(max(start, 0), length - side) if side <= length else (length - side) // 2
    return np.arange(start, start + side).clip(0, length - 1)


def _folder_of_models(folder: Path) -> Path:
    """Return `folder` if it contains ONNX files, otherwise its only subfolder that does."""
    if not folder.is_dir():
        raise FaceSnapError(f"The folder {folder} does not exist: create it and {_PACK_ADVICE}.")
    if onnx_files(folder):
        return folder
    subfolders = sorted(path for path in folder.iterdir() if onnx_files(path))
    if not subfolders:
        raise FaceSnapError(f"The folder {folder} contains no face models: {_PACK_ADVICE}.")
    if len(subfolders) > 1:
        names = " and ".join(path.name for path in subfolders)
        raise FaceSnapError(f"The folder {folder} contains several face model packs ({names}): choose one of them.")
    return subfolders[0]
