"""Render the second edition's people.

    python -m facesnap_lab.miniature.second.render people.png --split test

The sheet has one row per person and one column per look. With `--same-look`, everyone has the look of the first person.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from facesnap_ext.landmarks.flame import Flame
from facesnap_lab.miniature.head import MOUTH, stand_in_flame
from facesnap_lab.miniature.rasterise import between, step
from facesnap_lab.miniature.render import EYE, EYE_RADII, Rendering, posed, render_with
from facesnap_lab.miniature.second.world import NAMED_SHAPES, SHOTS_PER_LOOK, Subject, dress, look, person, scene
from facesnap_lab.miniature.world import EXPRESSION_CODES, SHAPE_CODES, SPLITS, Scene

SIDE = 128


@lru_cache(maxsize=1)
def head() -> Flame:
    """Return the second edition's morphable head in FLAME's layout."""
    return Flame(**stand_in_flame(shapes=SHAPE_CODES, expressions=EXPRESSION_CODES, named_shapes=NAMED_SHAPES))


def render(subjects: Sequence[Subject], scenes: Sequence[Scene], side: int = SIDE) -> list[Rendering]:
    """Render each subject in the scene at the same index."""
    return render_with(head(), albedo, subjects, scenes, side)


def landmarks(subjects: Sequence[Subject], scenes: Sequence[Scene], side: int = SIDE) -> np.ndarray:
    """Return the 72 points of the images that `render` draws, [N,72,2] float32 pixels, without drawing them."""
    return posed(head(), subjects, scenes, side)[1].astype(np.float32)


class Skin:
    """Points on the head at rest, whose colours are painted over one another."""

    def __init__(self, rest: np.ndarray, colour: np.ndarray) -> None:
        self.x, self.y, self.z = rest.T
        self.ax = np.abs(self.x)
        self.front = step(self.z, 0.0, 0.01)
        self.colour = np.broadcast_to(colour.astype(np.float32), rest.shape).copy()

    def paint(self, cover: np.ndarray, rgb: np.ndarray | tuple[float, float, float]) -> None:
        cover = np.clip(cover, 0, 1)[:, None]
        self.colour += cover * (np.asarray(rgb) - self.colour)

    def disc(self, cx: float, cy: float, rx: float, ry: float, soft: float = 0.12) -> np.ndarray:
        """Return the coverage of an ellipse on both sides of the face."""
        away = np.sqrt(((self.ax - cx) / rx) ** 2 + ((self.y - cy) / ry) ** 2)
        return self.front * step(1 - away, -soft, soft)


def albedo(rest: np.ndarray, hair: np.ndarray, who: Subject) -> np.ndarray:
    """Return the colours [P,3] of points [P,3] on the head at rest."""
    on = Skin(rest, who.skin)
    on.paint(0.25 * on.disc(0.042, -0.022, 0.020, 0.016, 0.6), 0.5 * who.skin + (0.35, 0.13, 0.13))  # cheeks
    on.paint(0.35 * on.disc(0, -0.0165, 0.0160, 0.0052, 0.5), 0.4 * who.skin)  # below the nose
    on.paint(0.7 * on.disc(0.0075, -0.0145, 0.0046, 0.0028, 0.3), 0.3 * who.skin)  # nostrils
    on.paint(0.22 * on.disc(0.0095, 0.004, 0.0045, 0.020, 0.5), 0.5 * who.skin)  # the bridge's flanks
    if who.beard:
        _paint_beard(on, who)
    for mx, my, radius in who.moles:
        away = radius - np.hypot(on.x - mx, on.y - my)
        if who.beard:
            on.paint(on.front * step(away, -0.0032, -0.0016), who.skin)  # no hair grows beside a mole
        on.paint(on.front * step(away, -0.0006, 0.0006), who.skin * (0.32, 0.22, 0.20))
    _paint_brows(on, who)
    _paint_eyes(on, who)
    on.paint(hair, who.hair_rgb)
    if who.glasses is not None:
        _paint_glasses(on, who.glasses, who.glasses_round)
    return on.colour


def _paint_beard(on: Skin, who: Subject) -> None:
    grown = on.front * step(who.beard_top - 0.35 * (0.05 - on.ax).clip(0) - on.y, -0.006, 0.006)
    if who.moustache:
        above = between(on.y, MOUTH + 0.004, -0.020, 0.002)
        grown = np.maximum(grown, on.front * step(0.027 - on.ax, -0.002, 0.002) * above)
    on.paint(who.beard * grown, 0.85 * who.hair_rgb)


def _paint_brows(on: Skin, who: Subject) -> None:
    along = np.clip((on.ax - 0.014) / 0.042, 0, 1)
    middle = 0.0445 + who.brow_height + who.brow_arch * along * (1 - along) - 0.002 * along
    thick = who.brow_thickness * (1.15 - 0.5 * along)
    brow = between(on.y, middle - thick, middle + thick, 0.0012) * between(on.ax, 0.013, 0.058, 0.002)
    on.paint(0.92 * on.front * brow, who.brow_rgb)


def _paint_eyes(on: Skin, who: Subject) -> None:
    (ex, ey), (rx, ry) = EYE, EYE_RADII
    if who.eye_shadow is not None:
        on.paint(0.6 * on.disc(ex, ey + 0.005, 1.35 * rx, 1.6 * ry, 0.25), who.eye_shadow)
    on.paint(on.disc(ex, ey, 1.14 * rx, 1.32 * ry, 0.08), 0.30 * who.skin)  # edges of the eyelids
    white = on.disc(ex, ey, rx, ry, 0.08)
    on.paint(white, (0.96, 0.96, 0.95))
    on.paint(white * on.disc(ex, ey + 0.0003, 0.0063, 0.0063), who.iris)
    on.paint(white * on.disc(ex, ey + 0.0003, 0.0025, 0.0025), (0.03, 0.03, 0.03))


def _paint_glasses(on: Skin, rgb: np.ndarray, half_height: float) -> None:
    ex, ey = EYE
    lens = np.sqrt(((on.ax - ex) / 0.0215) ** 2 + ((on.y - ey + 0.001) / half_height) ** 2)
    bar = between(on.y, ey - 0.0010, ey + 0.0034, 0.0008)
    frame = np.maximum(between(lens, 0.88, 1.16, 0.06), bar * ((on.ax < 0.0115) + (on.ax > 0.052) * (on.z > -0.03)))
    on.paint(frame * step(on.z, -0.035, -0.025), rgb)


def sheet(split: str, people: int, looks: int, same_look: bool = False, side: int = SIDE) -> np.ndarray:
    """Return a sheet [people·side,looks·side,3] of images."""
    rows = []
    for index in range(people):
        who = person(split, index)
        stylist = person(split, 0) if same_look else who
        subjects = [dress(who, look(stylist, number)) for number in range(looks)]
        scenes = [scene(stylist, number * SHOTS_PER_LOOK) for number in range(looks)]
        rows.append(np.concatenate([r.picture for r in render(subjects, scenes, side)], axis=1))
    return np.concatenate(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Render a sheet of people: one row per person, one column per look.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--looks", type=int, default=8)
    parser.add_argument("--same-look", action="store_true")
    options = parser.parse_args()
    Image.fromarray(sheet(options.split, options.people, options.looks, options.same_look)).save(options.out)
