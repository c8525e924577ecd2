"""Choose the face of img2img's init image that a job changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from facesnap_ext.identity.faces import Face, select_face

COVERED = 0.1
"""Fraction of a face's box that must be under the mask for the job to change this face."""

ABOUT_AS_MUCH = 0.8
"""The largest face is chosen among those with at least this coverage, relative to the face with the highest
coverage."""


@dataclass(frozen=True, eq=False)
class InitPart:
    """The part of the init image that a job changes.

    Attributes:
        mask: [H, W], above 0 where the init image is changed, in any resolution of the same aspect ratio; None changes
            the whole image.
        tile: whether a script or another extension chose the part, such as a tile of an upscaled image or the face
            that ADetailer found. The job then changes the face in this part, if there is one.
        among: indices of the faces that can be the person's, the largest face being 0; None for all faces.
    """

    mask: np.ndarray | None = None
    tile: bool = False
    among: frozenset[int] | None = None

    def choose(self, faces: Sequence[Face], face_index: int = 0) -> Face | None:
        """The face that the job changes; None if there is no such face.

        Args:
            faces: all faces of the init image, the largest first.
            face_index: the user's choice; 0 selects the largest face under the mask, or the nearest face if there is
                none under it.

        Raises:
            FaceSnapError: the image has faces, but no face with this index.
        """
        if self.among is not None:
            faces, face_index = [face for index, face in enumerate(faces) if index in self.among], 0
        if self.mask is None or (face_index and not self.tile):
            if self.tile and face_index >= len(faces):
                return None
            return select_face(faces, face_index) if faces else None
        covered = [self._covered(face) for face in faces]
        most = max(covered, default=0.0)
        if most >= COVERED:
            return next(face for face, share in zip(faces, covered) if share >= ABOUT_AS_MUCH * most)
        return None if self.tile or not faces else min(faces, key=self._distance)

    def _covered(self, face: Face) -> float:
        """The fraction of a face's visible box that is under the mask."""
        assert self.mask is not None
        box = self._in_mask(face)
        height, width = self.mask.shape
        left, top = np.clip(np.floor(box[:2]), 0, [width - 1, height - 1]).astype(int)
        right, bottom = np.clip(np.ceil(box[2:]), [left + 1, top + 1], [width, height]).astype(int)
        return float((self.mask[top:bottom, left:right] > 0).mean())

    def _distance(self, face: Face) -> float:
        """The distance of a face's centre from the mask's centre, in pixels of the mask."""
        assert self.mask is not None
        rows, columns = np.nonzero(self.mask > 0)
        if not len(rows):
            return 0.0
        x, y = self._in_mask(face).reshape(2, 2).mean(0)
        return float(np.hypot(x - columns.mean(), y - rows.mean()))

    def _in_mask(self, face: Face) -> np.ndarray:
        """A face's box in pixels of the mask."""
        assert self.mask is not None
        height, width = face.photo.pixels.shape[:2]
        return face.box * np.tile([self.mask.shape[1] / width, self.mask.shape[0] / height], 2)


WHOLE_IMAGE = InitPart()
