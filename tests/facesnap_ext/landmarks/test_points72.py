from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from facesnap_ext.landmarks import points72
from facesnap_ext.landmarks.points72 import COLOURS, POLYLINES, Landmarks, crop_and_resize, draw, line_width, points_on
from facesnap_lab.miniature.head import face_layout


def face(size: int = 512, seed: int | None = None) -> Landmarks:
    points = face_layout() * [1, -1]
    if seed is not None:
        points = points + np.random.default_rng(seed).normal(0, 0.002, points.shape)
    return Landmarks(((points / 0.2 + [0.5, 0.42]) * size).astype(np.float32), size, size)


def halved(image: np.ndarray) -> np.ndarray:
    height, width, _ = image.shape
    return image.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))


def test_embedding_states_source_and_licence() -> None:
    content = json.loads(Path(points72.__file__).with_name("landmarks72.json").read_text())
    assert "Face2FaceRHO" in content["source"]
    assert "BSD-3-Clause" in content["license"]
    assert any("NetEase Games AI Lab" in line for line in content["notice"])
    assert any("AS IS" in line for line in content["notice"])


def test_parts_contain_each_point_once() -> None:
    counts = {
        "face_contour": 17,
        "left_eyebrow": 5,
        "right_eyebrow": 5,
        "nose": 9,
        "left_eye": 8,
        "right_eye": 8,
        "mouth": 20,
    }
    parts = {part: {i for line in lines for i in line} for part, lines in POLYLINES.items()}
    assert {part: len(points) for part, points in parts.items()} == counts
    assert sorted(i for points in parts.values() for i in points) == list(range(72))
    assert POLYLINES.keys() == COLOURS.keys()


def test_points_are_barycentric_combinations_of_triangle_corners() -> None:
    random = np.random.default_rng(0)
    vertices, faces = random.normal(size=(2, 100, 3)), random.integers(0, 100, (9976, 3))
    points = points_on(torch.from_numpy(vertices), torch.from_numpy(faces))
    content = json.loads(Path(points72.__file__).with_name("landmarks72.json").read_text())
    for n in range(2):
        for point, (face_index, weights) in enumerate(zip(content["faces"], content["barycentric"])):
            expected = sum(w * vertices[n, v] for w, v in zip(weights, faces[face_index]))
            np.testing.assert_allclose(points[n, point], expected, atol=1e-6)


def test_each_part_has_a_unique_colour() -> None:
    assert len(set(COLOURS.values())) == len(COLOURS)
    image = draw(face(1024), 1024, 1024)
    drawn = {tuple(int(v) for v in colour) for colour in np.unique(image.reshape(-1, 3), axis=0)}
    assert set(COLOURS.values()) <= drawn


def test_each_part_is_drawn_through_its_points_in_its_colour() -> None:
    landmarks = face(1024)
    image = draw(landmarks, 1024, 1024)
    for part, colour in COLOURS.items():
        for x, y in landmarks.points[[i for line in POLYLINES[part] for i in line]]:
            np.testing.assert_array_equal(image[int(y), int(x)], colour, err_msg=part)


@settings(max_examples=20, deadline=None)
@given(st.floats(20, 80), st.sampled_from([100, 256, 640]))
def test_lines_have_subpixel_positions(y: float, size: int) -> None:
    points = np.full((72, 2), -1e4, np.float32)
    contour = POLYLINES["face_contour"][0]
    points[contour] = np.column_stack([np.linspace(-50, 150, len(contour)), np.full(len(contour), y)])
    column = draw(Landmarks(points, 100, 100), size, size)[:, size // 2, 0].astype(float) / COLOURS["face_contour"][0]
    rows = np.arange(size) + 0.5
    assert column.sum() == pytest.approx(line_width(size, size), abs=0.03)
    assert (column * rows).sum() / column.sum() == pytest.approx(y * size / 100, abs=0.06)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(256, 256), (320, 448), (512, 384)]))
