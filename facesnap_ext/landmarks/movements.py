"""The sliders that turn a head and move its face, and the named expressions made from them.

`Sliders` is the only list of them. `Unit`, its ranges, JSON Schema, infotext, the accordion, the axes of the X/Y/Z plot
and the page's rig are derived from its fields. A slider that moves the face is a sum of movements of the open face
model (`landmarks.open_face`), one for positive and one for negative amounts. `landmarks.rigs` turns them into
displacements.

The 72 points do not include the pupils, so no slider can move the gaze.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

Modes = Mapping[str, float]
"""Amounts of the open face model's movements, by the names in `open_face.Basis.names`. Their sides are the person's."""


@dataclass(frozen=True)
class Slider:
    """One slider.

    Attributes:
        label: for the page, with the meaning of the ends.
        range: lowest and highest value.
        step: of the page's slider.
        positive, negative: what an amount of 1 and of -1 does to the face. Both are empty for sliders that turn the
            head and for lids, whose displacements depend on the opening of the person's eyes.
    """

    label: str
    range: tuple[float, float]
    step: float = 0.05
    positive: Modes = field(default_factory=dict)
    negative: Modes = field(default_factory=dict)


def _slider(label: str, low: float, high: float, step: float = 0.05, positive: Any = (), negative: Any = ()) -> Any:
    slider = Slider(label, (low, high), step, dict(positive), dict(negative))
    return field(default=0.0, metadata={"slider": slider})


def _both(**modes: float) -> Modes:
    """The same amounts of a movement's left and right half."""
    return {f"{name}_{side}": amount for name, amount in modes.items() for side in "LR"}


@dataclass(frozen=True)
class Sliders:
    """The amounts of all sliders. Left and right are as seen in the image.

    Attributes:
        yaw: degrees; positive turns the nose to the right of the image.
        pitch: degrees; positive turns the nose down.
        roll: degrees; positive tilts the head to the right of the image.
        mouth: 0 closed to 1 open.
        lips: -1 pressed together to 1 drawn apart, with a closed jaw.
        smile_left, smile_right: 0 to 1, one corner of the mouth moves up and outwards.
        frown: 0 to 1, both corners of the mouth move down.
        pucker: 0 to 1, the lips are pushed forward and together.
        stretch: 0 to 1, both corners of the mouth move outwards.
        mouth_shift: -1 to the left to 1 to the right.
        sneer: 0 to 1, nostrils and upper lip rise.
        brow_inner: -1 lowered and drawn together to 1 raised, the inner ends of both brows.
        brow_outer_left, brow_outer_right: -1 lowered to 1 raised, the outer part of a brow.
        lid_left, lid_right: -1 closed to 1 wide open.
    """

    yaw: float = _slider("Yaw (degrees, positive = right)", -75, 75, 1)
    pitch: float = _slider("Pitch (degrees, positive = down)", -45, 45, 1)
    roll: float = _slider("Roll (degrees, positive = right)", -45, 45, 1)
    mouth: float = _slider("Mouth (0 = closed, 1 = open)", 0, 1, positive={"jawOpen": 1})
    lips: float = _slider(
        "Lips (-1 = pressed together, 1 = apart)",
        *(-1, 1),
        positive=_both(mouthUpperUp=1, mouthLowerDown=1.5),
        negative={**_both(mouthPress=1), "mouthRollLower": 0.4, "mouthRollUpper": 0.4},
    )
    smile_left: float = _slider("Smile, left", 0, 1, positive={"mouthSmile_R": 1.4, "eyeSquint_R": 0.5})
    smile_right: float = _slider("Smile, right", 0, 1, positive={"mouthSmile_L": 1.4, "eyeSquint_L": 0.5})
    frown: float = _slider("Frown", 0, 1, positive={**_both(mouthFrown=2.5), "mouthShrugLower": 0.5})
    pucker: float = _slider("Pucker", 0, 1, positive={"mouthPucker": 1.4, "mouthFunnel": 0.3})
    stretch: float = _slider("Stretch", 0, 1, positive=_both(mouthStretch=1.5))
    mouth_shift: float = _slider(
        "Mouth shift (-1 = left, 1 = right)",
        *(-1, 1),
        positive={"mouthLeft": 0.8, "jawLeft": 0.5},
        negative={"mouthRight": 0.8, "jawRight": 0.5},
    )
    sneer: float = _slider("Sneer", 0, 1, positive=_both(noseSneer=1.2, mouthUpperUp=0.4))
    brow_inner: float = _slider(
        "Inner brows (-1 = lowered, 1 = raised)",
        *(-1, 1),
        positive=_both(browInnerUp=1.8),
        negative=_both(browDown=1.5, browInnerUp=-1.2),
    )
    brow_outer_left: float = _slider(
        "Outer brow, left (-1 = lowered, 1 = raised)",
        -1,
        1,
        positive={"browOuterUp_R": 1},
        negative={"browOuterUp_R": -0.9},
    )
    brow_outer_right: float = _slider(
        "Outer brow, right (-1 = lowered, 1 = raised)",
        -1,
        1,
        positive={"browOuterUp_L": 1},
        negative={"browOuterUp_L": -0.9},
    )
    lid_left: float = _slider("Eyelids, left (-1 = closed, 1 = wide open)", -1, 1)
    lid_right: float = _slider("Eyelids, right (-1 = closed, 1 = wide open)", -1, 1)


