"""How an init picture's landmarks follow the host's way of fitting it into the output."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from facesnap_ext.engine import Prepared
from facesnap_ext.hosts.webui import Job, for_pass, init_region


def job(**values):
    return SimpleNamespace(**{"paste_to": None, "resize_mode": 0, "width": 512, "height": 512, **values})


def prepared(in_init_picture: bool, width=400, height=200, **changes):
    guidance = tiny.guidance(landmarks=tiny.landmarks(width=width, height=height), **changes)
    return Prepared(guidance, (), None, in_init_picture, ())


sides = st.integers(64, 2048)


@given(size=st.tuples(sides, sides), output=st.tuples(sides, sides))
def test_cropping_keeps_proportions_inside_and_filling_keeps_them_around(size, output):
    for mode, inside in ((1, True), (2, False)):
        x, y, width, height = init_region(mode, size, output)
        assert width / height == pytest.approx(output[0] / output[1])
        assert (x + width / 2, y + height / 2) == pytest.approx((size[0] / 2, size[1] / 2))
        touches = width == pytest.approx(size[0]) or height == pytest.approx(size[1])
        assert touches
        if inside:
            assert width <= size[0] + 1e-6
            assert height <= size[1] + 1e-6
        else:
            assert width >= size[0] - 1e-6
            assert height >= size[1] - 1e-6
    assert init_region(0, size, output) == (0, 0, *size) == init_region(3, size, output)


def test_landmarks_of_a_driving_photo_stay_as_they_were_placed():
    p = prepared(in_init_picture=False)
    (guidance,) = for_pass(job(resize_mode=1), Job((p,), (400, 200)))
    assert guidance.landmarks is p.guidance.landmarks
    assert for_pass(job(), Job((p,))) == (p.guidance,)


@pytest.mark.parametrize(
    ("values", "point"),
    [
        ({"resize_mode": 0}, (256, 256)),  # 400 × 200 stretched to 512 × 512: the middle stays the middle
        ({"resize_mode": 1}, (256, 256)),
        ({"paste_to": (150, 50, 100, 100)}, (256, 256)),  # inpainting "only masked", around the middle
        ({"paste_to": (200, 100, 100, 100)}, (0, 0)),
    ],
)
def test_the_init_pictures_middle_is_where_the_host_puts_it(values, point):
    p = prepared(in_init_picture=True)
    p.guidance.landmarks.points[:] = (200, 100)
    (guidance,) = for_pass(job(**values), Job((p,), (400, 200)))
    landmarks = guidance.landmarks
    np.testing.assert_allclose(landmarks.scaled(512, 512).points[0], point, atol=1e-3)
