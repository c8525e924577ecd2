"""Units from the page and from the API."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from facesnap_ext import photos
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.settings import page_settings
from facesnap_ext.settings.script_args import UI_ORDER, check_intervals, from_script_args
from facesnap_ext.settings.unit import Unit, defaults
from tests.support.units import make_unit


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 6, 3), np.uint8))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def b64(image):
    return base64.b64encode(png(image)).decode()


def page(**values) -> list:
    """The values of a unit's components on a fresh page, except for `values`."""
    settings = page_settings.initial() | {name: values.pop(name) for name in page_settings.NAMES if name in values}
    shown = defaults() | {"enabled": True, "references": None, "driving_more": None, "settings": json.dumps(settings)}
    return [{**shown, **values}[name] for name in UI_ORDER]


def digests(unit: Unit) -> list:
    pictures = (*unit.references, unit.driving, unit.mask)
    return [picture and picture.digest for picture in pictures]


def test_the_page_and_the_api_give_the_same_unit():
    a, b, c, d = map(picture, range(4))
    shown = from_script_args(
        page(
            references=[png(a), png(b)],
            driving=c,
            mask=d,
            placed=True,
            x=0.25,
            block_weights="0, 0.5 " + "1 " * 8,
            weight=0.8,
            hires="first",
        )
    )
    named = from_script_args(
        [
            {
                "references": [b64(a), "data:image/png;base64," + b64(b)],
                "driving": b64(c),
                "mask": b64(d),
                "x": 0.25,
                "y": 0.45,
                "size": 0.45,
                "block_weights": [0, 0.5, *[1] * 8],
                "weight": 0.8,
                "hires": "first",
            },
            *page()[1:],  # the host pads the list with these
        ]
    )
    (shown,), (named,) = shown.values(), named.values()
    assert digests(shown) == digests(named) == [photos.from_pil(image, "").digest for image in (a, b, c, d)]
    without = {"references": (), "driving": None, "mask": None}
    assert replace(shown, **without) == replace(named, **without)
    assert named.strength.block_weights == (0, 0.5, *[1] * 8)


def test_an_untouched_page_gives_the_defaults():
    assert from_script_args(page()) == {1: Unit(True)}


def test_several_people_keep_their_numbers():
    two = [{"references": [b64(picture(i))], "weight": weight} for i, weight in ((0, 0.5), (1, 1.5))]
    shown = from_script_args(
        [*page(references=[png(picture(0))], weight=0.5), *page(enabled=False), *page(references=[png(picture(1))])]
    )
    named = from_script_args(two)
    assert list(shown) == [1, 3]
    assert [digests(unit) for unit in named.values()] == [digests(unit) for unit in shown.values()]
    assert {number: unit.strength.weight for number, unit in named.items()} == {1: 0.5, 2: 1.5}
    assert from_script_args([*page(enabled=False), *page()]) == {}


@pytest.mark.parametrize("args", [[], [False], [False, "no picture", None, None, 9], [{"enabled": False, "odd": 1}]])
def test_disabled_units_are_not_parsed(args):
    assert from_script_args(args) == {}


def test_a_shorter_argument_list_from_an_older_page_is_accepted():
    assert from_script_args(page()[:-1]) == from_script_args(page())


def test_an_unknown_name_is_reported_with_the_known_ones():
    with pytest.raises(
        FaceSnapError,
        match=r"no setting named 'wieght'; its settings are adapter_weight, .*reference_mode, .*weight",
    ):
        from_script_args([{"wieght": 1}])


@pytest.mark.parametrize(
    ("name", "value"), [("weight", 2.5), ("start", -0.1), ("end", 1.01), ("weight", "much"), ("yaw", 90), ("size", 0)]
)
def test_values_out_of_range_are_reported(name, value):
    with pytest.raises(FaceSnapError, match=f"{name} is {value!r}"):
        from_script_args([{"references": [b64(picture())], name: value}])


@pytest.mark.parametrize("text", ["/etc/passwd", "file:///etc/passwd", "https://example.org/face.png", "C:\\face.png"])
def test_a_string_is_never_a_path_or_a_url(text):
    with pytest.raises(FaceSnapError, match="Reference photo 1"):
        from_script_args([{"references": [text]}])


@given(weight=st.floats(0, 2), start=st.floats(0, 1), end=st.floats(0, 1))
@example(weight=0.0, start=0.0, end=1.0)
@example(weight=1.0, start=0.5, end=0.5)
def test_a_unit_is_active_only_with_a_weight_and_an_interval(weight, start, end):
    settings = make_unit(weight=weight, start=start, end=end)
    assert settings.active == (weight > 0 and start < end)
    assert not replace(settings, enabled=False).active


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pose": "lying"}, "pose is 'lying'; use one of photo, template"),
        ({"block_weights": [1, 2.1]}, "block_weights are .* one number from 0 to 2 for each residual"),
        ({"block_weights": [1, True]}, "block_weights are .* one number from 0 to 2 for each residual"),
        ({"block_weights": [math.nan] * 10}, "block_weights are .* one number from 0 to 2 for each residual"),
        ({"face_index": -1}, "face_index is -1"),
    ],
)
def test_invalid_choices_are_reported(values, message):
    with pytest.raises(FaceSnapError, match=message):
        from_script_args([{"references": [b64(picture())], **values}])


