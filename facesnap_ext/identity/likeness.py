"""Likeness: how similar the face in a generated image is to the references."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from facesnap_ext.conditioning import Placement
from facesnap_ext.identity.faces import Face
from facesnap_ext.regions import PaintedRegion, Region

GRID = 64
"""A painted region is sampled on this many cells in each direction to find the faces inside it."""


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


def faces_by_person(scores: Sequence[Sequence[float]]) -> list[frozenset[int]]:
    """Give each face in an image to the person whom it resembles most.

    Args:
        scores: the `likeness` of each face to each person, one row per person.

    Returns:
        The indices of each person's faces.
    """
    best = np.argmax(scores, axis=0)
    return [frozenset(np.flatnonzero(best == person).tolist()) for person in range(len(scores))]


def match_faces(faces: Sequence[Face], places: Sequence[Placement]) -> list[Face | None]:
    """Return the face of each person in a generated image; None if the person has no face.

    A person with a painted region has a face whose centre is in that region. A person with landmarks has the face
    nearest to them, centre to centre, among the faces that are nearer to them than to all other people, and the faces
    that contain the centre of the landmarks (several people at one position share a face). A person without landmarks
    has the largest face of those that remain.

    Args:
        faces: the faces in the image, largest first. The image may be larger than the landmarks' image (hires fix).
        places: landmarks and region of each person in the whole image.
    """
    if not faces:
        return [None] * len(places)
    height, width = faces[0].photo.pixels.shape[:2]
    centres = np.stack([box_centre(face.box) for face in faces])
    inside = np.stack([_inside(place.region, centres / [width, height]) for place in places])
    distances = np.full((len(places), len(faces)), np.inf)
    targets = np.full((len(places), 2), np.nan)
    for person, place in enumerate(places):
        if place.landmarks is not None:
            targets[person] = box_centre(place.landmarks.scaled(width, height).box)
            distances[person] = np.linalg.norm(centres - targets[person], axis=1)
    distances[~inside] = np.inf
    boxes = np.stack([face.box for face in faces])
    shared = ((boxes[:, :2] <= targets[:, None]) & (targets[:, None] <= boxes[:, 2:])).all(axis=2)
    own = np.where((distances <= distances.min(axis=0)) | shared, distances, np.inf)
    nearest = [int(row.argmin()) if np.isfinite(row).any() else None for row in own]
    taken = set(nearest)
    for person, place in enumerate(places):
        if place.landmarks is None:
            free = (i for i in range(len(faces)) if inside[person, i] and i not in taken)
            nearest[person] = next(free, None)
    return [None if number is None else faces[number] for number in nearest]


def _inside(region: Region | None, points: np.ndarray) -> np.ndarray:
    """Return which points [N, 2], as fractions of the image, are in a painted region; all without one."""
    if not isinstance(region, PaintedRegion):
        return np.ones(len(points), bool)
    columns, rows = np.clip((points * GRID).astype(int), 0, GRID - 1).T
    return region.sample(GRID, GRID)[rows, columns] > 0


def box_centre(box: np.ndarray) -> np.ndarray:
    """Return the centre [2] of a box [4], in the unit of the box."""
    return box.reshape(2, 2).mean(axis=0)
