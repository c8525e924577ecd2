"""What people want to know of their reference photos: which face is taken, whether it is good enough, and whether the
photos are of one person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.faces import Face, choose, longer_side, no_face_in
from facesnap_ext.identity.framing import framed
from facesnap_ext.photos import Photo

ARCFACE_SIDE = 112
"""Side in pixels of the aligned face that ArcFace sees; of a smaller face it sees a magnified one."""

BLURRED = 2.0
"""Blur in pixels of the aligned face from which a photo is called blurred. Of nine faces in photos that scikit-image,
matplotlib and insightface come with, blurred by a Gaussian of 2 pixels, a face embedding keeps a cosine of .60 to .85
with the sharp one's, and all nine measure above this; blurred by 1 pixel it keeps .94 or more, and none does."""

STRANGERS = 0.2
SAME_PERSON = 0.28
"""Cosines of ArcFace embeddings below which insightface's example calls two photos different people, and from which on
the same person (arcface_onnx in https://github.com/deepinsight/insightface). Of the 36 pairs of different people among
the nine faces above, 34 lie below the first and one above the second; the miniature's pairs have .00 and .76 on
average."""


@dataclass(frozen=True, eq=False)
class Reference:
    """One reference photo.

    faces: by size from the largest; none where none was found.
    chosen: the number of the face that is taken; None where the photo has no face of that number.
    blur: of the chosen face, see `blur`.
    likeness: mean cosine of its embedding with the other photos'; None without others.
    warnings: what to know of it, in sentences.
    """

    photo: Photo
    faces: tuple[Face, ...]
    chosen: int | None
    blur: float | None
    likeness: float | None
    warnings: tuple[str, ...]

    def picture(self, side: int | None = 256) -> Image.Image:
        """The photo with all faces framed and numbered, at most `side` pixels wide and high."""
        return framed(self.photo, self.faces, self.chosen, side)


