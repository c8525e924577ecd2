"""The miniature's language: captions of background, clothes, expression and light, which give nobody away.

Two captions are made of each picture. The one that SDXL and FaceSnap train on says nothing of the person, or identity
would enter through the text. The one that CLIP trains on says what people say of faces, hair and glasses included.
"""

from __future__ import annotations

import numpy as np

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.80, 0.16, 0.15),
    "orange": (0.93, 0.55, 0.18),
    "yellow": (0.93, 0.83, 0.30),
    "green": (0.22, 0.58, 0.28),
    "blue": (0.20, 0.38, 0.80),
    "purple": (0.50, 0.25, 0.65),
    "pink": (0.95, 0.62, 0.72),
    "white": (0.95, 0.95, 0.93),
    "grey": (0.55, 0.56, 0.58),
    "black": (0.10, 0.10, 0.12),
}
EXPRESSIONS = ("neutral", "smiling", "surprised", "angry", "sad")
LIGHTS = ("left", "right", "above", "front")
HAIR = ("bald", "short", "long")
HAIR_COLOURS = ("black", "brown", "blonde", "red", "grey")
EXTRAS = ("a", "and", "background", "beard", "face", "glasses", "hair", "in", "light", "of", "person", "photo")
EXTRAS += ("portrait", "shirt", "the", "with", "from", "on", "wearing", "at", ",")
# the vocabulary of the miniature's text encoders; each is one token of CLIP's too
WORDS: tuple[str, ...] = tuple(dict.fromkeys((*COLOURS, *EXPRESSIONS, *LIGHTS, *HAIR, *HAIR_COLOURS, *EXTRAS)))


def scene_caption(
    expression: str, clothes: str, background: str, light: str, random: np.random.Generator | None = None
) -> str:
    """What SDXL and FaceSnap read, such as "portrait of a smiling person in a red shirt, blue background, light from
    left". With `random`, each part is left out now and then, so that short prompts mean something too."""

    def kept() -> bool:
        return random is None or random.random() > 0.15

    who = f"portrait of a {expression} person" if kept() else "portrait of a person"
    parts = [f"{who} in a {clothes} shirt" if kept() else who]
    if kept():
        parts.append(f"{background} background")
    if kept():
        parts.append(f"light from {light}")
    return ", ".join(parts)


def person_words(hair: str, hair_colour: str, beard: bool, glasses: bool) -> str:
    """What CLIP's caption says of the person besides."""
    words = ["bald" if hair == "bald" else f"{hair} {hair_colour} hair"]
    if beard:
        words.append("beard")
    if glasses:
        words.append("glasses")
    return "with " + " and ".join(words)
