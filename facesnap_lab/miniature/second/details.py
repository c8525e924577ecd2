"""The words for everything that can be seen in an image of the second edition: what CLIP's captions are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from facesnap_lab.miniature.captions import COLOURS, EXPRESSIONS, HAIR, HAIR_COLOURS, LIGHTS
from facesnap_lab.miniature.second.world import EYE_SHADOW_RGB, FRAME_RGB, IRIS_RGB, LIPSTICK_RGB, Subject
from facesnap_lab.miniature.words import BEGIN, END, UNKNOWN
from facesnap_lab.miniature.world import Scene

_COUNTS = ("no", "one", "several")
# part: the noun after the word, and the words
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "expression": ("person", EXPRESSIONS),
    "clothes": ("shirt", tuple(COLOURS)),
    "background": ("background", tuple(COLOURS)),
    "light": ("light", LIGHTS),
    "skin": ("skin", ("fair", "tan", "brown", "dark")),
    "iris": ("iris", ("brown", "hazel", "green", "blue", "grey")),
    "brow tone": ("brows", ("light", "medium", "dark")),
    "brow thickness": ("brows", ("thin", "medium", "thick")),
    "brow height": ("brows", ("low", "middle", "high")),
    "brow arch": ("brows", ("straight", "curved", "arched")),
    "left moles": ("moles on left", _COUNTS),
    "right moles": ("moles on right", _COUNTS),
    "hair": ("hair", HAIR),
    "hair colour": ("hair", HAIR_COLOURS),
    "beard": ("beard", ("no", "chin", "full")),
    "frames": ("glasses", ("no", "black", "white", "red", "gold", "blue", "teal")),
    "lipstick": ("lipstick", ("no", "red", "plum", "coral", "black")),
    "eye shadow": ("shadow", ("no", "blue", "black", "green", "purple")),
}
PHRASES = tuple(f"{word} {noun}" for noun, words in PARTS.values() for word in words)
WORDS = tuple(dict.fromkeys(word for phrase in PHRASES for word in phrase.split()))
IDS = {word: i for i, word in enumerate((UNKNOWN, END, BEGIN, *WORDS))}
TEXT_LENGTH = 26  # tokens; longer captions are truncated


def describe(who: Subject, what: Scene) -> list[int]:
    """Return the index of the word of each part, in the order of `PARTS`. The hair of bald people is called black."""
    left, right = (min(2, int((side * who.moles[:, 0] > 0).sum())) for side in (-1, 1))
    beard = 0 if not who.beard else 2 if who.moustache else 1
    answers = {
        "expression": EXPRESSIONS.index(what.expression),
        "clothes": list(COLOURS).index(what.clothes),
        "background": list(COLOURS).index(what.background),
        "light": LIGHTS.index(what.light),
        "skin": _bin(-who.skin.mean(), (-0.69, -0.53, -0.38)),
        "iris": _nearest(who.iris, IRIS_RGB),
        "brow tone": _bin(-who.brow_rgb.mean() / who.skin.mean(), (-0.45, -0.29)),
        "brow thickness": _bin(who.brow_thickness, (0.0032, 0.0042)),
        "brow height": _bin(who.brow_height, (-0.0007, 0.0022)),
        "brow arch": _bin(who.brow_arch, (0.015, 0.030)),
        "left moles": left,
        "right moles": right,
        "hair": HAIR.index(who.hair),
        "hair colour": 0 if who.hair == "bald" else HAIR_COLOURS.index(who.hair_colour),
        "beard": beard,
        "frames": _worn(who.glasses, FRAME_RGB),
        "lipstick": _worn(who.lipstick, LIPSTICK_RGB),
        "eye shadow": _worn(who.eye_shadow, EYE_SHADOW_RGB),
    }
    return [answers[part] for part in PARTS]


def _bin(value: float, edges: Sequence[float]) -> int:
    return int(np.searchsorted(edges, value))


def _nearest(rgb: np.ndarray, palette: np.ndarray | Sequence[tuple[float, float, float]]) -> int:
    return int(np.linalg.norm(np.asarray(palette) - rgb, axis=1).argmin())


def _worn(rgb: np.ndarray | None, palette: np.ndarray | Sequence[tuple[float, float, float]]) -> int:
    return 0 if rgb is None else 1 + _nearest(rgb, palette)


def caption(answers: Sequence[int], parts: Sequence[int]) -> str:
    """Return a caption that mentions some parts, by their index in `PARTS`, in this order."""
    phrases = []
    for index in parts:
        noun, words = list(PARTS.values())[index]
        phrases.append(f"{words[answers[index]]} {noun}")
    return " ".join(phrases)


def token_ids(texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts: begin, words, end, then end again as padding up to the length of the longest one."""
    rows = [[IDS[BEGIN], *(IDS.get(word, 0) for word in text.split())][: TEXT_LENGTH - 1] for text in texts]
    longest = max(map(len, rows)) + 1
    return [row + [IDS[END]] * (longest - len(row)) for row in rows]
