"""How like the references the face in a finished picture is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from facesnap_ext.identity.faces import Face
from facesnap_ext.landmarks.points72 import Landmarks

MARK = "FaceSnap likeness"  # among the generation parameters


def likeness(face: Face, embeddings: Tensor) -> float:
    """Cosine of a face's ArcFace embedding with the references' mean direction, from -1 to 1.

    It flatters: the network that measures is the one whose embedding conditions the picture, so a picture may please
    it by what no eye sees. Use it to compare pictures of one person made in one way, and to find failures; to compare
    methods take a network that conditions none of them, as `facesnap evaluate` does.

    Args:
        embeddings: [R, E] of the references (`Prepared.embeddings`), of any length, from the same network.
    """
    mean = F.normalize(embeddings.float(), dim=-1).mean(dim=0).numpy()
    return float(np.dot(face.embedding, mean) / np.linalg.norm(face.embedding) / np.linalg.norm(mean))


def face_at(faces: Sequence[Face], landmarks: Landmarks | None) -> Face:
    """The face of a finished picture that the landmarks were meant for: the one whose box has its middle nearest to
    theirs. Without landmarks the first.

    Args:
        faces: at least one, all of one picture, which may be larger than the landmarks' (hires).
        landmarks: for this picture, uncropped.
    """
    if landmarks is None:
        return faces[0]
    height, width = faces[0].photo.pixels.shape[:2]
    target = middle(landmarks.scaled(width, height).box)
    return min(faces, key=lambda face: float(np.linalg.norm(middle(face.box) - target)))


def middle(box: np.ndarray) -> np.ndarray:
    """[2] of a box [4], in its pixels."""
    return box.reshape(2, 2).mean(axis=0)


def infotext(value: float | None) -> dict[str, str]:
    """`likeness` as a generation parameter; nothing where there was no face."""
    return {} if value is None else {MARK: f"{value:.2f}"}


def sentence(value: float | None) -> str:
    """`likeness` for people."""
    if value is None:
        return "No face was found in the picture to compare with the reference."
    return f"Likeness of the face to the reference: {value:.2f}, as the network sees it that also guided the picture."
