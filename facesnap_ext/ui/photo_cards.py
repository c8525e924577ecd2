"""HTML of photos on the page: a card for each reference photo, and buttons for choosing a face.

javascript/facesnap_photos.js acts on the buttons. Each button that changes the photos names the photos that remain, in
their new order. Images are data URLs, because gradio's components would leave files in its temporary folder.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from facesnap_ext.identity.faces import Face
from facesnap_ext.identity.framing import annotate_faces, face_thumbnail
from facesnap_ext.identity.references import NOTES, UNUSABLE, Reference
from facesnap_ext.photos import Photo
from facesnap_ext.ui.markup import data, english, mixed, wording

FACE_SIDE = 96  # pixels
CARD_SIDE = 256

# severity, badge, and a short line of text for each kind of finding
BADGES = {
    "good": ("good", "good", "Face size in pixels:"),
    "unchecked": ("warning", "not checked", ""),
    "unreadable": ("error", "unreadable", ""),
    "no_face": ("error", "no face", "Use a photo with a larger, well-lit face, seen from the front"),
    "no_such_face": ("error", "no such face", "Choose a different face (applies to all photos):"),
    "stranger": ("error", "someone else", "Does not resemble the others; likeness:"),
    "small": ("warning", "small", "Use a photo with a larger face. Face size in pixels:"),
    "blurred": ("warning", "blurred", "Use a sharper photo"),
    "several": ("warning", "several faces", "Choose the face to use (applies to all photos):"),
    "turned": ("good", "turned", "Rotated upright by"),
    "close_up": ("good", "close-up", "The face was found only after a border was added"),
}


@dataclass(frozen=True)
class Card:
    """One reference photo on the page.

    Attributes:
        name: the photo's name in messages.
        photo: None if the photo cannot be read.
        reference: the result of the check; None if the photo has not been checked.
        error: the reason why the photo cannot be read.
    """

    name: str
    photo: Photo | None = None
    reference: Reference | None = None
    error: str = ""

    @property
    def kinds(self) -> list[str]:
        """What the badges say, the most serious first: keys of `BADGES`."""
        if self.photo is None:
            return ["unreadable"]
        if self.reference is None:
            return ["unchecked"]
        return [finding.kind for finding in self.reference.findings] or ["good"]

    @property
    def usable(self) -> bool:
        """Whether a job can use the photo, as far as it is known."""
        return self.kinds[0] not in (*UNUSABLE, "unreadable")


def cards_html(cards: Sequence[Card], notes: Sequence[str] = ()) -> str:
    """HTML of the reference photos, of a button that leaves out the unusable ones, and of a button for adding photos.

    Args:
        notes: sentences that concern all photos.
    """
    items = "".join(_card(cards, i) for i in range(len(cards)))
    parts = [f"<div class='facesnap-cards' role='list' aria-label='Reference photos'>{items}</div>"]
    parts += [f"<div class='facesnap-problem'>{_note(note)}</div>" for note in notes]
    usable = [i for i, card in enumerate(cards) if card.usable]
    leave_out = ""
    if 0 < len(usable) < len(cards):
        title = f"{wording('Remove unusable photos')} {data(f'({len(cards) - len(usable)})')}"
        leave_out = _button("leave_out", title, usable)
    parts.append(
        "<div class='facesnap-buttons'>"
        f"<button type='button' class='facesnap-button' data-facesnap-do='add'>Add photos</button>{leave_out}</div>"
    )
    return "".join(parts)


def face_buttons(control: str, faces: Sequence[Face], chosen: int | None) -> str:
    """HTML of a photo's faces as buttons that set a control to the face's index; empty if there is no choice.

    Args:
        control: name of the control that the buttons set.
        chosen: index of the face that is used; None or a higher index if the photo has no such face.
    """
    if not faces or (len(faces) == 1 and chosen == 0):
        return ""
    buttons = []
    for i, face in enumerate(faces):
        url = data_url(face_thumbnail(face, FACE_SIDE))
        pressed = str(i == chosen).lower()
        buttons.append(
            f"<button type='button' class='facesnap-face' data-facesnap-of='{control}' data-facesnap-face='{i}' "
            f"aria-pressed='{pressed}'><img src='{url}' alt=''> <span class='facesnap-read'>Face</span> "
            f"{data(str(i))}</button>"
        )
    return f"<div class='facesnap-faces' role='group' aria-label='Choose the face to use:'>{''.join(buttons)}</div>"


def data_url(image: Image.Image) -> str:
    """An image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _card(cards: Sequence[Card], i: int) -> str:
    card = cards[i]
    name = escape(card.name, quote=True)
    badges = "".join(
        f"<span class='facesnap-badge facesnap-{severity}'>{badge}</span>"
        for severity, badge, _ in (BADGES[kind] for kind in card.kinds)
    )
    faces = ""
    if card.reference is not None:
        faces = face_buttons("face_index", card.reference.faces, card.reference.face_index)
    return (
        f"<div class='facesnap-card' role='listitem'>{_picture(card)}{_remove(cards, i)}"
        f"<div class='facesnap-name' translate='no' title='{name}'>{name}</div><div>{badges}</div>"
        f"<div class='facesnap-line'>{_line(card)}</div>{faces}{_moves(cards, i)}</div>"
    )


