"""InstantID's control image, compared with a closed form: which pixels lie inside which ellipse or disc."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from facesnap_ext.landmarks.hints import POINTS5
from facesnap_ext.landmarks.movements import EXPRESSIONS, MOVEMENTS, Sliders, with_expression
from facesnap_ext.landmarks.open_face import load_basis
from facesnap_ext.landmarks.points5 import draw_five
from facesnap_ext.landmarks.points72 import Landmarks, five_points
from facesnap_ext.landmarks.poses import displacement
from facesnap_ext.landmarks.rigs import open_face_rig
from facesnap_ext.residuals import landmark_image
from tests.support import tiny

RED, GREEN, BLUE, YELLOW, PURPLE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)
FACE = np.float32([[120.6, 100.2], [200.9, 110.5], [163.3, 150.7], [130.1, 190.8], [195.5, 198.4]])


def closed_form(points, width, height, slack):
    """Return the image with all shapes enlarged by `slack` pixels.

    OpenCV approximates ellipses by polygons with integer corners, and fills all pixels that an edge touches. Edges may
    thus differ by one pixel.
    """
    y, x = np.mgrid[:height, :width].astype(float)
    image = np.zeros((height, width, 3), int)
    truncated = np.trunc(points)
    for end, colour in zip((0, 1, 3, 4), (RED, GREEN, YELLOW, PURPLE)):
        (ax, ay), (bx, by) = points[end].astype(float), points[2].astype(float)
        cx, cy = int((ax + bx) / 2), int((ay + by) / 2)
        angle = np.radians(int(np.degrees(np.arctan2(ay - by, ax - bx))))
        along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        across = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        half = int(np.hypot(ax - bx, ay - by) / 2)
        inside = (along / (half + slack)) ** 2 + (across / (4 + slack)) ** 2 <= 1
        image[inside] = np.array(colour) * 6 // 10
    for (px, py), colour in zip(truncated, (RED, GREEN, BLUE, YELLOW, PURPLE)):
        image[(x - px) ** 2 + (y - py) ** 2 <= (10 + slack) ** 2] = colour
    return image


def test_matches_the_published_formula():
    drawn = draw_five(Landmarks(FACE, 320, 256), 320, 256).astype(int)
    small, large = closed_form(FACE, 320, 256, -1.0), closed_form(FACE, 320, 256, 1.0)
    certain = (small == large).all(axis=2)  # pixels away from all edges
    assert certain.mean() > 0.95
    assert (drawn[certain] == small[certain]).all()
    for colour in (RED, GREEN, BLUE, YELLOW, PURPLE):  # the area of a disc of radius 10, up to OpenCV's rounding
        assert abs((drawn == colour).all(axis=2).sum() - np.pi * 10**2) < 20
    colours = {tuple(pixel) for pixel in drawn.reshape(-1, 3)}
    sticks = {tuple(part * 6 // 10 for part in colour) for colour in (RED, GREEN, YELLOW, PURPLE)}
    assert colours == {(0, 0, 0), RED, GREEN, BLUE, YELLOW, PURPLE} | sticks


def test_points_are_truncated_to_whole_pixels():
    drawn = draw_five(Landmarks(FACE, 320, 256), 320, 256)
    for (x, y), colour in zip(FACE, (RED, GREEN, BLUE, YELLOW, PURPLE)):
        rows, columns = np.nonzero((drawn == colour).all(axis=2))
        assert (columns.min(), columns.max()) == (int(x) - 10, int(x) + 10)
        assert (rows.min(), rows.max()) == (int(y) - 10, int(y) + 10)


def test_five_of_72_points_are_drawn_at_the_requested_size():
    landmarks = tiny.landmarks(3)
    five = Landmarks(five_points(landmarks.points), landmarks.width, landmarks.height)
    np.testing.assert_array_equal(draw_five(landmarks, 256, 192), draw_five(five, 256, 192))
    resized = five.scaled(256, 192)
    np.testing.assert_array_equal(draw_five(five, 256, 192), draw_five(resized, 256, 192))
    image = landmark_image(landmarks, 256, 192, POINTS5)
    assert image.shape == (1, 3, 192, 256)
    assert torch.equal(image[0].permute(1, 2, 0) * 255, torch.from_numpy(draw_five(landmarks, 256, 192)).float())


@pytest.mark.parametrize("points", [np.full((5, 2), 50.5), FACE + 5000, FACE - (400, 90), FACE * (1, 0)])
def test_degenerate_points_are_drawn_where_visible(points):
    drawn = draw_five(Landmarks(points.astype(np.float32), 320, 256), 320, 256)
    visible = ((points > -10) & (points < (330, 266))).all(axis=1)
    assert drawn.any() == visible.any()


def test_box_of_five_points_covers_the_whole_face():
    box = Landmarks(FACE, 320, 256).box
    low, high = FACE.min(axis=0), FACE.max(axis=0)
    np.testing.assert_allclose(box, [*(low - (high - low) / 2), *(high + (high - low) / 2)], rtol=1e-6)


def largest_move(sliders: Sliders) -> float:
    """How far sliders move one of the five points of the mean face seen from the front, in % of the face's height."""
    moved = five_points(displacement(open_face_rig(load_basis()), sliders))[:, :2]
    return 100 * float(np.linalg.norm(moved, axis=1).max())


def test_the_documentation_lists_how_far_each_slider_moves_the_five_points():
    text = Path(__file__).parents[3].joinpath("docs", "poses.md").read_text("utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([\d.]+) \| ([\d.]*) ?\|$", text, re.M)
    listed = {name: (high, low) for names, high, low in rows for name in re.findall(r"\w+", names)}
    expected = {}
    for name, slider in MOVEMENTS.items():
        low, high = (f"{largest_move(Sliders(**{name: end})):.1f}" if end else "" for end in slider.range)
        expected[name] = (high, low)
    assert listed == expected


def test_the_documentation_lists_how_far_named_expressions_move_the_five_points():
    moves = {name: largest_move(with_expression(Sliders(), name, 1.0)) for name in EXPRESSIONS}
    clear = {name for name, move in moves.items() if 3.9 < move < 9}
    assert clear == {"smile", "laugh", "surprise", "sad", "wink", "kiss", "fear"}
    assert all(1.6 < moves[name] < 2.4 for name in ("angry", "disgust"))