TURNS = ("yaw", "pitch", "roll")
SLIDERS: dict[str, Slider] = {one.name: one.metadata["slider"] for one in fields(Sliders)}
MOVEMENTS: dict[str, Slider] = {name: slider for name, slider in SLIDERS.items() if name not in TURNS}
"""The sliders that move the face."""
LIDS = {"lid_left": "left_eye", "lid_right": "right_eye"}
"""The eye in `POLYLINES` that each slider of the lids opens and closes."""

EXPRESSIONS: dict[str, Mapping[str, float]] = {
    "neutral": {},
    "smile": {"smile_left": 0.65, "smile_right": 0.65, "lid_left": -0.15, "lid_right": -0.15},
    "laugh": {
        "smile_left": 0.85,
        "smile_right": 0.85,
        "mouth": 0.4,
        "lid_left": -0.55,
        "lid_right": -0.55,
        "brow_outer_left": 0.2,
        "brow_outer_right": 0.2,
    },
    "surprise": {
        "mouth": 0.5,
        "pucker": 0.25,
        "lid_left": 0.65,
        "lid_right": 0.65,
        "brow_inner": 0.5,
        "brow_outer_left": 0.65,
        "brow_outer_right": 0.65,
    },
    "sad": {
        "frown": 0.65,
        "brow_inner": 0.65,
        "brow_outer_left": -0.65,
        "brow_outer_right": -0.65,
        "lid_left": -0.35,
        "lid_right": -0.35,
    },
    "angry": {
        "brow_inner": -0.85,
        "brow_outer_left": 0.4,
        "brow_outer_right": 0.4,
        "lips": -0.7,
        "frown": 0.3,
        "lid_left": 0.25,
        "lid_right": 0.25,
    },
    "wink": {
        "lid_right": -1,
        "smile_right": 0.65,
        "smile_left": 0.2,
        "brow_outer_right": -0.4,
        "brow_outer_left": 0.4,
        "lid_left": 0.1,
    },
    "kiss": {"pucker": 0.65, "lid_left": -1, "lid_right": -1},
    "disgust": {
        "sneer": 0.65,
        "frown": 0.4,
        "brow_inner": -0.5,
        "brow_outer_left": -0.2,
        "brow_outer_right": -0.2,
        "lid_left": -0.5,
        "lid_right": -0.5,
    },
    "fear": {
        "stretch": 0.65,
        "mouth": 0.15,
        "lips": 0.5,
        "brow_inner": 0.65,
        "lid_left": 0.65,
        "lid_right": 0.65,
        "brow_outer_left": -0.3,
        "brow_outer_right": -0.3,
    },
}
"""Named expressions at strength 1, by the amounts of `Sliders` that are not 0."""


def clipped(movements: Mapping[str, float]) -> dict[str, float]:
    """Return the amounts of all movements, each limited to its slider's range; those not given are 0."""
    return {
        name: min(max(movements.get(name, 0.0), slider.range[0]), slider.range[1]) for name, slider in MOVEMENTS.items()
    }


def with_expression(sliders: Sliders, expression: str, strength: float) -> Sliders:
    """Return sliders with a named expression added to their movements.

    Args:
        expression: a name in `EXPRESSIONS`.
        strength: factor of its amounts.
    """
    added = EXPRESSIONS[expression]
    return replace(
        sliders, **clipped({name: getattr(sliders, name) + strength * added.get(name, 0.0) for name in MOVEMENTS})
    )


def without_movements(sliders: Sliders) -> Sliders:
    """Return sliders with a neutral face."""
    return replace(sliders, **dict.fromkeys(MOVEMENTS, 0.0))
