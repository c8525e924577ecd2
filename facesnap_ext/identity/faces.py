"""Detect faces in a photo and compute their ArcFace embeddings, with insightface and a local face model pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.photos import Photo

DETECTOR_SIZES = (640, 576, 512, 448, 384, 320, 256, 192)
"""Side of the detector's square input in pixels. The smaller sizes are only used for padded photos."""

CLOSE_UP = 0.7
"""A face that fills more than this fraction of the photo's longer side is detected again with padding, which gives more
accurate keypoints."""

CROP_SCALE = 1.5
"""Side of the crop for CLIP, relative to the longer side of the face box. The crop includes hair, ears and chin."""

_PACK_ADVICE = (
    "unpack an insightface face model pack there (antelopev2, buffalo_l or AuraFace), with a detector such as"
    " scrfd_10g_bnkps.onnx and a recognition model such as glintr100.onnx"
)
# onnxruntime's execution providers by device. Its own default may be TensorRT, which spends minutes building an engine
# for each new input size.
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
    """A detected face. Coordinates are in pixels of the upright photo, x right and y down, and may lie outside it.

    Attributes:
        photo: the photo that shows the face.
        box: [4] float32 left, top, right, bottom.
        keypoints: [5, 2] float32 left eye, right eye, nose, left and right corner of the mouth, as seen in the photo.
        embedding: [E] float32 ArcFace embedding, not normalised; E = 512 in the known packs.
        score: the detector's confidence, 0…1.
        padded: whether the face was only detected after adding a black border to the photo.
        detector_size: side in pixels of the detector's square input, which contained the photo with any border.
    """

    photo: Photo
    box: np.ndarray
    keypoints: np.ndarray
    embedding: np.ndarray
    score: float
    padded: bool
    detector_size: int

    @property
    def crop(self) -> np.ndarray:
        """The crop of the face for CLIP, [S, S, 3] uint8 RGB; see `square_crop`."""
        return square_crop(self.photo.pixels, self.box)


def load_pack(folder: str | Path, device: str = "cpu", threads: int | None = None) -> FacePack:
    """Load the detector and the recognition model of a face model pack. Nothing is downloaded.

    Args:
        folder: folder that contains the models, or whose only subfolder with models does (as when antelopev2 is
            unpacked).
        device: "cpu", which leaves the GPU memory to image generation, or "cuda".
        threads: CPU threads per model; by default one per core.

    Raises:
        FaceSnapError: the folder, one of the two models or insightface is missing or cannot be loaded.
    """
    models = _models(Path(folder), ["detection", "recognition"], device, threads)
    folder = _folder_of_models(Path(folder).expanduser())
    if "detection" not in models or not models["detection"].use_kps:
        raise FaceSnapError(f"{folder} has no face detector with five keypoints: {_PACK_ADVICE}.")
    if "recognition" not in models:
        raise FaceSnapError(f"{folder} has no face recognition model: {_PACK_ADVICE}.")
    return FacePack(folder, models["detection"], models["recognition"])


def load_landmarks68(folder: str | Path) -> Any:
    """Load a pack's model for 68 landmarks, such as `1k3d68.onnx` in antelopev2 and buffalo_l.

    Returns:
        insightface's `Landmark`, or None if the pack has no such model.

    Raises:
        FaceSnapError: the pack cannot be loaded; see `load_pack`.
    """
    return _models(Path(folder), ["detection", "landmark_3d_68"]).get("landmark_3d_68")


def detect_landmarks68(model: Any, face: Face) -> np.ndarray:
    """Detect iBUG's 68 landmarks of a face.

    Args:
        model: from `load_landmarks68`.
        face: a face found by `find_faces`.

    Returns:
        [68, 2] float32 pixel indices of the photo (pixel centres have integer coordinates).
    """
    from insightface.app.common import Face as InsightFace

    bgr = np.ascontiguousarray(face.photo.pixels[:, :, ::-1])
    return np.asarray(model.get(bgr, InsightFace(bbox=face.box)), np.float32)[:, :2]


