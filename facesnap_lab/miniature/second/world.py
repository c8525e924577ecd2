"""The people, looks and scenes of the second edition: procedural, seeded and unlimited.

A *person* is what the images of one individual share: face shape, skin, iris, brows and moles. A *look* is hair,
glasses, beard and make-up. A new one is drawn every few shots, from the same distributions for everyone, so that it
does not reveal the person. The splits are the same as in the first edition.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from facesnap_lab.miniature.captions import HAIR, HAIR_COLOURS
from facesnap_lab.miniature.head import MOUTH, SHAPES, Bump
from facesnap_lab.miniature.world import HAIR_RGB, SHAPE_CODES, SPLITS, Scene
from facesnap_lab.miniature.world import scene as first_scene

EDITION = 2  # part of every seed
SHOTS_PER_LOOK = 3
PERSON_TRAITS = ("shape", "skin", "iris", "brows", "moles")
LOOK_TRAITS = ("hair", "glasses", "beard", "make-up")

# Two of the first edition's directions cannot be seen from the front, because they act along the view.
NAMED_SHAPES: dict[str, list[Bump]] = {
    name: bumps for name, bumps in SHAPES.items() if name not in ("deep chin", "long skull")
} | {
    "narrow chin": [("stretch", (0, -0.088, 0.05), (0.060, 0.018, 0.06), (-0.24, 0, 0))],
    "hooded eyes": [("push", (0.032, 0.0300, 0.05), (0.011, 0.0036, 0.05), (0, -0.0014, 0))],
}

# brown, hazel, green, blue and grey; an iris lies anywhere between two neighbours
IRIS_RGB = np.array(
    [(0.16, 0.08, 0.04), (0.42, 0.26, 0.08), (0.24, 0.44, 0.20), (0.18, 0.40, 0.72), (0.48, 0.54, 0.60)]
)
FRAME_RGB = np.array(
    [
        (0.05, 0.05, 0.06),
        (0.95, 0.95, 0.93),
        (0.60, 0.08, 0.10),
        (0.90, 0.72, 0.25),
        (0.10, 0.25, 0.65),
        (0.05, 0.50, 0.45),
    ]
)
LIPSTICK_RGB = ((0.75, 0.06, 0.12), (0.45, 0.05, 0.22), (0.92, 0.38, 0.30), (0.30, 0.10, 0.10))
EYE_SHADOW_RGB = ((0.20, 0.25, 0.55), (0.12, 0.10, 0.12), (0.15, 0.45, 0.35), (0.60, 0.25, 0.55))
HIDDEN_SHAPES = ("longer face", "wider face")  # aligning the eyes and mouth removes most of them
FRAME_CONTRAST = 0.45  # minimum distance in RGB between a frame and the skin
MOLE_GAP = 0.014


@dataclass(frozen=True, eq=False)
class Person:
    """What all images of a person share. Positions are in metres on the mean head at rest."""

    split: str
    index: int
    shape: np.ndarray  # [SHAPE_CODES] standard deviations
    skin: np.ndarray  # [3] RGB in 0…1
    lips: np.ndarray  # [3]
    iris: np.ndarray  # [3]
    brow_rgb: np.ndarray  # [3]
    brow_thickness: float
    brow_height: float  # added to the mean height
    brow_arch: float  # 0 (straight) and more
    moles: np.ndarray  # [M,3] x, y, radius; M is 1…4


@dataclass(frozen=True, eq=False)
class Look:
    """What a person can change."""

    hair: str
    hair_colour: str
    hair_rgb: np.ndarray  # [3]
    hairline: float  # height of the hairline
    hair_volume: float
    beard: float  # density, 0 (none) to 1
    beard_top: float  # height of its upper edge
    moustache: bool
    glasses: np.ndarray | None  # [3] RGB of the frame
    glasses_round: float  # half the height of a lens
    lipstick: np.ndarray | None  # [3]
    eye_shadow: np.ndarray | None  # [3]


@dataclass(frozen=True, eq=False)
class Subject(Person, Look):
    """A person with a look, as the renderer paints them."""


def person(split: str, index: int) -> Person:
    """Create a person; the same index creates the same person on every machine."""
    random = np.random.default_rng([EDITION, SPLITS[split], index])
    tone = random.beta(1.2, 1.4)
    skin = np.array([0.96, 0.80, 0.69]) * (1 - tone) + np.array([0.36, 0.22, 0.15]) * tone
    skin = np.clip(skin * random.uniform(0.94, 1.06, 3), 0, 1)
    lips = skin * 0.55 + np.array([0.75, 0.28, 0.28]) * random.uniform(0.25, 0.55)
    hue = random.uniform(0, len(IRIS_RGB) - 1)
    iris = [np.interp(hue, np.arange(len(IRIS_RGB)), channel) for channel in IRIS_RGB.T]
    return Person(
        split=split,
        index=index,
        shape=np.clip(random.normal(0, 1, SHAPE_CODES), -2.2, 2.2),
        skin=skin,
        lips=np.clip(lips, 0, 1),
        iris=np.clip(np.array(iris) * random.uniform(0.75, 1.25), 0, 1),
        brow_rgb=skin * random.uniform(0.12, 0.62) * random.uniform(0.9, 1.1, 3),
        brow_thickness=random.uniform(0.0022, 0.0052),
        brow_height=random.uniform(-0.0035, 0.0050),
        brow_arch=random.uniform(0.0, 0.045),
        moles=_moles(random),
    )


def _moles(random: np.random.Generator) -> np.ndarray:
    """Draw moles [M,3] on cheeks and chin, apart from each other, and away from mouth, nose and eyes."""
    moles: list[tuple[float, float, float]] = []
    count = random.choice([1, 2, 3, 4], p=(0.3, 0.3, 0.25, 0.15))
    while len(moles) < count:
        x, y = random.choice([-1, 1]) * random.uniform(0.012, 0.054), random.uniform(-0.075, 0.002)
        on_nose = abs(x) < 0.022 and y > -0.020
        on_mouth = abs(x) < 0.042 and abs(y - MOUTH) < 0.022
        on_edge = abs(x) > 0.054 - 0.45 * max(0, -0.030 - y)  # the jaw narrows towards the chin
        close = any(np.hypot(x - other[0], y - other[1]) < MOLE_GAP for other in moles)
        if not (on_nose or on_mouth or on_edge or close):
            moles.append((x, y, random.uniform(0.0035, 0.006)))
    return np.array(moles)


def look(who: Person, number: int) -> Look:
    """Create one of a person's unlimited looks."""
    random = np.random.default_rng([EDITION, SPLITS[who.split], who.index, number, 9])
    hair = str(random.choice(HAIR, p=(0.14, 0.46, 0.40)))
    hair_colour = str(random.choice(HAIR_COLOURS, p=(0.30, 0.28, 0.20, 0.10, 0.12)))
    hair_rgb = np.clip(np.array(HAIR_RGB[hair_colour]) * random.uniform(0.8, 1.2), 0, 1)
    glasses = lipstick = eye_shadow = None
    if random.random() < 0.35:
        visible = FRAME_RGB[np.linalg.norm(FRAME_RGB - who.skin, axis=1) >= FRAME_CONTRAST]
        glasses = visible[random.integers(len(visible))]
    if random.random() < 0.30:
        lipstick = np.array(LIPSTICK_RGB[random.integers(len(LIPSTICK_RGB))])
    if random.random() < 0.30:
        eye_shadow = np.array(EYE_SHADOW_RGB[random.integers(len(EYE_SHADOW_RGB))])
    return Look(
        hair=hair,
        hair_colour=hair_colour,
        hair_rgb=hair_rgb,
        hairline=random.uniform(0.066, 0.100),
        hair_volume=random.uniform(0.002, 0.018),
        beard=random.uniform(0.5, 0.95) if random.random() < 0.28 else 0.0,
        beard_top=random.uniform(-0.050, -0.020),
        moustache=bool(random.random() < 0.7),
        glasses=glasses,
        glasses_round=random.uniform(0.0125, 0.0185),
        lipstick=lipstick,
        eye_shadow=eye_shadow,
    )


