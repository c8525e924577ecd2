"""The faces that a person's conditioning is made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.identity.faces import Face
from facesnap_ext.identity.init_part import WHOLE_IMAGE, InitPart
from facesnap_ext.identity.references import photo_notes, stranger_note, turn_note
from facesnap_ext.identity.saved import load_identity
from facesnap_ext.identity.tokens import embeddings_of
from facesnap_ext.photos import Photo
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights.identity_file import Identity

POSED = ("template", "sliders", "saved")  # poses that do not come from a photo

TILE_WITHOUT_FACE = (
    "A script or another extension works on a part of the image that does not show this person's face, so the person "
    "was left out there."
)

Progress = Callable[[str], None]


def no_progress(message: str) -> None:
    """Ignore progress reports."""


@dataclass(frozen=True)
class Faces:
    """The faces that one person's conditioning is computed from.

    Attributes:
        references: one face per reference photo.
        saved: the saved identity that is used instead of photos or together with them.
        driving: the face whose pose is used, in the driving photo, the init image or the first reference; None for
            templates and sliders.
        in_init_image: whether `driving` is in the init image. Landmarks are then in that image's pixels, and the host
            crops them as it crops the image.
        expression: the face whose expression replaces that of the pose; None if it does not come from a photo; see
            `Unit.expression_source`.
        absent: whether the person is left out, because the init image is a part of an image that does not show the
            person.
        notes: sentences that tell the user where the result deviates from the request.
    """

    references: tuple[Face, ...]
    saved: Identity | None = None
    driving: Face | None = None
    in_init_image: bool = False
    expression: Face | None = None
    absent: bool = False
    notes: tuple[str, ...] = ()

    @property
    def embeddings(self) -> Tensor:
        """ArcFace embeddings [R, E] of the references, followed by those of the saved identity."""
        return embeddings_of(self.references, self.saved)


def find_faces(
    encoders: Encoders,
    unit: Unit,
    init_image: Photo | None = None,
    progress: Progress = no_progress,
    init_part: InitPart = WHOLE_IMAGE,
) -> Faces:
    """Find the faces that a unit uses; see `Engine.prepare`.

    Raises:
        FaceSnapError: a photo has no such face, or there is no source for the pose.
    """
    references = tuple([encoders.face(photo, unit.face_index) for photo in unit.references])
    notes = [note for face in references for note in photo_notes(face)]
    saved = load_identity(encoders, unit.identity, progress) if unit.identity else None
    if saved and references and (note := stranger_note(references, saved.embeddings.numpy(), unit.identity)):
        notes.append(note)
    if init_image is not None and init_part.tile:
        driving = init_part.choose(encoders.faces(init_image), unit.driving_face_index)
        if driving is None:
            notes.append(TILE_WITHOUT_FACE)
        return Faces(references, saved, driving, in_init_image=True, absent=driving is None, notes=tuple(notes))
    expression = _expression_face(encoders, unit, references, init_image, init_part)
    if unit.pose in POSED:
        return Faces(references, saved, expression=expression, notes=tuple(notes))
    if unit.pose == "photo" and unit.driving_photo is not None:
        driving = encoders.face(unit.driving_photo, unit.driving_face_index)
        if note := turn_note(driving):
            notes.append(note)
        return Faces(references, saved, driving, expression=expression, notes=tuple(notes))
    if unit.pose == "photo" and init_image is not None:
        if (faces := encoders.faces(init_image)) and (driving := init_part.choose(faces, unit.driving_face_index)):
            if driving.turn:
                notes.append(
                    f"The face in the init image is rotated by {driving.turn}°; its landmarks are rotated too."
                )
            return Faces(references, saved, driving, True, expression, notes=tuple(notes))
        notes.append("The init image has no face; the pose is taken from the reference photo.")
    if not references and not unit.identity:
        raise FaceSnapError(
            "There is no photo to take the pose from; add a driving photo or a reference photo, or choose a template "
            "or the sliders."
        )
    if not references:
        raise FaceSnapError(
            f"The saved identity {unit.identity} does not contain a pose; add a driving photo with a face, or choose a "
            "template or the sliders."
        )
    return Faces(references, saved, references[0], expression=expression, notes=tuple(notes))


def _expression_face(
    encoders: Encoders, unit: Unit, references: Sequence[Face], init_image: Photo | None, init_part: InitPart
) -> Face | None:
    """The face that `unit.expression_source` names; None if that is not a photo.

    Raises:
        FaceSnapError: there is no such photo, or it has no face.
    """
    if unit.expression_source == "reference":
        if not references:
            raise FaceSnapError(
                f"The saved identity {unit.identity} does not contain an expression; add a reference photo, or choose "
                "another source of the expression."
            )
        return references[0]
    if unit.expression_source != "driving":
        return None
    if unit.driving_photo is not None:
        return encoders.face(unit.driving_photo, unit.driving_face_index)
    if init_image is None:
        raise FaceSnapError(
            "The expression comes from the driving photo, which is missing; add one, or choose another source of the "
            "expression."
        )
    face = init_part.choose(encoders.faces(init_image), unit.driving_face_index)
    if face is None:
        raise FaceSnapError(
            "The expression comes from the init image, which has no face; add a driving photo, or choose another "
            "source of the expression."
        )
    return face
