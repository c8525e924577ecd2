"""Faces in a photo and their ArcFace embeddings, by insightface from a model pack on this disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.photos import Photo

DETECTOR_SIZES = (640, 576, 512, 448, 384, 320, 256, 192)
"""Side in pixels of the square in which the detector sees a photo; the smaller ones only where it is padded."""

CLOSE_UP = 0.7
"""A face with a longer side above this part of the photo's is looked at again, padded: its points are then better."""

CROP_SCALE = 1.5
"""Side of the crop for CLIP in units of the longer side of the face's box: with hair, ears and chin."""

_PACK_ADVICE = (
    "unpack an insightface pack there (antelopev2, buffalo_l or AuraFace: a detector such as scrfd_10g_bnkps.onnx and"
    " a recognition model such as glintr100.onnx)"
)
# onnxruntime's, by device; what it would choose itself is TensorRT, which builds an engine for minutes at each new size
_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}


class NoFaceError(FaceSnapError):
    """A photo in which no face was found."""


@dataclass(frozen=True, eq=False)
class FacePack:
    """The two models of an insightface pack, and the folder that they came from."""

    folder: Path
    detector: Any  # insightface's SCRFD, or RetinaFace in insightface 0.7
    recognition: Any  # insightface's ArcFaceONNX

    @property
    def providers(self) -> list[str]:
        """The onnxruntime providers that the detector really runs on, first choice first.

        onnxruntime-gpu offers CUDA on a machine without it too, and then quietly takes the CPU.
        """
        return self.detector.session.get_providers()


@dataclass(frozen=True, eq=False)
class Face:
    """One face. Coordinates are pixels of the upright photo, x right and y down, and may lie outside it.

    box: [4] float32, left, top, right, bottom.
    keypoints: [5, 2] float32, eyes, nose and corners of the mouth, those on the picture's left first.
    embedding: [E] float32 ArcFace embedding (E = 512 in the known packs), not normalised.
    score: the detector's confidence, 0...1.
    padded: whether the photo was given a black border for this face to be found.
    detector_size: the side in pixels of the square in which the detector saw the photo with its border.
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
        """[S, S, 3] uint8 RGB: the facial region for CLIP, see `square_crop`."""
        return square_crop(self.photo.pixels, self.box)


def load_pack(folder: str | Path, device: str = "cpu", threads: int | None = None) -> FacePack:
    """Load detector and recognition model of an insightface pack; nothing is downloaded.

    The models lie in `folder` itself, or in its one sub-folder that has any, as antelopev2 unpacks. `device` is "cpu",
    which leaves the GPU's memory to the pictures, or "cuda"; `threads` are those of one model on the CPU, by default
    one for each core.

    Raises:
        FaceSnapError: the folder or one of the two models is missing or cannot be read, or insightface is.
    """
    models = _models(Path(folder), ["detection", "recognition"], device, threads)
    folder = _folder_of_models(Path(folder).expanduser())
    if "detection" not in models or not models["detection"].use_kps:
        raise FaceSnapError(f"{folder} has no face detector with five points: {_PACK_ADVICE}.")
    if "recognition" not in models:
        raise FaceSnapError(f"{folder} has no face recognition model: {_PACK_ADVICE}.")
    return FacePack(folder, models["detection"], models["recognition"])


def load_landmarks68(folder: str | Path) -> Any:
    """The pack's model of 68 points (antelopev2's and buffalo_l's `1k3d68.onnx`), insightface's `Landmark`; None where
    it has none.

    Raises:
        FaceSnapError: as of `load_pack`.
    """
    return _models(Path(folder), ["detection", "landmark_3d_68"]).get("landmark_3d_68")


def points68(model: Any, face: Face) -> np.ndarray:
    """iBUG's 68 points of a face [68, 2] float32, in its photo's pixels, by the model of `load_landmarks68`."""
    from insightface.app.common import Face as Detection

    bgr = np.ascontiguousarray(face.photo.pixels[:, :, ::-1])
    return np.asarray(model.get(bgr, Detection(bbox=face.box)), np.float32)[:, :2]


def _models(folder: Path, tasks: list[str], device: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """The models of a pack for these tasks, by task, as far as it has them; without a detector none."""
    folder = _folder_of_models(folder.expanduser())
    try:
        import onnxruntime
        from insightface.app import FaceAnalysis
    except ImportError as error:
        raise FaceSnapError(
            f"Faces cannot be found because insightface does not load ({error}): install insightface and onnxruntime."
        ) from error
    session: dict[str, Any] = {"providers": _PROVIDERS[device]}
    if threads is not None:
        session["sess_options"] = onnxruntime.SessionOptions()
        session["sess_options"].intra_op_num_threads = threads
    try:
        return FaceAnalysis(str(folder.resolve()), allowed_modules=tasks, **session).models
    except (AssertionError, KeyError):  # how insightface says that there is no detector
        return {}
    except Exception as error:
        raise FaceSnapError(f"The face models in {folder} cannot be read ({error}): {_PACK_ADVICE}.") from error


def find_faces(pack: FacePack, photo: Photo) -> list[Face]:
    """All faces of a photo, by the area of their boxes, largest first.

    Detectors are trained on faces with something around them. Where one finds none, or one that fills the photo, the
    photo is looked at again in the middle of a black border of its own width and height, in `DETECTOR_SIZES` in turn.

    Raises:
        NoFaceError: there is no face.
    """
    bgr = np.ascontiguousarray(photo.pixels[:, :, ::-1])
    padded, size = False, DETECTOR_SIZES[0]
    found = _detect(pack, bgr, size)
    if not found or longer_side(found[0][0]) > CLOSE_UP * max(bgr.shape[:2]):
        for smaller in DETECTOR_SIZES:
            if again := _detect_padded(pack, bgr, smaller):
                found, padded, size = again, True, smaller
                break
    if not found:
        raise no_face_in(photo)
    return [
        Face(photo, box, keypoints, _embedding(pack, bgr, keypoints), score, padded, size)
        for box, keypoints, score in found
    ]


def no_face_in(photo: Photo) -> NoFaceError:
    """The error for a photo without a face."""
    return NoFaceError(
        f"No face was found in {photo.name}: take one in which the face is larger, lit and seen from the front."
    )


def choose(faces: Sequence[Face], which: int | None = None) -> Face:
    """The face number `which` of `find_faces`, counted from 0 by area from the largest; None means the largest.

    Raises:
        FaceSnapError: there is no face of that number.
    """
    which = which or 0
    if not 0 <= which < len(faces):
        raise FaceSnapError(
            f"{faces[0].photo.name} has no face {which}: its {len(faces)} faces are numbered from 0, the largest."
        )
    return faces[which]


def square_crop(pixels: np.ndarray, box: np.ndarray, scale: float = CROP_SCALE) -> np.ndarray:
    """The square around a box, [S, S, 3] like `pixels` [H, W, 3]: the box's longer side times `scale`, same centre.

    The square is moved into the picture, and made smaller where the picture is too small for it, but not smaller than
    the box's part within. Only then can it reach outside, and the picture's edge pixels are repeated there.
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = np.clip(box, 0, [width, height, width, height])
    visible = max(right - left, bottom - top)
    side = max(1, round(min(scale * longer_side(box), max(visible, min(width, height)))))
    rows = _span((box[1] + box[3]) / 2, side, height)
    columns = _span((box[0] + box[2]) / 2, side, width)
    return pixels[rows[:, None], columns]