def dress(who: Person, style: Look) -> Subject:
    """Combine a person with a look."""
    subject = Subject(**vars(who), **vars(style))
    if style.lipstick is None:
        return subject
    return dataclasses.replace(subject, lips=who.lips + 0.8 * (style.lipstick - who.lips))


def subject(split: str, index: int, shot: int) -> Subject:
    """Return a person with the look of a shot."""
    who = person(split, index)
    return dress(who, look(who, shot // SHOTS_PER_LOOK))


def scene(who: Person, shot: int) -> Scene:
    """Create one of a person's unlimited scenes. Consecutive shots share a look, but not a scene."""
    return first_scene(cast(Any, who), shot)  # only the split and the index are used


_FIELDS = {
    "shape": ("shape",),
    "skin": ("skin", "lips"),
    "iris": ("iris",),
    "brows": ("brow_rgb", "brow_thickness", "brow_height", "brow_arch"),
    "moles": ("moles",),
    "hair": ("hair", "hair_colour", "hair_rgb", "hairline", "hair_volume"),
    "glasses": ("glasses", "glasses_round"),
    "beard": ("beard", "beard_top", "moustache"),
    "make-up": ("lips", "lipstick", "eye_shadow"),
}


def exchange(subject: Subject, other: Subject, trait: str) -> Subject:
    """Return the subject with one trait of the other one."""
    return dataclasses.replace(subject, **{name: getattr(other, name) for name in _FIELDS[trait]})


def exchange_visibly(subject: Subject, other: Person, trait: str) -> Subject:
    """Return the subject with one trait of a person, in the first of that person's looks in which it differs."""
    dressed = (dress(other, look(other, number)) for number in range(100))
    return exchange(subject, next(one for one in dressed if differs(subject, one, trait)), trait)


def differs(subject: Subject, other: Subject, trait: str) -> bool:
    """Return whether exchanging the trait should be visible.

    This excludes, for example, two subjects without glasses, or with the same hair.
    """
    present = {
        "glasses": lambda s: s.glasses is not None,
        "beard": lambda s: s.beard > 0,
        "make-up": lambda s: s.lipstick is not None,
        "hair": lambda s: (s.hair, s.hair_colour),
    }
    return trait not in present or present[trait](subject) != present[trait](other)
