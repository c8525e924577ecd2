"""Check reference photos: which face is used, whether its quality is sufficient, and whether all photos show the same
person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.blur import ARCFACE_SIDE, BLUR_THRESHOLD, blur
from facesnap_ext.identity.faces import Face, longer_side, no_face_error, select_face
from facesnap_ext.identity.framing import annotate_faces
from facesnap_ext.photos import Photo

DIFFERENT_PERSON = 0.2
SAME_PERSON = 0.28
"""Cosine similarities of ArcFace embeddings: insightface's example assumes different people below the first value and
the same person from the second value up (arcface_onnx in https://github.com/deepinsight/insightface). Of the 36 pairs
of different people among nine faces (see `blur.BLUR_THRESHOLD`), 34 lie below the first and one above the second. In
the miniature, the average is .00 for pairs of different people and .76 for pairs of photos of one person."""

FINDINGS = ("no_face", "no_such_face", "stranger", "small", "blurred", "several", "turned", "close_up")
"""What can be noticed about a photo, the most serious first. The first two make a photo unusable."""

UNUSABLE = FINDINGS[:2]

NOTES = (
    "The two faces hardly resemble each other",
    "make sure that both photos show the same person.",
    "Some of the faces hardly resemble each other: make sure that all photos show the same person.",
)
"""The fixed wording in `ReferenceReport.notes`."""


@dataclass(frozen=True)
class Finding:
    """What was noticed about a reference photo.

    Attributes:
        kind: one of `FINDINGS`.
        sentence: the warning or note for the user.
    """

    kind: str
    sentence: str


@dataclass(frozen=True, eq=False)
class Reference:
    """The result of checking one reference photo.

    Attributes:
        photo: the photo.
        faces: all faces in the photo by size, largest first; may be empty.
        face_index: index of the face that is used; None if the photo has no face with that index.
        blur: blur of that face (see `blur`); None without a face.
        likeness: mean cosine similarity of its embedding to the other photos' embeddings; None without other photos.
        findings: what the user should know about the photo, the most serious first; empty for a good photo.
    """

    photo: Photo
    faces: tuple[Face, ...]
    face_index: int | None
    blur: float | None
    likeness: float | None
    findings: tuple[Finding, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """The findings as sentences for the user."""
        return tuple([finding.sentence for finding in self.findings])

    @property
    def face_size(self) -> int | None:
        """The longer side in pixels of the face that is used; None without a face."""
        return None if self.face_index is None else round(longer_side(self.faces[self.face_index].box))

    def preview(self, side: int | None = 256) -> Image.Image:
        """Return the photo with all faces framed and numbered, at most `side` pixels wide and high."""
        return annotate_faces(self.photo, self.faces, self.face_index, side)


@dataclass(frozen=True, eq=False)
class ReferenceReport:
    """The result of checking all reference photos of a unit.

    Attributes:
        references: the results for each photo.
        cosines: [R, R] float32 cosine similarities of the embeddings; NaN in rows and columns of photos without a face.
        outlier: index of the photo that shows a different person; None if there is no such photo, or if it is
            uncertain.
        notes: sentences for the user that concern all photos.
    """

    references: tuple[Reference, ...]
    cosines: np.ndarray
    outlier: int | None
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the report as lines of plain text: each photo followed by its warnings, then the notes."""
        lines = []
        for reference in self.references:
            parts = [reference.photo.name]
            if reference.face_size is not None:
                parts.append(f"face size {reference.face_size} pixels")
            if reference.likeness is not None:
                parts.append(f"likeness to the others {reference.likeness:.2f}")
            lines.append(", ".join(parts))
            lines += [f"  {warning}" for warning in reference.warnings]
        return [*lines, *self.notes]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data, without images and embeddings. Boxes are in pixels; NaN becomes None."""
        rounded = [[None if np.isnan(value) else round(float(value), 4) for value in row] for row in self.cosines]
        return {
            "photos": [
                {
                    "photo": reference.photo.name,
                    "faces": [[round(float(edge), 1) for edge in face.box] for face in reference.faces],
                    "face_index": reference.face_index,
                    "blur": None if reference.blur is None else round(reference.blur, 2),
                    "likeness": None if reference.likeness is None else round(reference.likeness, 4),
                    "warnings": list(reference.warnings),
                }
                for reference in self.references
            ],
            "cosines": rounded,
            "outlier": self.outlier,
            "notes": list(self.notes),
        }


def examine(
    photos_with_faces: Sequence[tuple[Photo, Sequence[Face]]], face_index: int = 0, batch: bool = False
) -> ReferenceReport:
    """Check the reference photos of a unit.

    Args:
        photos_with_faces: each photo with all its faces by size, largest first (`faces.find_faces`); the faces may be
            empty.
        face_index: index of the face that is used from each photo.
        batch: one image is generated per photo, so the photos may show different people and are not compared.
    """
    selected = [faces[face_index] if face_index < len(faces) else None for _, faces in photos_with_faces]
    matrix = cosines([None if face is None or batch else face.embedding for face in selected])
    outlier = find_outlier(matrix)
    references = []
    for i, ((photo, faces), face) in enumerate(zip(photos_with_faces, selected)):
        others = np.delete(matrix[i], i)
        others = others[~np.isnan(others)]
        measured_blur = None if face is None else blur(face)
        references.append(
            Reference(
                photo,
                tuple(faces),
                face_index=None if face is None else face_index,
                blur=measured_blur,
                likeness=float(others.mean()) if len(others) else None,
                findings=(*_findings(photo, faces, face_index, measured_blur, is_outlier=i == outlier),),
            )
        )
    return ReferenceReport(tuple(references), matrix, outlier, (*_notes(matrix, outlier),))


def cosines(embeddings: Sequence[np.ndarray | None]) -> np.ndarray:
    """Return the cosine similarities of all pairs of embeddings.

    Args:
        embeddings: R embeddings [E] of any norm; None where a photo has no face.

    Returns:
        [R, R] float32; NaN where an embedding is None.
    """
    matrix = np.full((len(embeddings), len(embeddings)), np.nan, np.float32)
    directions = {i: vector / np.linalg.norm(vector) for i, vector in enumerate(embeddings) if vector is not None}
    if directions:
        stacked = np.stack(list(directions.values()))
        matrix[np.ix_(list(directions), list(directions))] = np.clip(stacked @ stacked.T, -1, 1)
    return matrix


def find_outlier(matrix: np.ndarray) -> int | None:
    """Return the index of the only photo that shows a different person.

    Its mean similarity to the others is below `DIFFERENT_PERSON`, while each of the others has a mean similarity of at
    least `SAME_PERSON` to the rest. At least three faces are needed; of two photos, either could be the wrong one.

    Args:
        matrix: [R, R] from `cosines`.
    """
    valid = _valid_rows(matrix)
    if len(valid) < 3:
        return None
    candidate = min(valid, key=lambda i: _mean_similarity(matrix, i, valid))
    rest = [i for i in valid if i != candidate]
    others_agree = all(_mean_similarity(matrix, i, rest) >= SAME_PERSON for i in rest)
    return candidate if others_agree and _mean_similarity(matrix, candidate, valid) < DIFFERENT_PERSON else None


def turn_note(face: Face) -> str | None:
    """Return the note for a face that lies on its side or upside down in the photo, or None."""
    if not face.turn:
        return None
    return f"{face.photo.name} is rotated by {face.turn}°; it was turned upright."


def photo_notes(face: Face) -> list[str]:
    """Return the notes on the detection of a face."""
    return [*([note] if (note := turn_note(face)) else []), *([padded_note(face)] if face.padded else [])]


def padded_note(face: Face) -> str:
    """Return the note for a face that was detected only with padding."""
    return f"The face in {face.photo.name} fills the photo; it was detected only after adding a border."


def stranger_note(references: Sequence[Face], saved: np.ndarray, name: str) -> str | None:
    """Return the note for a saved identity that hardly resembles the photos used together with it, or None.

    Args:
        saved: [R, E] embeddings of the saved identity.
    """
    photos, others = (
        np.mean([vector / np.linalg.norm(vector) for vector in embeddings], axis=0)
        for embeddings in ([face.embedding for face in references], saved)
    )
    similarity = float(photos @ others / np.linalg.norm(photos) / np.linalg.norm(others))
    if similarity >= DIFFERENT_PERSON:
        return None
    return (
        f"The saved person {name} hardly resembles the reference photos ({similarity:.2f}), and both are mixed into "
        "one face; clear the saved person or remove the photos unless this is intended."
    )


def _findings(
    photo: Photo, faces: Sequence[Face], face_index: int, measured_blur: float | None, is_outlier: bool
) -> list[Finding]:
    """The findings on one photo, in the order of `FINDINGS`."""
    if not faces:
        return [Finding("no_face", str(no_face_error(photo)))]
    try:
        face = select_face(faces, face_index)
    except FaceSnapError as error:
        return [Finding("no_such_face", str(error))]
    sentences = {}
    if is_outlier:
        sentences["stranger"] = (
            f"The face in {photo.name} does not resemble the others, which resemble each other: remove this photo if "
            "it shows a different person."
        )
    if (side := longer_side(face.box)) < ARCFACE_SIDE:
        sentences["small"] = (
            f"The face in {photo.name} is small ({round(side)} pixels; at least {ARCFACE_SIDE} are recommended): use a "
            "photo with a larger face for a better likeness."
        )
    elif measured_blur is not None and measured_blur > BLUR_THRESHOLD:  # enlarging always blurs small faces
        sentences["blurred"] = f"The face in {photo.name} is blurred: use a sharper photo for a better likeness."
    if len(faces) > 1:
        used = "the largest one is used" if face_index == 0 else f"face {face_index} is used (0 = largest)"
        sentences["several"] = f"{photo.name} shows {len(faces)} faces: {used}."
    if note := turn_note(face):
        sentences["turned"] = note
    if face.padded:
        sentences["close_up"] = padded_note(face)
    return [Finding(kind, sentence) for kind, sentence in sentences.items()]


def _notes(matrix: np.ndarray, outlier: int | None) -> list[str]:
    valid = _valid_rows(matrix)
    if len(valid) < 2 or outlier is not None:
        return []
    lowest = min(_mean_similarity(matrix, i, valid) for i in valid)
    if lowest >= DIFFERENT_PERSON:
        return []
    if len(valid) == 2:
        return [f"{NOTES[0]} ({lowest:.2f}): {NOTES[1]}"]
    return [NOTES[2]]


def _valid_rows(matrix: np.ndarray) -> list[int]:
    """Return the indices of the photos that have a face."""
    return [int(i) for i in np.flatnonzero(~np.isnan(np.diag(matrix)))]


def _mean_similarity(matrix: np.ndarray, i: int, others: Sequence[int]) -> float:
    """Return the mean cosine similarity of photo `i` to `others`, excluding itself."""
    return float(matrix[i, [j for j in others if j != i]].mean())