def _span(centre: float, side: int, length: int) -> np.ndarray:
    start = round(centre - side / 2)
    start = min(max(start, 0), length - side) if side <= length else (length - side) // 2
    return np.arange(start, start + side).clip(0, length - 1)


def _folder_of_models(folder: Path) -> Path:
    if not folder.is_dir():
        raise FaceSnapError(f"There is no folder {folder}: {_PACK_ADVICE}.")
    if any(folder.glob("*.onnx")):
        return folder
    inner = [path for path in folder.iterdir() if any(path.glob("*.onnx"))]
    if len(inner) != 1:
        raise FaceSnapError(f"There are no face models in {folder}: {_PACK_ADVICE}.")
    return inner[0]


def _detect(pack: FacePack, bgr: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Boxes, keypoints and scores of the faces in `bgr` [H, W, 3], largest box first."""
    if min(bgr.shape[:2]) * size < max(bgr.shape[:2]):
        return []  # insightface would shrink the shorter side to nothing
    boxes, keypoints = pack.detector.detect(bgr, input_size=(size, size))
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(-areas, kind="stable")
    return [(boxes[i, :4].astype(np.float32), keypoints[i].astype(np.float32), float(boxes[i, 4])) for i in order]


def _detect_padded(pack: FacePack, bgr: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray, float]]:
    import cv2

    shrink = min(1.0, size / max(bgr.shape[:2]))  # the detector would shrink it further; a border on all is too much
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
    from insightface.app.common import Face as Detection

    return np.asarray(pack.recognition.get(bgr, Detection(kps=keypoints)), np.float32)


def longer_side(box: np.ndarray) -> float:
    """Of a box [4], in its pixels."""
    return float(max(box[2] - box[0], box[3] - box[1]))