def _models(folder: Path, tasks: list[str], device: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """Load a pack's models for the given insightface tasks.

    Returns:
        The available models by task; empty if the pack has no detector.
    """
    folder = _folder_of_models(folder.expanduser())
    try:
        import onnxruntime
        from insightface.app import FaceAnalysis
    except ImportError as error:
        raise FaceSnapError(
            f"Faces cannot be detected because insightface cannot be loaded ({error}): install insightface and"
            " onnxruntime."
        ) from error
    session: dict[str, Any] = {"providers": _PROVIDERS[device]}
    if threads is not None:
        session["sess_options"] = onnxruntime.SessionOptions()
        session["sess_options"].intra_op_num_threads = threads
    try:
        return FaceAnalysis(str(folder.resolve()), allowed_modules=tasks, **session).models
    except (AssertionError, KeyError):  # raised by insightface if there is no detector
        return {}
    except Exception as error:
        raise FaceSnapError(f"The face models in {folder} cannot be read ({error}): {_PACK_ADVICE}.") from error


def find_faces(pack: FacePack, photo: Photo) -> list[Face]:
    """Detect all faces in a photo and sort them by the area of their boxes, largest first.

    Detectors are trained on faces with some surroundings. If no face is found, or one that nearly fills the photo,
    detection is repeated on the photo surrounded by a black border of the photo's own width and height, at each of
    `DETECTOR_SIZES` until a face is found.

    Raises:
        NoFaceError: no face was found.
    """
    bgr = np.ascontiguousarray(photo.pixels[:, :, ::-1])
    padded, size = False, DETECTOR_SIZES[0]
    detections = _detect(pack, bgr, size)
    if not detections or longer_side(detections[0][0]) > CLOSE_UP * max(bgr.shape[:2]):
        for padded_size in DETECTOR_SIZES:
            if padded_detections := _detect_padded(pack, bgr, padded_size):
                detections, padded, size = padded_detections, True, padded_size
                break
    if not detections:
        raise no_face_error(photo)
    return [
        Face(photo, box, keypoints, _embedding(pack, bgr, keypoints), score, padded, size)
        for box, keypoints, score in detections
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
            f"{faces[0].photo.name} has no face {face_index}: it shows {count}, numbered from 0 (the largest)."
        )
    return faces[face_index]


def square_crop(pixels: np.ndarray, box: np.ndarray, scale: float = CROP_SCALE) -> np.ndarray:
    """Cut out the square that is centred on a box and has `scale` times the longer side of the box.

    A square that extends beyond the image is moved inside. If the image is too small for it, it is shrunk, but not
    below the visible part of the box. If it still extends beyond the image, edge pixels are repeated there.

    Args:
        pixels: [H, W, 3].
        box: [4] left, top, right, bottom in pixels.
        scale: side of the square, relative to the longer side of the box.

    Returns:
        [S, S, 3] in the type of `pixels`.
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = np.clip(box, 0, [width, height, width, height])
    visible = max(right - left, bottom - top)
    side = max(1, round(min(scale * longer_side(box), max(visible, min(width, height)))))
    rows = _span((box[1] + box[3]) / 2, side, height)
    columns = _span((box[0] + box[2]) / 2, side, width)
    return pixels[rows[:, None], columns]


def _span(centre: float, side: int, length: int) -> np.ndarray:
    """Return `side` consecutive pixel indices around `centre`, moved into 0…length - 1 or clipped to it."""
    start = round(centre - side / 2)
    start = min(max(start, 0), length - side) if side <= length else (length - side) // 2
    return np.arange(start, start + side).clip(0, length - 1)


def _folder_of_models(folder: Path) -> Path:
    """Return `folder` if it contains ONNX files, otherwise its only subfolder that does."""
    if not folder.is_dir():
        raise FaceSnapError(f"The folder {folder} does not exist: create it and {_PACK_ADVICE}.")
    if any(folder.glob("*.onnx")):
        return folder
    subfolders = sorted(path for path in folder.iterdir() if any(path.glob("*.onnx")))
    if not subfolders:
        raise FaceSnapError(f"The folder {folder} contains no face models: {_PACK_ADVICE}.")
    if len(subfolders) > 1:
        names = " and ".join(path.name for path in subfolders)
        raise FaceSnapError(f"The folder {folder} contains several face model packs ({names}): choose one of them.")
    return subfolders[0]


def _detect(pack: FacePack, bgr: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Return box, keypoints and score of each face in `bgr` [H, W, 3], largest box first."""
    if min(bgr.shape[:2]) * size < max(bgr.shape[:2]):
        return []  # insightface would shrink the shorter side to zero pixels
    boxes, keypoints = pack.detector.detect(bgr, input_size=(size, size))
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(-areas, kind="stable")
    return [(boxes[i, :4].astype(np.float32), keypoints[i].astype(np.float32), float(boxes[i, 4])) for i in order]


def _detect_padded(pack: FacePack, bgr: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Like `_detect`, on the photo surrounded by a black border of its own width and height."""
    import cv2

    # The detector would shrink a larger photo anyway. Adding the border at full size would need too much memory.
    shrink = min(1.0, size / max(bgr.shape[:2]))
    height, width = (max(1, round(side * shrink)) for side in bgr.shape[:2])
    small = cv2.resize(bgr, (width, height), interpolation=cv2.INTER_AREA)
    small = cv2.copyMakeBorder(small, height, height, width, width, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    scale = np.array([bgr.shape[1] / width, bgr.shape[0] / height], np.float32)
    corner = np.array([width, height], np.float32)
    return [
        ((box.reshape(2, 2) - corner).reshape(4) * np.tile(scale, 2), (keypoints - corner) * scale, score)
        for box, keypoints, score in _detect(pack, small, size)
    ]


def _embedding(pack: FacePack, bgr: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    """Return the ArcFace embedding [E] float32 of the face with these keypoints [5, 2] in `bgr` [H, W, 3]."""
    from insightface.app.common import Face as InsightFace

    return np.asarray(pack.recognition.get(bgr, InsightFace(kps=keypoints)), np.float32)


def longer_side(box: np.ndarray) -> float:
    """Return the longer side of a box [4], in its unit."""
    return float(max(box[2] - box[0], box[3] - box[1]))