def test_downscaled_double_size_image_matches(seed: int, size: tuple[int, int]) -> None:
    landmarks = face(300, seed)
    small, large = draw(landmarks, *size), draw(landmarks, 2 * size[0], 2 * size[1])
    assert small.shape == (size[1], size[0], 3)
    difference = np.abs(halved(large) - small)
    inked = difference[small.any(2) | halved(large).any(2)].max(1)
    assert inked.mean() < 12
    assert np.quantile(inked, 0.99) < 64, "of 255; larger differences only where lines cross or nearly touch"


def test_lines_are_crisp_at_all_sizes() -> None:
    assert [line_width(n, n) for n in (64, 256, 512, 1024, 2048)] == [1, 1, 2, 4, 8]
    assert line_width(832, 1216) == pytest.approx(4, abs=0.1)
    for size in (512, 1024, 2048):
        inked = draw(face(), size, size).any(2)
        fully_covered = np.isin(draw(face(), size, size).max(2), [125, 255])
        assert fully_covered.sum() > (1 - 2.2 / line_width(size, size)) * inked.sum(), (
            "anti-aliased edges are one pixel wide"
        )


@settings(max_examples=30, deadline=None)
@given(arrays(np.float32, (72, 2), elements=st.floats(-1e6, 1e6, width=32)), st.integers(1, 40), st.integers(1, 40))
def test_points_outside_the_image_are_allowed(points: np.ndarray, width: int, height: int) -> None:
    image = draw(Landmarks(points, 32, 32), width, height)
    assert image.shape == (height, width, 3)
    if (points < -1000).all():
        assert not image.any()


def test_cropping_does_not_change_the_visible_part() -> None:
    whole = draw(face(400), 400, 400)
    cropped = Landmarks(face(400).points - [150, 90], 400, 400)
    np.testing.assert_array_equal(draw(cropped, 400, 400)[:300, :250], whole[90:390, 150:])


def test_invalid_points_are_rejected() -> None:
    with pytest.raises(ValueError, match="72"):
        Landmarks(np.zeros((68, 2), np.float32), 10, 10)
    with pytest.raises(ValueError, match="finite"):
        Landmarks(np.full((72, 2), np.nan, np.float32), 10, 10)


def test_scaling_applies_to_each_axis() -> None:
    landmarks = face(100)
    scaled = landmarks.scaled(250, 50)
    np.testing.assert_allclose(scaled.points, landmarks.points * [2.5, 0.5], rtol=1e-6)
    assert (scaled.width, scaled.height) == (250, 50)
    np.testing.assert_allclose(scaled.box, landmarks.box * [2.5, 0.5, 2.5, 0.5], rtol=1e-6)


sizes = st.integers(64, 1500)


@settings(max_examples=50, deadline=None)
@given(sizes, sizes, sizes, sizes, st.floats(0, 1), st.floats(0, 1), st.floats(0.02, 0.9))
def test_face_stays_inside_after_crop_and_resize(
    width: int, height: int, new_width: int, new_height: int, x: float, y: float, fraction: float
) -> None:
    side = fraction * min(width, height)
    corner = np.array([x * (width - side), y * (height - side)])
    landmarks = Landmarks(
        (face(1).points - face(1).box[:2]) / np.ptp(face(1).points, axis=0) * side + corner, width, height
    )
    resized = crop_and_resize(landmarks, new_width, new_height)
    assert (resized.width, resized.height) == (new_width, new_height)

    scale = max(new_width / width, new_height / height)
    spans = np.ptp(resized.points, axis=0)
    np.testing.assert_allclose(spans, side * scale, rtol=1e-3)
    shift = resized.points[0] - landmarks.points[0] * scale  # position of the photo's corner in the new image
    slack = 1e-3 * max(new_width, new_height)
    assert (shift <= slack).all()
    assert (shift + scale * np.array([width, height]) >= np.array([new_width, new_height]) - slack).all()
    for axis, room in enumerate((new_width, new_height)):
        if spans[axis] <= room:
            assert resized.points[:, axis].min() >= -slack
            assert resized.points[:, axis].max() <= room + slack


