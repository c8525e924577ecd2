"""The people and scenes of the miniature world: procedural, seeded and unlimited, without photographs.

A person is determined by split and index. The splits `train`, `judge` and `test` share no people: generators and
conditioning networks are trained on the first, judges on the second, and the third is used only for measuring.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from facesnap_lab.miniature.captions import COLOURS, EXPRESSIONS, HAIR, HAIR_COLOURS, LIGHTS

SPLITS = {"train": 1, "judge": 2, "test": 3}
SHAPE_CODES, EXPRESSION_CODES = 20, 8

# mean codes of each expression, in the order of `head.EXPRESSIONS`
_EXPRESSION_MEANS = {
    "neutral": (0, 0, 0, 0, 0, 0, 0, 0),
    "smiling": (0.5, 1.8, 0.2, 0, 0, -0.3, -0.5, 1.2),
    "surprised": (2.0, 0, 1.6, 0, -0.6, 0.3, 0, 0),
    "angry": (0, 0, -0.4, 1.8, 0.4, 0.4, 0.8, 0),
    "sad": (0, 0, 0.5, -0.6, 0.6, 0.3, 1.8, 0),
}
HAIR_RGB = {
    "black": (0.08, 0.07, 0.07),
    "brown": (0.33, 0.20, 0.11),
    "blonde": (0.85, 0.68, 0.36),
    "red": (0.62, 0.25, 0.10),
    "grey": (0.62, 0.62, 0.63),
}
_IRIS_RGB = ((0.16, 0.09, 0.05), (0.33, 0.20, 0.08), (0.22, 0.38, 0.62), (0.25, 0.42, 0.22), (0.40, 0.43, 0.46))


@dataclass(frozen=True, eq=False)
class Person:
    """The properties that all images of a person share. Positions are metres on the mean head at rest."""

    split: str
    index: int
    shape: np.ndarray  # [SHAPE_CODES] standard deviations
    skin: np.ndarray  # [3] RGB in 0…1
    lips: np.ndarray  # [3]
    iris: np.ndarray  # [3]
    hair: str
    hair_colour: str
    hair_rgb: np.ndarray  # [3]
    hairline: float  # height of the hairline
    hair_volume: float
    brow_thickness: float
    beard: float  # density, 0 (none) to 1
    beard_top: float  # height of its upper edge
    moustache: bool
    glasses: np.ndarray | None  # [3] RGB of the frame
    glasses_round: float  # half the height of a lens
    moles: np.ndarray  # [M,3] x, y, radius

    @property
    def name(self) -> str:
        return f"{self.split}-{self.index:05d}"


@dataclass(frozen=True, eq=False)
class Scene:
    """The properties that vary between images. The image's side is 2, with the origin at its centre."""

    expression: str
    codes: np.ndarray  # [EXPRESSION_CODES]
    pose: np.ndarray  # [6] radians: global and jaw rotation vectors
    cam: np.ndarray  # [3] scale and translation of the whole image, as in `deca.project`
    clothes: str
    background: str
    light: str
    light_direction: np.ndarray  # [3] towards the light
    ambient: float


def person(split: str, index: int) -> Person:
    """Create a person; the same index creates the same person on every machine."""
    random = np.random.default_rng([SPLITS[split], index])
    tone = random.beta(1.2, 1.4)
    skin = np.array([0.96, 0.80, 0.69]) * (1 - tone) + np.array([0.36, 0.22, 0.15]) * tone
    skin = skin * random.uniform(0.94, 1.06, 3)
    hair = str(random.choice(HAIR, p=(0.14, 0.46, 0.40)))
    hair_colour = str(random.choice(HAIR_COLOURS, p=(0.30, 0.28, 0.20, 0.10, 0.12)))
    hair_rgb = np.array(HAIR_RGB[hair_colour]) * random.uniform(0.8, 1.2)
    beard = random.uniform(0.5, 0.95) if random.random() < 0.28 else 0.0
    lips = skin * 0.55 + np.array([0.75, 0.28, 0.28]) * random.uniform(0.25, 0.55)
    glasses = None
    if random.random() < 0.25:
        glasses = np.array([(0.07, 0.07, 0.08), (0.55, 0.12, 0.10), (0.75, 0.60, 0.25)][random.integers(3)])
    moles = [
        (
            random.choice([-1, 1]) * random.uniform(0.018, 0.052),
            random.uniform(-0.060, 0.004),
            random.uniform(0.003, 0.0045),
        )
        for _ in range(random.choice([0, 1, 2], p=(0.45, 0.35, 0.2)))
    ]
    return Person(
        split=split,
        index=index,
        shape=np.clip(random.normal(0, 1, SHAPE_CODES), -2.2, 2.2),
        skin=np.clip(skin, 0, 1),
        lips=np.clip(lips, 0, 1),
        iris=np.array(_IRIS_RGB[random.integers(len(_IRIS_RGB))]),
        hair=hair,
        hair_colour=hair_colour,
        hair_rgb=np.clip(hair_rgb, 0, 1),
        hairline=random.uniform(0.066, 0.100),
        hair_volume=random.uniform(0.002, 0.018),
        brow_thickness=random.uniform(0.0022, 0.0052),
        beard=beard,
        beard_top=random.uniform(-0.050, -0.020),
        moustache=bool(random.random() < 0.7),
        glasses=glasses,
        glasses_round=random.uniform(0.0125, 0.0185),
        moles=np.array(moles).reshape(-1, 3),
    )


def scene(who: Person, shot: int) -> Scene:
    """Create one of a person's unlimited scenes."""
    random = np.random.default_rng([SPLITS[who.split], who.index, shot, 7])
    expression = str(random.choice(EXPRESSIONS, p=(0.32, 0.26, 0.16, 0.13, 0.13)))
    codes = np.array(_EXPRESSION_MEANS[expression]) * random.uniform(0.7, 1.15) + random.normal(
        0, 0.22, EXPRESSION_CODES
    )
    yaw, pitch, roll = np.radians(np.clip(random.normal(0, (13, 6, 4)), (-26, -12, -9), (26, 12, 9)))
    jaw = max(0.0, 0.02 + 0.05 * codes[0] + random.normal(0, 0.01))
    light = str(random.choice(LIGHTS))
    direction = {"left": (-0.9, 0.25, 0.6), "right": (0.9, 0.25, 0.6), "above": (0, 0.95, 0.5), "front": (0, 0.1, 1)}[
        light
    ]
    direction = np.array(direction) + random.normal(0, 0.08, 3)
    return Scene(
        expression=expression,
        codes=codes,
        pose=np.array([pitch, yaw, roll, jaw, 0, 0]),
        cam=np.array([random.uniform(8.0, 9.1), random.uniform(-0.006, 0.006), random.uniform(0.006, 0.018)]),
        clothes=str(random.choice(list(COLOURS))),
        background=str(random.choice(list(COLOURS))),
        light=light,
        light_direction=direction / np.linalg.norm(direction),
        ambient=random.uniform(0.50, 0.62),
    )
