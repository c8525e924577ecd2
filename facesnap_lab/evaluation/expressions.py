"""A sheet of all named expressions on ten faces, to judge whether the drawing alone shows which one it is.

    python -m facesnap_lab.evaluation.expressions expressions.png

Each row is one face: shapes drawn from the open face model's prior, and one of the miniature's heads by FLAME's rig.
With `--blind`, the expressions of each row are shuffled and numbered, and the solution is printed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from facesnap_ext.identity.framing import label_font
from facesnap_ext.landmarks.movements import EXPRESSIONS, with_expression
from facesnap_ext.landmarks.open_face import OpenShape, load_basis
from facesnap_ext.landmarks.points72 import draw
from facesnap_ext.landmarks.poses import Pose, Rig, pose_landmarks
from facesnap_ext.landmarks.rigs import flame_rig, open_face_rig
from facesnap_lab.miniature.render import head

FACES = 10
SIDE, GAP, TITLE = 180, 6, 26
TURNS = (0.0, 0.0, 0.0, 18.0, -18.0, 30.0, -30.0, 0.0, 12.0, 0.0)  # yaw of each face in degrees


def faces(count: int = FACES) -> list[Rig]:
    """Return different people's rigs; the last one is a head of the miniature."""
    random = np.random.default_rng(22)
    basis = load_basis()
    modes = random.normal(size=(count - 1, basis.shape.shape[2]))
    modes[0] = 0  # the mean face
    people = [open_face_rig(basis, OpenShape(one, np.zeros((72, 3)))) for one in modes]
    return [*people, flame_rig(head(), torch.linspace(-1, 1, 8))]


def sheet(strength: float = 1.0, blind: bool = False) -> tuple[Image.Image, list[list[str]]]:
    """Return the sheet and the names of the expressions in each row."""
    random = np.random.default_rng(1)
    names = list(EXPRESSIONS)
    step = SIDE + GAP
    picture = Image.new("RGB", (len(names) * step + GAP, FACES * step + GAP + TITLE), (40, 42, 48))
    pen = ImageDraw.Draw(picture)
    rows = []
    for row, (rig, yaw) in enumerate(zip(faces(), TURNS)):
        order = random.permutation(names).tolist() if blind else names
        rows.append(order)
        for column, name in enumerate(order):
            pose = Pose(yaw=yaw, x=0.5, y=0.5, size=0.8)
            pose = replace(pose, **vars(with_expression(pose, name, strength)))
            drawn = draw(pose_landmarks(rig, pose, 1024, 1024), 4 * SIDE, 4 * SIDE)
            at = (GAP + column * step, TITLE + GAP + row * step)
            picture.paste(Image.fromarray(drawn).resize((SIDE, SIDE), Image.Resampling.BOX), at)
            if row == 0 and not blind:
                pen.text((at[0], 6), name, (236, 238, 242), label_font(15))
    return picture, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the PNG file to write")
    parser.add_argument("--strength", type=float, default=1.0, help="expression_strength")
    parser.add_argument("--blind", action="store_true", help="shuffle the expressions of each face")
    arguments = parser.parse_args()
    picture, rows = sheet(arguments.strength, arguments.blind)
    picture.save(arguments.output)
    if arguments.blind:
        print("\n".join(", ".join(row) for row in rows))


if __name__ == "__main__":
    main()