def test_window_moves_only_as_far_as_necessary() -> None:
    centred = Landmarks(face(200).points - [-100, 0], 400, 200)  # the face in the middle of a wide photo
    np.testing.assert_allclose(crop_and_resize(centred, 200, 200).points, centred.points - [100, 0], atol=1e-3)
    left = Landmarks(face(200).points - [20, 0], 400, 200)
    assert crop_and_resize(left, 200, 200).points[:, 0].min() == pytest.approx(0, abs=1e-3)
    wider = crop_and_resize(left, 200, 200, face_box=np.array([left.box[0] - 5, 0, left.box[2] + 5, 200]))
    assert wider.points[:, 0].min() == pytest.approx(5, abs=1e-3)
    np.testing.assert_allclose(crop_and_resize(left, 800, 400).points, left.points * 2, atol=1e-3)


def test_window_stays_inside_the_photo_even_if_the_face_does_not() -> None:
    beyond = Landmarks(face(200).points - [150, 0], 400, 200)
    np.testing.assert_allclose(crop_and_resize(beyond, 200, 200).points, beyond.points, atol=1e-3)
    huge = Landmarks(face(600).points - [500, 200], 400, 200)
    np.testing.assert_allclose(crop_and_resize(huge, 200, 200).points, huge.points, atol=1e-3)


def test_72_points_match_the_68_except_on_the_lids():
    """Compare the polylines of both schemes: each part connects the same points in the same order."""
    t = np.linspace(0, 1, 68)
    points68 = np.stack([np.cos(40 * t), np.sin(31 * t)], 1).astype(np.float32)
    result = points72.from_68(points68)
    parts = {  # iBUG's order: jaw, brows and nose from the image's left, lips all around from the left corner
        "face_contour": [range(17)],
        "left_eyebrow": [range(17, 22)],
        "right_eyebrow": [range(22, 27)],
        "nose": [range(27, 31), range(31, 36)],
    }
    for part, lines in parts.items():
        drawn = {frozenset(map(tuple, result[list(pair)])) for pair in edges(points72.POLYLINES[part])}
        for line in lines:
            for a, b in itertools.pairwise(line):
                assert frozenset((tuple(points68[a]), tuple(points68[b]))) in drawn, part
    lips = {frozenset(map(tuple, result[list(pair)])) for pair in edges(points72.POLYLINES["mouth"])}
    for ring in ([*range(48, 60), 48], [*range(60, 68), 60]):
        for a, b in itertools.pairwise(ring):
            assert frozenset((tuple(points68[a]), tuple(points68[b]))) in lips
    assert {tuple(points68[i]) for i in (36, 39, 42, 45)} == {tuple(result[i]) for i in (36, 40, 44, 48)}


def edges(lines):
    return [pair for line in lines for pair in itertools.pairwise(line)]


def test_lids_are_interpolated_by_cubics():
    """A cubic lid is reproduced exactly, and each point lies between its neighbours."""
    points68 = np.zeros((68, 2), np.float32)

    def lid(t, height, shift):
        return np.stack([t + shift, height * t * (1 - t) * (1 + 0.3 * t)], -1)

    for first, shift in ((36, 0.0), (42, 3.0)):
        thirds = np.arange(4) / 3
        upper, lower = lid(thirds, 1.2, shift), lid(thirds, -0.8, shift)
        points68[first : first + 4] = upper
        points68[[first + 5, first + 4]] = lower[1:3]
    result = points72.from_68(points68)
    quarters = np.array([1, 2, 3]) / 4
    for upper, lower, shift in (((37, 38, 39), (43, 42, 41), 0.0), ((45, 46, 47), (51, 50, 49), 3.0)):
        np.testing.assert_allclose(result[list(upper)], lid(quarters, 1.2, shift), atol=1e-5)
        np.testing.assert_allclose(result[list(lower)], lid(quarters, -0.8, shift), atol=1e-5)
    for part in ("left_eye", "right_eye"):
        for a, b in edges(points72.POLYLINES[part]):
            assert np.linalg.norm(result[a] - result[b]) < 0.6, (part, a, b)
