"""Unit from the page and from the API."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from facesnap_ext import photos
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.settings import UI_ORDER, Unit, from_script_args


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 6, 3), np.uint8))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def b64(image):
    return base64.b64encode(png(image)).decode()


def test_the_pages_values_and_the_apis_mean_the_same():
    a, b, c = picture(0), picture(1), picture(2)
    (page,) = from_script_args([True, a, [png(b)], c, 0.8, 0.1, 0.9, "x.safetensors"])
    (positional,) = from_script_args([True, b64(a), [b64(b)], b64(c), 0.8, 0.1, 0.9, "x.safetensors"])
    (named,) = from_script_args(
        [
            {
                "references": [b64(a), "data:image/png;base64," + b64(b)],
                "driving": b64(c),
                "weight": 0.8,
                "start": 0.1,
                "end": 0.9,
                "model": "x.safetensors",
            }
        ]
    )
    for settings in (page, positional, named):
        assert settings.enabled
        assert [photo.digest for photo in settings.references] == [
            photos.from_pil(image, "").digest for image in (a, b)
        ]
        assert settings.driving.digest == photos.from_pil(c, "").digest
        assert (settings.weight, settings.start, settings.end) == (0.8, 0.1, 0.9)
        assert settings.model == "x.safetensors"


@pytest.mark.parametrize("args", [[], [False], [False, "no picture", None, None, 9], [{"enabled": False, "odd": 1}]])
def test_disabled_means_nothing_is_read(args):
    assert from_script_args(args) == ()


def test_an_unknown_name_is_told_with_the_known_ones():
    with pytest.raises(FaceSnapError, match=r"no setting named wieght; it has average, .*blocks, .*weight"):
        from_script_args([{"wieght": 1}])


@pytest.mark.parametrize(("name", "value"), [("weight", 2.5), ("start", -0.1), ("end", 1.01), ("weight", "much")])
def test_values_out_of_range_are_told(name, value):
    with pytest.raises(FaceSnapError, match=f"{name} is {value!r}"):
        from_script_args([{"references": [b64(picture())], name: value}])


@pytest.mark.parametrize("text", ["/etc/passwd", "file:///etc/passwd", "https://example.org/face.png", "C:\\face.png"])
def test_a_string_is_never_a_path_or_an_address(text):
    with pytest.raises(FaceSnapError, match="Reference photo 1"):
        from_script_args([{"references": [text]}])


@given(weight=st.floats(0, 2), start=st.floats(0, 1), end=st.floats(0, 1))
def test_it_acts_only_with_a_weight_and_a_window(weight, start, end):
    settings = Unit(enabled=True, weight=weight, start=start, end=end)
    assert settings.active == (weight > 0 and start < end)
    assert not replace(settings, enabled=False).active


def test_the_order_that_api_clients_rely_on():
    assert UI_ORDER == ("enabled", "photo", "more_photos", "driving", "weight", "start", "end", "model")
