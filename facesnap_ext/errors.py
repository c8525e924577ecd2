"""The one error that FaceSnap shows to people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

LONGEST = 1500  # characters of a message: what libraries say of a damaged file may quote all of it


class FaceSnapError(Exception):
    """What went wrong, with which file or photo, and what to do, in one sentence for the user and on one line."""

    def __init__(self, sentence: str):
        super().__init__(printable(shorten(sentence, LONGEST, placeholder=" … and so on.")))


def printable(text: str) -> str:
    """Text that any page and console can show: what a file's name has that is no UTF-8 is written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def reason_of(error: BaseException | str, longest: int | None = 300) -> str:
    """What a library says went wrong, on one line and cut off, for a sentence of ours."""
    return " ".join(str(error).split())[:longest]


@contextmanager
def error_prefix(person: str) -> Iterator[None]:
    """Put a person's title, such as "Person 2: ", before the errors inside the `with` block; it may be empty."""
    try:
        yield
    except FaceSnapError as error:
        if not person:
            raise
        raise FaceSnapError(f"{person}{error}") from error
