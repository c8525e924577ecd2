"""The people who are active in each pass: their landmarks and regions follow the host's cropping and resizing."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from facesnap_ext.engine import Prepared
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts.errors import forget_stop, report_stop
from facesnap_ext.hosts.job import JobState, PreparedBatch, begin_batch, prepare
from facesnap_ext.hosts.webui import progress
from facesnap_ext.hosts.windows import for_pass, hires_window, init_region, init_window
from facesnap_ext.regions import PaintedRegion, RoundedBox, around
from facesnap_ext.settings.unit import Unit
from tests.support import mock_webui, tiny
from tests.support.units import make_unit

NETWORK = tiny.ffrnet()


def job(**values):
    return SimpleNamespace(**{"paste_to": None, "resize_mode": 0, "width": 512, "height": 512, **values})


def prepared(in_init_image: bool, width=400, height=200, **changes):
    conditioning = tiny.conditioning(network=NETWORK, landmarks=tiny.landmarks(width=width, height=height), **changes)
    return Prepared(conditioning, (), None, in_init_image, ())


sides = st.integers(64, 2048)


@given(size=st.tuples(sides, sides), output=st.tuples(sides, sides))
def test_crop_and_resize_stays_inside_the_image_and_resize_and_fill_extends_beyond_it(size, output):
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


def test_landmarks_of_a_driving_photo_are_not_moved():
    p = prepared(in_init_image=False)
    (conditioning,) = for_pass(job(resize_mode=1), PreparedBatch((p,), (400, 200)))
    assert conditioning.landmarks is p.conditioning.landmarks
    assert for_pass(job(), PreparedBatch((p,))) == (p.conditioning,)


@pytest.mark.parametrize(
    ("values", "point"),
    [
        ({"resize_mode": 0}, (256, 256)),  # 400 × 200 stretched to 512 × 512: the centre stays the centre
        ({"resize_mode": 1}, (256, 256)),
        ({"paste_to": (150, 50, 100, 100)}, (256, 256)),  # inpainting "only masked", around the centre
        ({"paste_to": (200, 100, 100, 100)}, (0, 0)),
    ],
)
def test_the_centre_of_the_init_image_is_where_the_host_puts_it(values, point):
    p = prepared(in_init_image=True)
    p.conditioning.landmarks.points[:] = (200, 100)
    (conditioning,) = for_pass(job(**values), PreparedBatch((p,), (400, 200)))
    landmarks = conditioning.landmarks
    np.testing.assert_allclose(landmarks.scaled(512, 512).points[0], point, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(x=st.integers(0, 300), y=st.integers(0, 100), width=st.integers(40, 100), height=st.integers(40, 100))
def test_only_masked_inpainting_at_the_images_edge_pads_the_crop(x, y, width, height):
    """The host crops, fits the crop into the output and fills the rest. The test follows a point through these
    steps."""
    p = prepared(in_init_image=True)
    p.conditioning.landmarks.points[:] = (x + 0.3 * width, y + 0.8 * height)
    (conditioning,) = for_pass(job(paste_to=(x, y, width, height), height=768), PreparedBatch((p,), (400, 200)))
    scale = min(512 / width, 768 / height)  # resize mode 2: the whole crop is visible and centred
    left, top = (512 - scale * width) / 2, (768 - scale * height) / 2
    expected = (left + 0.3 * scale * width, top + 0.8 * scale * height)
    np.testing.assert_allclose(conditioning.landmarks.scaled(512, 768).points[0], expected, atol=0.05)


HALF = PaintedRegion(np.float32([[1, 0]]))


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ({"resize_mode": 0}, [1, 1, 0, 0]),
        ({"resize_mode": 1}, [1, 1, 0, 0]),  # 400 × 200 cropped to a square
        ({"paste_to": (150, 50, 100, 100)}, [1, 1, 0, 0]),
        ({"paste_to": (100, 0, 200, 200), "resize_mode": 1}, [1, 1, 0, 0]),
        ({"paste_to": (0, 0, 200, 200)}, [1, 1, 1, 1]),
        ({"paste_to": (200, 0, 200, 200)}, [0, 0, 0, 0]),
        ({"paste_to": (150, 100, 80, 80)}, [1, 1, 0.5, 0]),
    ],
)
@pytest.mark.parametrize("in_init_image", [True, False])
def test_a_painted_region_covers_the_init_image_whatever_the_pose_source(values, seen, in_init_image):
    p = prepared(in_init_image, region=HALF)
    (conditioning,) = for_pass(job(**values), PreparedBatch((p,), (400, 200)))
    np.testing.assert_allclose(conditioning.region.sample(4, 1)[0], seen, atol=1e-6)


def test_a_face_region_follows_the_landmarks():
    p = prepared(in_init_image=True)
    whole = around(p.conditioning.landmarks, 1.8)
    for in_init_image in (True, False):
        conditioning = replace(p.conditioning, region=whole)
        person = replace(p, conditioning=conditioning, in_init_image=in_init_image)
        (seen,) = for_pass(job(paste_to=(100, 50, 120, 120)), PreparedBatch((person,), (400, 200)))
        expected = around(seen.landmarks, 1.8)
        for name in ("x", "y", "half_width", "half_height"):
            assert getattr(seen.region, name) == pytest.approx(getattr(expected, name), abs=1e-5)
        assert (seen.region == whole) != in_init_image


@pytest.mark.parametrize(("hires", "first", "second"), [("both", 1, 1), ("first", 1, 0), ("second", 0, 1)])
def test_each_pass_has_the_people_whose_settings_include_it(hires, first, second):
    people = PreparedBatch((prepared(False), prepared(False, hires=hires)))
    size = {"hr_upscale_to_x": 1024, "hr_upscale_to_y": 1024, "truncate_x": 0, "truncate_y": 0}
    assert len(for_pass(job(), people)) == 1 + first  # img2img has only one pass
    assert len(for_pass(job(is_hr_pass=False), people)) == 1 + first
    assert for_pass(job(is_hr_pass=True, **size), people) == tuple(
        p.conditioning for p in people.people if p.conditioning.strength.hires in ("both", "second")
    )
    assert len(for_pass(job(is_hr_pass=True, **size), people)) == 1 + second


def test_hires_fix_to_another_aspect_ratio_crops_landmarks_and_regions():
    """512 × 512 is upscaled to 1024 × 1024 and cropped to 1024 × 640: the host drops 24 cells at each end."""
    values = {"hr_upscale_to_x": 1024, "hr_upscale_to_y": 1024, "truncate_x": 0, "truncate_y": 48}
    cells = np.arange(128)  # as in the host: samples[:, :, t // 2 : shape - (t + 1) // 2]
    for cut in (48, 49):
        kept = cells[cut // 2 : len(cells) - (cut + 1) // 2]
        window = hires_window(job(**{**values, "truncate_y": cut}))
        assert window == pytest.approx((0, kept[0] / 128, 1, len(kept) / 128))
    p = prepared(False, 512, 512, region=RoundedBox(0.5, 0.5, 0.1, 0.1))
    p.conditioning.landmarks.points[:] = (256, 160)
    (conditioning,) = for_pass(job(is_hr_pass=True, **values), PreparedBatch((p,)))
    np.testing.assert_allclose(conditioning.landmarks.scaled(1024, 640).points[0], (512, 320 - 192), atol=1e-3)
    assert (conditioning.region.x, conditioning.region.y) == pytest.approx((0.5, 0.5))
    assert conditioning.region.half_height == pytest.approx(0.1 * 1024 / 640)


def test_the_init_window_without_a_crop_is_the_whole_image():
    assert init_window(job(), (400, 200)) == (0, 0, 1, 1)


class StubEngine:
    def prepare(self, unit, width, height, init_image, progress, files_kept, init_part):
        progress("looking")
        if unit.strength.weight == 2:
            raise FaceSnapError("No face was found.")
        return replace(prepared(init_image is not None, hires=unit.strength.hires), notes=("Padded.",))


@pytest.fixture
def page(tmp_path):
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("modules", "gradio")}
    yield mock_webui.install(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] in ("modules", "gradio")]:
        del sys.modules[name]
    sys.modules.update(before)


def job_with_comments(**values):
    comments = []
    return job(extra_generation_params={}, comments=comments, comment=comments.append, **values)


def test_notes_and_errors_name_the_person_only_if_there_are_several(page):
    p = job_with_comments()
    (batch,) = prepare(p, [{1: Unit(), 3: Unit()}], StubEngine(), progress)
    assert len(batch.people) == 2
    assert batch.init_size is None
    assert p.comments == ["FaceSnap: Person 1: Padded.", "FaceSnap: Person 3: Padded."]
    p = job_with_comments()
    prepare(p, [{3: Unit()}], StubEngine(), progress)
    assert p.comments == ["FaceSnap: Padded."]
    with pytest.raises(FaceSnapError, match=r"^Person 3: No face was found\.$"):
        prepare(job_with_comments(), [{1: Unit(), 3: make_unit(weight=2)}], StubEngine(), progress)
    with pytest.raises(FaceSnapError, match=r"^No face was found\.$"):
        prepare(job_with_comments(), [{3: make_unit(weight=2)}], StubEngine(), progress)


def test_a_person_for_a_second_pass_is_reported_if_hires_fix_is_off(page):
    for values, reported in (({}, True), ({"enable_hr": False}, True), ({"enable_hr": True}, False)):
        p = job_with_comments(**values)
        people = {1: Unit(), 2: make_unit(hires="second")}
        (batch,) = prepare(p, [people], StubEngine(), progress)
        assert any("second pass of hires fix, which is off" in comment for comment in p.comments) == reported
        assert batch.infotext.get("FaceSnap stopped") == ("Person 2: no second pass" if reported else None)
        alone = prepare(p, [{1: people[2]}], StubEngine(), progress)[0].infotext
        assert alone.get("FaceSnap stopped") == ("no second pass" if reported else None)


def test_what_stopped_is_in_the_infotext_of_its_own_images_only(page):
    """The API returns infotext, but no comments."""
    p = job_with_comments()
    p.facesnap = JobState(prepared=prepare(p, [{1: Unit()}], StubEngine(), progress))
    begin_batch(p, progress)
    report_stop(p, "refiner", "FaceSnap stopped.")
    report_stop(p, "redrawing", "No face.")
    report_stop(p, "refiner", "FaceSnap stopped.")
    assert p.extra_generation_params["FaceSnap stopped"] == "redrawing; refiner"
    forget_stop(p, "redrawing")
    forget_stop(p, "something else")
    assert p.extra_generation_params["FaceSnap stopped"] == "refiner"
    begin_batch(p, progress)
    assert "FaceSnap stopped" not in p.extra_generation_params


def test_the_size_of_the_init_image_is_recorded(page):
    p = job_with_comments(init_images=[Image.new("RGB", (300, 200))])
    assert prepare(p, [{1: Unit()}], StubEngine(), progress)[0].init_size == (300, 200)
