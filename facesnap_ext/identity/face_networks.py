"""Run the networks of a face model pack. Whatever an untrusted file returns or raises, the message names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from facesnap_ext.errors import FaceSnapError, reason_of

MAX_FACES = 128
"""How many faces of one photo are used, the largest first."""

MAX_COORDINATE = 1e6  # pixels; a detector's faces lie in the photo, or a little outside it


@contextmanager
def _reports_unusable(model: Any) -> Iterator[None]:
    """Report a network that cannot be run, or whose outputs insightface cannot read.

    Args:
        model: insightface's model of the network.
    """
    try:
        yield
    except FaceSnapError:
        raise
    except Exception as error:  # onnxruntime, OpenCV, scikit-image and numpy raise errors of many types
        reason = reason_of(error, 200)
        raise FaceSnapError(
            f"The face model {model.model_file} cannot be used ({reason}): unpack the face model pack again."
        ) from error


def detect(detector: Any, bgr: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Detect the faces in a photo [H, W, 3], the largest first.

    Args:
        detector: insightface's SCRFD or RetinaFace.
        size: side of its square input in pixels.

    Returns:
        [N, 5] float32 left, top, right, bottom and score, and [N, 5, 2] float32 keypoints; N is at most `MAX_FACES`.

    Raises:
        FaceSnapError: the network cannot be used.
    """
    with _reports_unusable(detector):
        boxes, keypoints = detector.detect(bgr, input_size=(size, size))
        boxes = np.asarray(boxes, np.float32).reshape(len(boxes), 5)
        keypoints = np.asarray(keypoints, np.float32).reshape(len(boxes), 5, 2)
    if not (_all_below(boxes, MAX_COORDINATE) and _all_below(keypoints, MAX_COORDINATE)):
        raise _damaged(detector)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    largest = np.argsort(-areas, kind="stable")[:MAX_FACES]
    return boxes[largest], keypoints[largest]


def embed(recognition: Any, bgr: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    """Return the embedding [E] float32, not normalised, of the face with these keypoints [5, 2] in `bgr` [H, W, 3].

    Args:
        recognition: insightface's ArcFaceONNX.

    Raises:
        FaceSnapError: the network cannot be used.
    """
    with _reports_unusable(recognition):
        from insightface.app.common import Face as InsightFace

        embedding = np.asarray(recognition.get(bgr, InsightFace(kps=keypoints)), np.float32).reshape(-1)
    if not (np.isfinite(embedding).all() and embedding.any()):
        raise _damaged(recognition)
    return embedding


def landmarks68(model: Any, bgr: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Return iBUG's 68 landmarks [68, 2] float32, in pixel indices, of the face in a box [4] of `bgr` [H, W, 3].

    Args:
        model: insightface's Landmark.

    Raises:
        FaceSnapError: the network cannot be used.
    """
    with _reports_unusable(model):
        from insightface.app.common import Face as InsightFace

        points = np.asarray(model.get(bgr, InsightFace(bbox=box)), np.float32)[:, :2].reshape(68, 2)
    if not _all_below(points, MAX_COORDINATE):
        raise _damaged(model)
    return points


def _damaged(model: Any) -> FaceSnapError:
    return FaceSnapError(
        f"The face model {model.model_file} returns values that are not finite or out of range, so it is damaged:"
        " unpack the face model pack again."
    )


def _all_below(values: np.ndarray, limit: float) -> bool:
    return bool((np.abs(values) < limit).all())  # NaN is not below
