"""Regions at every size, and how several people share an image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.photos import Photo
from facesnap_ext.regions import FADE, PaintedRegion, RoundedBox, around, blend_weights, painted, region_of
from facesnap_ext.settings.unit import Unit
from tests.support import tiny

BOX = RoundedBox(0.5, 0.4, 0.2, 0.3)


def random_region(seed=0, size=(24, 32)):
    return PaintedRegion(np.random.default_rng(seed).uniform(0, 1, size).astype(np.float32))


def pooled(mask, by):
    height, width = mask.shape
    return mask.reshape(height // by, by, width // by, by).mean((1, 3))


def test_a_rounded_box_is_1_inside_and_0_outside_with_a_smooth_edge():
    size = 400
    mask = BOX.sample(size, size)
    column, row = mask[:, size // 2], mask[size * 4 // 10]
    for line, centre, half in ((row, 0.5, 0.2), (column, 0.4, 0.3)):
        distance = np.abs((np.arange(size) + 0.5) / size - centre) / half
        assert (line[distance < 0.99] == 1).all()
        assert (line[distance > 1.01 + FADE] == 0).all()
        assert line[np.abs(distance - 1 - FADE / 2).argmin()] == pytest.approx(0.5, abs=0.05)
        order = np.argsort(distance)
        assert (np.diff(line[order]) <= 1e-6).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), width=st.integers(64, 1024), height=st.integers(64, 1024), scale=st.floats(1.2, 4))
def test_a_face_lies_completely_inside_its_region(seed, width, height, scale):
    """The brows reach into the upper corners of the points' box; the region must not cut them off."""
    landmarks = tiny.landmarks(seed, width, height)
    mask = around(landmarks, scale).sample(256, 256)
    cells = (landmarks.scaled(256, 256).points).astype(int)
    assert (mask[cells[:, 1], cells[:, 0]] > 0.95).all()


def test_the_box_is_scaled_about_its_own_centre():
    points = np.full((72, 2), 50.0, np.float32)
    points[0], points[1] = (40, 20), (80, 60)
    region = around(Landmarks(points, 200, 100), 1.5)
    assert (region.x, region.y) == pytest.approx((60 / 200, 40 / 100))
    assert (region.half_width, region.half_height) == pytest.approx((1.5 * 20 / 200, 1.5 * 20 / 100))


@pytest.mark.parametrize(("region", "tolerance"), [(BOX, 0.03), (random_region(), 1e-6)], ids=["box", "painted"])
def test_a_region_is_the_same_at_every_size(region, tolerance):
    large = region.sample(128, 64)
    for by in (2, 4, 8, 16):
        np.testing.assert_allclose(region.sample(128 // by, 64 // by), pooled(large, by), atol=tolerance)


@pytest.mark.parametrize("region", [BOX, random_region()], ids=["box", "painted"])
def test_a_crop_contains_what_is_in_its_window(region):
    whole = region.sample(64, 32)
    window = (16 / 64, 4 / 32, 32 / 64, 16 / 32)
    np.testing.assert_allclose(region.crop(window).sample(32, 16), whole[4:20, 16:48], atol=1e-5)
    again = region.crop(window).crop((0.5, 0.25, 0.5, 0.5))
    np.testing.assert_allclose(again.sample(16, 8), whole[8:16, 32:48], atol=1e-5)
    # a crop that extends beyond the image, cropped back to the whole image
    there = region.crop((-0.5, -1, 2, 4)).crop((0.25, 0.25, 0.5, 0.25))
    np.testing.assert_allclose(there.sample(64, 32), whole, atol=1e-5)


@pytest.mark.parametrize(("width", "height"), [(32, 24), (16, 12), (7, 5), (11, 24), (64, 60)])
def test_a_cell_is_the_mean_of_the_mask_in_it(width, height):
    region = random_region()
    rows, columns = region.mask.shape
    fine = region.mask.repeat(height, axis=0).repeat(width, axis=1)  # chosen so that each cell consists of whole pixels
    expected = fine.reshape(height, rows, width, columns).mean((1, 3))
    np.testing.assert_allclose(region.sample(width, height), expected, atol=1e-5)


def test_beyond_the_image_its_edge_is_repeated():
    region = random_region()
    seen = region.crop((-0.25, -0.5, 1.5, 2)).sample(48, 48)
    np.testing.assert_allclose(seen, np.pad(region.mask, ((12, 12), (8, 8)), mode="edge"), atol=1e-5)


def test_a_painted_regions_strength_is_its_luminance():
    pixels = np.zeros((1, 5, 3), np.uint8)
    pixels[0, 0], pixels[0, 1], pixels[0, 2], pixels[0, 3] = 255, (255, 0, 0), (0, 255, 0), (0, 0, 255)
    region = painted(Photo(pixels, "Region"))
    np.testing.assert_allclose(region.mask[0], [1, 0.299, 0.587, 0.114, 0], atol=1e-6)
    assert region.mask[0, 0] == 1  # exactly 1, so that one person is bit-identical to a person without a region


masks = st.lists(
    st.one_of(st.none(), st.integers(0, 9).map(lambda seed: random_region(seed, (3, 4)).mask)), min_size=1, max_size=5
)


@given(masks=masks, data=st.data())
def test_blend_weights_sum_to_at_most_1_and_do_not_depend_on_the_order(masks, data):
    parts = np.broadcast_to(blend_weights(masks), (len(masks), 3, 4))
    assert (parts >= 0).all()
    assert (parts.sum(0) <= 1 + 1e-5).all()
    if any(mask is None for mask in masks):
        np.testing.assert_allclose(parts.sum(0), 1, atol=1e-5)  # a person without a region fills the rest
    order = data.draw(st.permutations(range(len(masks))))
    np.testing.assert_allclose(
        np.broadcast_to(blend_weights([masks[i] for i in order]), parts.shape), parts[order], atol=1e-6
    )


def test_blend_weights_in_closed_form():
    a, b = np.float32([[1, 1, 0, 0, 0.4]]), np.float32([[0, 1, 1, 0, 0.2]])
    np.testing.assert_allclose(blend_weights([a, b])[:, 0], [[1, 0.5, 0, 0, 0.4], [0, 0.5, 1, 0, 0.2]])
    with_whole_image = blend_weights([a, b, None])
    # a person without a region does not weaken the others
    np.testing.assert_array_equal(with_whole_image[:2], blend_weights([a, b]))
    np.testing.assert_allclose(with_whole_image[2, 0], [0, 0, 0, 1, 0.4], atol=1e-6)
    np.testing.assert_array_equal(blend_weights([None, None]), np.full((2, 1, 1), 0.5, np.float32))


def test_the_region_of_a_unit_and_its_errors():
    landmarks = tiny.landmarks()
    black, white = (Photo(np.full((4, 4, 3), value, np.uint8), "Region") for value in (0, 255))
    assert region_of(Unit(), landmarks) is None
    assert region_of(Unit(region="face", region_scale=2.5), landmarks) == around(landmarks, 2.5)
    assert (region_of(Unit(region="mask", mask=white), None).sample(2, 2) == 1).all()
    for unit, message in (
        (Unit(region="mask"), "nothing is painted; paint a mask"),
        (Unit(region="mask", mask=black), "Region is entirely black"),
        (Unit(region="face"), "no landmarks"),
    ):
        with pytest.raises(FaceSnapError, match=message):
            region_of(unit, None)