def test_block_weights_that_are_not_numbers_are_reported():
    with pytest.raises(FaceSnapError, match="block_weights are 'strong'"):
        from_script_args(page(block_weights="strong"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "settings on the page are 'no JSON', which is not an object"),
        ("[1]", "not an object in JSON"),
        ("[" * 100_000, "not an object in JSON"),
        (7, "not an object in JSON"),
        ('{"enabled": true}', "has no setting named 'enabled'; reload the page"),
        ('{"references": ["x"]}', "has no setting named 'references'"),
        ('{"start": 2}', "start is 2; use a number from 0 to 1"),
        ('{"yaw": NaN}', "yaw is nan"),
        ('{"yaw": "20"}', "yaw is '20'"),
        ('{"placed": 1, "x": 0.5}', "placed is 1; it must be true or false"),
        ('{"ffrnet_interval": 1.5}', "ffrnet_interval is 1.5; it must be a whole number"),
        ('{"cond_only": "yes"}', "cond_only is 'yes'"),
        ('{"pose": ["photo"]}', "pose is "),
        ('{"block_weights": 3}', "block_weights is 3"),
    ],
)
def test_the_pages_text_is_checked_like_other_settings(text, message):
    shown = page()
    shown[UI_ORDER.index("settings")] = text
    with pytest.raises(FaceSnapError, match=message):
        from_script_args(shown)


def test_an_emptied_input_and_an_empty_text_mean_the_defaults():
    for text in ("", None, '{"yaw": null, "start": null}'):
        shown = page()
        shown[UI_ORDER.index("settings")] = text
        assert from_script_args(shown) == {1: Unit(True)}


PERSON = {"references": [b64(picture())]}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([None, PERSON], "argument 2 is a dictionary, but argument 1 is not"),
        ([PERSON, None, PERSON], "argument 3 is a dictionary, but argument 2 is not"),
        ([*page(enabled=False), PERSON], "is a dictionary, but argument 1 is not"),
        ([[PERSON]], "first argument is .*send one dictionary per person"),
        ([None], "first argument is None"),
        (["true"], "first argument is 'true'"),
        ([1, None], "first argument is 1;"),
        ([{**PERSON, "enabled": "false"}], "enabled is 'false'; it must be true or false"),
        ([{**PERSON, "enabled": 0}], "enabled is 0; it must be true or false"),
        ([{**PERSON, "enabled": None}], "enabled is None; it must be true or false"),
        ([{**PERSON, "weight": "1.0"}], "weight is '1.0'; use a number"),
        ([{**PERSON, "weight": True}], "weight is True"),
        ([{**PERSON, "weight": None}], "weight is None"),
        ([{**PERSON, "weight": float("nan")}], "weight is nan"),
        ([{**PERSON, "face_index": "0"}], "face_index is '0'"),
        ([{**PERSON, "face_index": 1.0}], "face_index is 1.0"),
        ([{**PERSON, "cond_only": "yes"}], "cond_only is 'yes'"),
        ([{**PERSON, "block_weights": 0}], "block_weights is 0"),
        ([{**PERSON, "block_weights": {}}], "block_weights is {}"),
        ([{**PERSON, "driving": 0}], "driving is 0"),
        ([{**PERSON, "driving": False}], "driving is False"),
        ([{**PERSON, "mask": {}}], "mask is {}"),
        ([{"references": 0}], "references is 0"),
        ([{"references": {"photo": "x"}}], "references is {"),
        ([{"references": [7]}], "Reference photo 1 is 7"),
    ],
)
def test_arguments_that_cannot_be_meant_stop_the_job(args, message):
    with pytest.raises(FaceSnapError, match=message):
        from_script_args(args)


@pytest.mark.parametrize(("start", "end"), [(1.0, 1.0), (0.5, 0.5), (0.8, 0.2), (1.0, 0.0)])
def test_a_person_who_would_never_act_stops_the_job(start, end):
    unit = make_unit(start=start, end=end)
    with pytest.raises(FaceSnapError, match=rf"^FaceSnap's start \({start:g}\) is not before its end \({end:g}\)"):
        check_intervals({1: unit})
    with pytest.raises(FaceSnapError, match=r"^Person 2: FaceSnap's start"):
        check_intervals({1: make_unit(), 2: unit})
    check_intervals({1: make_unit(start=start, end=end, weight=0)})
    check_intervals({1: make_unit(enabled=False, start=start, end=end)})