def _picture(card: Card) -> str:
    if card.photo is None:
        return "<div class='facesnap-no-picture' aria-hidden='true'>?</div>"
    image = card.reference.preview(CARD_SIDE) if card.reference else annotate_faces(card.photo, (), None, CARD_SIDE)
    return f"<img class='facesnap-picture' src='{data_url(image)}' alt='{escape(card.name, quote=True)}'>"


def _line(card: Card) -> str:
    """The most serious finding, or the size of the face, in a few words. The words are separate from the number, so
    that the hosts can translate them."""
    kind, reference = card.kinds[0], card.reference
    text, detail = BADGES[kind][2], ""
    if kind == "unreadable":
        return english(card.error)
    if reference is not None and reference.face_index is not None:
        if kind in ("good", "small"):
            detail = str(reference.face_size)
        elif kind == "stranger" and reference.likeness is not None:
            detail = f"{reference.likeness:.2f}"
        elif kind == "turned":
            detail = f"{reference.faces[reference.face_index].turn}°"
    return f"{wording(text)} {data(detail)}" if detail else wording(text)


def _note(note: str) -> str:
    fixed = any(phrase in note for phrase in NOTES)
    return mixed(note, NOTES) if fixed else english(note)


def _remove(cards: Sequence[Card], i: int) -> str:
    keep = [j for j in range(len(cards)) if j != i]
    then = min(i, len(cards) - 2)
    return _button("remove", _symbol("×", "Remove", cards[i].name), keep, then, "facesnap-remove", "Remove")


def _moves(cards: Sequence[Card], i: int) -> str:
    if len(cards) < 2:
        return ""
    buttons = []
    for do, arrow, other in (("left", "←", i - 1), ("right", "→", i + 1)):
        keep = list(range(len(cards)))
        if possible := 0 <= other < len(cards):
            keep[i], keep[other] = other, i
        title = f"Move {do}"
        text = _symbol(arrow, title, cards[i].name)
        buttons.append(_button(do, text, keep if possible else [], other, title=title))
    return f"<div class='facesnap-moves'>{''.join(buttons)}</div>"


def _symbol(symbol: str, title: str, name: str) -> str:
    """HTML of a symbol with its meaning for screen readers."""
    return f"<span aria-hidden='true'>{symbol}</span><span class='facesnap-read'>{wording(title)} {data(name)}</span>"


def _button(do: str, text: str, keep: Sequence[int] = (), then: int = 0, style: str = "", title: str = "") -> str:
    """HTML of a button that changes the photos.

    Args:
        text: the button's text, as HTML.
        keep: indices of the photos that remain, in their new order. Without any, "remove" removes the only photo, and
            the other buttons are disabled.
        then: index of the card that has the focus afterwards.
        title: for the mouse.
    """
    named = f" title='{title}'" if title else ""
    disabled = "" if keep or do == "remove" else " disabled"
    return (
        f"<button type='button' class='{style or 'facesnap-button'}' data-facesnap-do='{do}' "
        f"data-facesnap-keep='{','.join(map(str, keep))}' data-facesnap-then='{then}'{named}{disabled}>{text}</button>"
    )
