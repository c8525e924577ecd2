"""The miniature's captions of background, clothes, expression and light.

Each image has two captions. The one for SDXL and FaceSnap does not describe the person, since identity would otherwise
enter through the text. The one for CLIP also mentions hair, beard and glasses.
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
OTHER_WORDS = ("a", "and", "background", "beard", "face", "glasses", "hair", "in", "light", "of", "person", "photo")
OTHER_WORDS += ("portrait", "shirt", "the", "with", "from", "on", "wearing", "at", ",")
# the vocabulary of the miniature's text encoders; each word is also a single token in CLIP
WORDS: tuple[str, ...] = tuple(dict.fromkeys((*COLOURS, *EXPRESSIONS, *LIGHTS, *HAIR, *HAIR_COLOURS, *OTHER_WORDS)))


def scene_caption(
    expression: str, clothes: str, background: str, light: str, random: np.random.Generator | None = None
) -> str:
    """Return the caption for SDXL and FaceSnap.

    An example is "portrait of a smiling person in a red shirt, blue background, light from left". With `random`, each
    part is sometimes omitted, so that short prompts are trained too.
    """

    def included() -> bool:
        return random is None or random.random() > 0.15

    who = f"portrait of a {expression} person" if included() else "portrait of a person"
    parts = [f"{who} in a {clothes} shirt" if included() else who]
    if included():
        parts.append(f"{background} background")
    if included():
        parts.append(f"light from {light}")
    return ", ".join(parts)


def person_words(hair: str, hair_colour: str, beard: bool, glasses: bool) -> str:
    """Return the description of the person that CLIP's caption appends."""
    words = ["bald" if hair == "bald" else f"{hair} {hair_colour} hair"]
    if beard:
        words.append("beard")
    if glasses:
        words.append("glasses")
    return "with " + " and ".join(words)