@dataclass(frozen=True, eq=False)
class ReferenceReport:
    """All reference photos of a unit.

    cosines: [R, R] float32 of the chosen faces' embeddings; NaN in rows and columns of photos without one.
    misfit: the index of the photo that does not fit the others, if that is certain.
    notes: what to know of them together, in sentences.
    """

    references: tuple[Reference, ...]
    cosines: np.ndarray
    misfit: int | None
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report in plain text: a line for each photo, its warnings, the notes."""
        lines = []
        for reference in self.references:
            parts = [reference.photo.name]
            if reference.chosen is not None:
                parts.append(f"face of {round(longer_side(reference.faces[reference.chosen].box))} pixels")
            if reference.likeness is not None:
                parts.append(f"likeness to the others {reference.likeness:.2f}")
            lines.append(", ".join(parts))
            lines += [f"  {warning}" for warning in reference.warnings]
        return [*lines, *self.notes]

    def to_json(self) -> dict[str, Any]:
        """The same for machines, without pictures and embeddings; boxes in pixels, NaN as None."""
        rounded = [[None if np.isnan(value) else round(float(value), 4) for value in row] for row in self.cosines]
        return {
            "photos": [
                {
                    "photo": reference.photo.name,
                    "faces": [[round(float(edge), 1) for edge in face.box] for face in reference.faces],
                    "chosen": reference.chosen,
                    "blur": None if reference.blur is None else round(reference.blur, 2),
                    "likeness": None if reference.likeness is None else round(reference.likeness, 4),
                    "warnings": list(reference.warnings),
                }
                for reference in self.references
            ],
            "cosines": rounded,
            "misfit": self.misfit,
            "notes": list(self.notes),
        }


def examine(found: Sequence[tuple[Photo, Sequence[Face]]], which: int = 0, apart: bool = False) -> ReferenceReport:
    """Report on the reference photos of one person.

    Args:
        found: each photo with all its faces, by size from the largest (`faces.find_faces`); none where none was found.
        which: the number of the face that is taken of each.
        apart: the photos are of a person each, and are not compared.
    """
    chosen = [faces[which] if which < len(faces) else None for _, faces in found]
    matrix = cosines([None if face is None or apart else face.embedding for face in chosen])
    odd = misfit(matrix)
    references = []
    for i, ((photo, faces), face) in enumerate(zip(found, chosen)):
        others = np.delete(matrix[i], i)
        others = others[~np.isnan(others)]
        measured = None if face is None else blur(face)
        warnings = _warnings(photo, faces, which, measured)
        if i == odd:
            warnings.append(
                f"The face in {photo.name} is not like the others, which are like each other: leave this photo out if "
                "it shows somebody else."
            )
        likeness = float(others.mean()) if len(others) else None
        references.append(Reference(photo, tuple(faces), which if face else None, measured, likeness, tuple(warnings)))
    return ReferenceReport(tuple(references), matrix, odd, tuple(_notes(matrix, odd)))


def cosines(embeddings: Sequence[np.ndarray | None]) -> np.ndarray:
    """[R, R] float32: the cosine of each embedding [E] with each, NaN where one is missing."""
    matrix = np.full((len(embeddings), len(embeddings)), np.nan, np.float32)
    given = [i for i, embedding in enumerate(embeddings) if embedding is not None]
    if given:
        directions = np.stack([embeddings[i] / np.linalg.norm(embeddings[i]) for i in given])
        matrix[np.ix_(given, given)] = np.clip(directions @ directions.T, -1, 1)
    return matrix


def misfit(matrix: np.ndarray) -> int | None:
    """The one photo of at least three that shows somebody else, by the cosines [R, R] of `cosines`.

    It is on average less like the others than `STRANGERS`, and every other one is on average at least as much like the
    rest as `SAME_PERSON`. Of two photos nobody can say which one is wrong.
    """
    there = np.flatnonzero(~np.isnan(np.diag(matrix)))
    if len(there) < 3:
        return None
    worst = min(there, key=lambda i: _mean_with(matrix, i, there))
    rest = there[there != worst]
    agree = all(_mean_with(matrix, i, rest) >= SAME_PERSON for i in rest)
    return int(worst) if agree and _mean_with(matrix, worst, there) < STRANGERS else None


def blur(face: Face) -> float:
    """How blurred a face is: the standard deviation in pixels, of the 112 that ArcFace sees, of the Gaussian blur that
    would take as much detail from a picture of nature.

    Such pictures have a power spectrum of 1/k^2 (Field 1987); after a Gaussian blur of width s their mean squared
    gradient is s^2 times their mean squared Laplacian, whatever the contrast. A blur of 1 is added first, which
    silences noise, and taken off the result.
    """
    import cv2

    grey = cv2.GaussianBlur(_aligned(face), (0, 0), 1.0)
    inner = (slice(24, 104), slice(20, 92))  # brows to chin, no background
    laplacian = cv2.Laplacian(grey, cv2.CV_32F, ksize=1)[inner]
    across, down = (cv2.Sobel(grey, cv2.CV_32F, *axis, ksize=3)[inner] / 8 for axis in ((1, 0), (0, 1)))
    bend = float((laplacian**2).mean())
    slope = float((across**2 + down**2).mean())
    return max(slope / bend - 1, 0.0) ** 0.5 if bend else float(ARCFACE_SIDE)


def padded_note(face: Face) -> str:
    """The sentence for a face that was found with a border only."""
    return f"The face in {face.photo.name} fills the picture; it was found with a border added."


def _warnings(photo: Photo, faces: Sequence[Face], which: int, blurred: float | None) -> list[str]:
    if not faces:
        return [str(no_face_in(photo))]
    try:
        face = choose(faces, which)
    except FaceSnapError as error:
        return [str(error)]
    warnings = []
    if len(faces) > 1:
        taken = "the largest is taken" if which == 0 else f"number {which} is taken, counted from 0, the largest"
        warnings.append(f"{photo.name} shows {len(faces)} faces: {taken}.")
    if face.padded:
        warnings.append(padded_note(face))
    if (side := longer_side(face.box)) < ARCFACE_SIDE:
        warnings.append(
            f"The face in {photo.name} is small, {round(side)} pixels where {ARCFACE_SIDE} or more are "
            "wanted: a photo in which it is larger keeps more of the person."
        )
    elif blurred is not None and blurred > BLURRED:  # a small face is magnified, and blurred by that
        warnings.append(f"The face in {photo.name} is blurred: a sharper photo keeps more of the person.")
    return warnings


def _notes(matrix: np.ndarray, odd: int | None) -> list[str]:
    there = np.flatnonzero(~np.isnan(np.diag(matrix)))
    if len(there) < 2 or odd is not None:
        return []
    lowest = min(_mean_with(matrix, i, there) for i in there)
    if lowest >= STRANGERS:
        return []
    if len(there) == 2:
        return [f"The two photos are hardly alike ({lowest:.2f}): make sure that they show the same person."]
    return ["Some of the photos are hardly alike: make sure that all show the same person."]


def _mean_with(matrix: np.ndarray, i: int, others: np.ndarray) -> float:
    """Mean cosine of photo `i` with `others` but itself."""
    return float(matrix[i, others[others != i]].mean())


def _aligned(face: Face) -> np.ndarray:
    """The face as ArcFace sees it, [112, 112] float32 grey in 0…255, the photo's edges repeated beyond it; of a large
    face every pixel counts, so that noise and fine detail are averaged."""
    import cv2
    from insightface.utils.face_align import estimate_norm

    pixels, keypoints = face.photo.pixels, face.keypoints
    scale = float(np.hypot(*estimate_norm(keypoints, ARCFACE_SIDE)[0, :2]))
    if scale < 1:
        height, width = pixels.shape[:2]
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        keypoints = keypoints * np.array([size[0] / width, size[1] / height], np.float32)
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)
    move = estimate_norm(keypoints, ARCFACE_SIDE)
    return cv2.warpAffine(grey, move, (ARCFACE_SIDE, ARCFACE_SIDE), borderMode=cv2.BORDER_REPLICATE)
