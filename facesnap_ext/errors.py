"""`FaceSnapError`, the one exception whose message is shown to users."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

MAX_LENGTH = 1500  # maximum length of a message, because a library's error may quote an entire damaged file


class FaceSnapError(Exception):
    """An error message for the user: one sentence on one line.

    It says what went wrong, with which file or photo, and what to do about it.
    """

    def __init__(self, sentence: str):
        super().__init__(printable(shorten(sentence, MAX_LENGTH, placeholder=" … (shortened).")))


def printable(text: str) -> str:
    """Return text that any page and console can show; bytes of a file name that are not UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def one_line(text: str) -> str:
    """Return text on one line, NFC-normalised, without control, invisible and text direction characters."""
    visible = (letter for letter in " ".join(text.split()) if not unicodedata.category(letter).startswith("C"))
    return unicodedata.normalize("NFC", " ".join("".join(visible).split()))


def reason_of(error: BaseException | str, max_length: int | None = 300) -> str:
    """Return a library's error message on one line, truncated, for quoting in one of our messages."""
    return " ".join(str(error).split())[:max_length]


@contextmanager
def error_prefix(person: str) -> Iterator[None]:
    """Prefix errors raised inside the `with` block with a person's title, such as "Person 2: " (may be empty)."""
    try:
        yield
    except FaceSnapError as error:
        if not person:
            raise
        raise FaceSnapError(f"{person}{error}") from error
