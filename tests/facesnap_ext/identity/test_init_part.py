"""Choosing which face in an init image a job changes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from facesnap_ext.identity.init_part import InitPart
from facesnap_ext.photos import Photo

PHOTO = Photo(np.zeros((200, 400, 3), np.uint8), "init")
BOXES = {"large": (20, 20, 140, 180), "middle": (180, 40, 240, 120), "small": (320, 100, 350, 140)}
FACES = [SimpleNamespace(photo=PHOTO, box=np.array(box, np.float32), name=name) for name, box in BOXES.items()]


def mask(left, top, right, bottom, scale=1.0):
    painted = np.zeros((int(200 * scale), int(400 * scale)), np.uint8)
    left, top, right, bottom = (int(scale * edge) for edge in (left, top, right, bottom))
    painted[top:bottom, left:right] = 1
    return painted


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(
    ("painted", "expected", "in_tile"),
    [
        ((0, 0, 400, 200), "large", "large"),
        ((170, 30, 250, 130), "middle", "middle"),
        ((120, 30, 250, 130), "middle", "middle"),  # also covers the edge of the large face
        ((310, 90, 360, 150), "small", "small"),
        ((170, 30, 360, 150), "middle", "middle"),  # covers both, and the larger one is chosen
        ((320, 100, 350, 110), "small", "small"),  # covers only the forehead
        ((360, 150, 390, 190), "small", None),  # covers no face
        ((0, 0, 0, 0), "large", None),
    ],
)
def test_the_face_under_the_mask_is_chosen(painted, expected, in_tile, scale):
    painted = mask(*painted, scale)
    assert InitPart(painted).choose(FACES).name == expected
    face = InitPart(painted, tile=True).choose(FACES)
    assert (face and face.name) == in_tile
    assert InitPart(painted).choose(FACES, 2).name == "small"  # chosen by the user


def test_without_a_mask_the_index_counts_and_a_tile_may_have_no_face():
    assert InitPart().choose(FACES).name == "large"
    assert InitPart().choose(FACES, 1).name == "middle"
    assert InitPart(tile=True).choose(FACES).name == "large"
    for part in (InitPart(), InitPart(tile=True), InitPart(mask(0, 0, 9, 9))):
        assert part.choose([]) is None
    assert InitPart(tile=True).choose(FACES, 7) is None
