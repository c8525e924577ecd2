"""Likeness: how similar the face in a generated image is to the references."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from facesnap_ext.identity.faces import Face
from facesnap_ext.landmarks.points72 import Landmarks

INFOTEXT_KEY = "FaceSnap likeness"


def likeness(face: Face, embeddings: Tensor) -> float:
    """Return the cosine similarity of a face's ArcFace embedding and the references' mean direction, -1…1.

    The value is biased upwards, because it is measured by the same network whose embedding conditions the image: an
    image may score high for reasons that no viewer would notice. Use it to compare images of one person made with the
    same method, and to detect failures. To compare methods, use a network that conditions none of them, as
    `facesnap evaluate` does.

    Args:
        face: the face in the generated image.
        embeddings: [R, E] embeddings of the references from the same network, of any norm (`Prepared.embeddings`).
    """
    mean = F.normalize(embeddings.float(), dim=-1).mean(dim=0).numpy()
    return float(np.dot(face.embedding, mean) / np.linalg.norm(face.embedding) / np.linalg.norm(mean))


def face_at(faces: Sequence[Face], landmarks: Landmarks | None) -> Face:
    """Return the face of a generated image that was conditioned on the landmarks: the one whose box centre is nearest
    to the centre of the landmarks.

    Args:
        faces: the faces in the image, at least one. The image may be larger than the landmarks' image (hires fix).
        landmarks: the landmarks of the whole image, uncropped; None selects the first face.
    """
    if landmarks is None:
        return faces[0]
    height, width = faces[0].photo.pixels.shape[:2]
    target = box_centre(landmarks.scaled(width, height).box)
    return min(faces, key=lambda face: float(np.linalg.norm(box_centre(face.box) - target)))


def box_centre(box: np.ndarray) -> np.ndarray:
    """Return the centre [2] of a box [4], in the unit of the box."""
    return box.reshape(2, 2).mean(axis=0)


def infotext(value: float | None) -> dict[str, str]:
    """Return the likeness as a generation parameter; empty if it is None because no face was found."""
    return {} if value is None else {INFOTEXT_KEY: f"{value:.2f}"}
