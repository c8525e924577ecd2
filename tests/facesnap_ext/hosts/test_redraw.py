"""Small faces in a finished image are redrawn and pasted back, and nothing else changes."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts import a1111
from facesnap_ext.hosts.redraw import (
    CELL,
    CROP_SCALE,
    FEATHER,
    Crop,
    crop_around,
    paste_back,
    redraw,
    redraw_size,
    small_faces,
)
from facesnap_ext.identity.faces import Face
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.photos import Photo
from facesnap_ext.regions import RoundedBox
from tests.support import mock_processing, mock_webui, tiny
from tests.support.ldm_unet import ldm_unet
from tests.support.mock_processing import Processing, Runner

NETWORK = tiny.ffrnet()
AREA = 512 * 512
RED = Image.new("RGB", (8, 8), (255, 0, 0))


def face(left, top, right, bottom, width=512, height=512) -> Face:
    photo = Photo(np.zeros((height, width, 3), np.uint8), "image")
    box, points = np.float32([left, top, right, bottom]), np.zeros((5, 2), np.float32)
    return Face(photo, box, points, np.ones(4, np.float32), 1.0, False, 640)


def person_at(x, y, size=20, width=512, height=512, **changes):
    """A person whose landmarks span a square around a point. They are given for an image of half the size."""
    points = np.linspace((x - size / 2, y - size / 2), (x + size / 2, y + size / 2), 72) / 2
    landmarks = Landmarks(points.astype(np.float32), width // 2, height // 2)
    return tiny.conditioning(network=NETWORK, landmarks=landmarks, **changes)


def noise(width=512, height=512, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@st.composite
def faces_in_pictures(draw):
    width, height = draw(st.integers(64, 1500)), draw(st.integers(64, 1500))
    left, top = draw(st.floats(-100, width - 1)), draw(st.floats(-100, height - 1))
    box = (left, top, left + draw(st.floats(0.1, 600)), top + draw(st.floats(0.1, 600)))
    if box[2] <= 0 or box[3] <= 0:
        box = (0.0, 0.0, 5.0, 5.0)
    return np.float64(box), width, height


@given(faces_in_pictures())
def test_the_crop_is_a_square_around_the_face_inside_the_image(given_face):
    box, width, height = given_face
    crop = crop_around(box, width, height)
    left, top, right, bottom = crop.box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    seen = np.clip(box, 0, [width, height, width, height])
    assert left <= seen[0]
    assert top <= seen[1]
    assert right >= seen[2]
    assert bottom >= seen[3]
    side = max(2, math.ceil(CROP_SCALE * max(seen[2] - seen[0], seen[3] - seen[1])))
    assert (crop.width, crop.height) == (min(side, width), min(side, height))
    for start, end, low, high, length in (
        (left, right, seen[0], seen[2], width),
        (top, bottom, seen[1], seen[3], height),
    ):
        if start > 0 and end < length:  # away from the image's edges, the crop is centred
            assert abs((start + end) / 2 - (low + high) / 2) <= 0.5 + 1e-6


@given(st.integers(2, 1500), st.integers(2, 1500), st.sampled_from([AREA, 832 * 1216, 1024 * 1024]))
def test_a_crop_is_redrawn_in_its_own_shape_and_the_jobs_area_rounded_to_cells(width, height, area):
    w, h = redraw_size(Crop(0, 0, width, height), area)
    assert w % CELL == h % CELL == 0
    scale = math.sqrt(area / (width * height))
    for drawn, exact in ((w, scale * width), (h, scale * height)):
        assert drawn == CELL or abs(drawn - exact) <= CELL / 2
    if width == height:
        assert w == h


@settings(deadline=None, max_examples=40)
@given(faces_in_pictures(), st.integers(0, 9))
def test_pixels_outside_the_crop_are_unchanged_and_the_face_is_replaced(given_face, seed):
    box, width, height = given_face
    crop = crop_around(box, width, height)
    before = noise(width, height, seed)
    before.info["parameters"] = "unchanged"
    after = paste_back(before, crop, RED)
    old, new = np.asarray(before), np.asarray(after)
    left, top, right, bottom = crop.box
    outside = np.ones((height, width), bool)
    outside[top:bottom, left:right] = False
    np.testing.assert_array_equal(new[outside], old[outside])
    low = np.floor(np.clip(box[:2], 0, None)).astype(int)
    high = np.ceil(np.minimum(box[2:], (width, height))).astype(int)
    if min(crop.width, crop.height) > 20:
        inner = new[low[1] + 1 : high[1] - 1, low[0] + 1 : high[0] - 1]
        assert (inner == (255, 0, 0)).all()
    assert after.info == before.info


def test_the_seam_is_a_smooth_step_except_at_the_images_edge():
    """With a black image and a white patch, the pixel values are the blend weights."""
    black, white = Image.new("L", (200, 100)).convert("RGB"), Image.new("RGB", (9, 9), "white")
    seen = np.asarray(paste_back(black, Crop(0, 0, 100, 100), white))[50, :, 0] / 255
    band = FEATHER * 100
    steps = np.clip((100 - np.arange(100) - 0.5) / band, 0, 1)
    np.testing.assert_allclose(seen[:100], steps * steps * (3 - 2 * steps), atol=0.5 / 255 + 1e-6)
    assert (seen[100:] == 0).all()
    assert (np.asarray(paste_back(black, Crop(0, 0, 200, 100), white)) == 255).all()


def test_a_small_face_belongs_to_the_person_with_the_nearest_landmarks():
    left, right, large = face(60, 60, 100, 110), face(400, 60, 440, 110), face(150, 200, 350, 460)
    found = small_faces(
        [large, left, right], [person_at(420, 85), person_at(85, 90), person_at(250, 330)], 512, 512, AREA
    )
    assert [(crop, people) for crop, people in found] == [
        (crop_around(left.box, 512, 512), [1]),
        (crop_around(right.box, 512, 512), [0]),
    ]


@pytest.mark.parametrize(
    ("people", "owners"),
    [
        ([(80, 85), (82, 85)], [0, 1]),  # two people in one place are blended, in the crop as well
        ([(80, 85), (115, 85)], [0]),  # the other person's face is missing from the image
        ([(110, 85), (118, 85)], [0]),  # neither matches exactly, so the nearer person is chosen
        ([(300, 300)], None),  # the face belongs to a different person
    ],
)
def test_which_people_are_redrawn_at_a_face(people, owners):
    found = small_faces([face(60, 60, 100, 110)], [person_at(*place) for place in people], 512, 512, AREA)
    assert [sorted(own) for _, own in found] == ([] if owners is None else [owners])


@pytest.mark.parametrize(("height", "side", "small"), [(127, 512, True), (129, 512, False), (500, 2048, False)])
def test_a_face_is_small_below_a_quarter_of_the_height_and_the_jobs_area(height, side, small):
    """After hires fix to 2048, a 500-pixel face is below a quarter of the height, but its crop exceeds 512 x 512."""
    middle = side / 2
    there = face(middle - 40, middle - height / 2, middle + 40, middle + height / 2, side, side)
    found = small_faces([there], [person_at(middle, middle, width=side, height=side)], side, side, AREA)
    assert bool(found) == small
    without = tiny.conditioning(network=NETWORK, landmarks=None)
    assert small_faces([there], [without], side, side, AREA) == []
    assert small_faces([], [person_at(1, 1)], side, side, AREA) == []


@pytest.fixture
def world(tmp_path):
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("modules", "gradio")}
    mock = mock_webui.install(tmp_path)
    mock.adapter = SimpleNamespace(
        attach=lambda p, conditionings: mock.calls.append((p, conditionings)),
        detach=lambda p: mock.calls.append("detach"),
    )
    yield mock
    for name in [name for name in sys.modules if name.split(".")[0] in ("modules", "gradio")]:
        del sys.modules[name]
    sys.modules.update(before)


class Other:
    """Another extension, which must not run for the crop."""

    args_from = args_to = 0

    def process(self, p):
        pytest.fail("called for the crop")


def finished(**values) -> Processing:
    """A job that has just generated a batch of two images, at the second of them."""
    p = Processing(seed=5, scripts=Runner(Other()), extra_generation_params={"FaceSnap": "1"}, **values)
    p.prompts, p.negative_prompts = ["first", "second <lora:a:1>"], ["", "blurred"]
    p.seeds, p.subseeds, p.batch_index = [5, 6], [7, 8], 1
    return p


SMALL_FACE = (60, 60, 100, 108)  # 48 pixels high; the crop is 2.2 times as large, 106 pixels around (80, 84)
CROP = (27, 31, 133, 137)


def test_the_crop_is_a_separate_job_with_the_images_settings(world):
    """Its landmarks are shifted to the crop's corner and scaled by 512 / 106."""
    jobs = []

    def draw(p, index, conditionings):
        jobs.append((p, conditionings))
        return Image.new("RGB", (p.width, p.height), "red")

    world.draw = draw
    world.state.job_no, world.state.job_count, world.state.textinfo = 1, 3, "before"
    world.sd_model.applied_token_merged_ratio = 0.4
    p, image = finished(tiling=True, sampler_name="DPM++ SDE"), noise()
    person = person_at(80, 85, weight=0.7, start=0.1, end=0.9, region=RoundedBox(0.5, 0.5, 0.1, 0.1), hires="first")
    after = redraw(p, image, [person], [0.4], lambda photo: [face(*SMALL_FACE)], world.adapter)

    ((job, _),) = jobs
    expected = {"prompt": "second <lora:a:1>", "negative_prompt": "blurred", "seed": 6, "subseed": 8, "steps": p.steps}
    expected |= {"sampler_name": "DPM++ SDE", "cfg_scale": p.cfg_scale, "tiling": True, "restore_faces": False}
    expected |= {"width": 512, "height": 512, "denoising_strength": 0.4, "n_iter": 1, "batch_size": 1}
    expected |= {"do_not_save_samples": True, "do_not_save_grid": True, "closed": True}
    assert {name: getattr(job, name) for name in expected} == expected
    crop = image.crop(CROP).resize((512, 512), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(job.init_images[0]), np.asarray(crop))

    ((attached_to, (conditioning,)),) = [call for call in world.calls if isinstance(call, tuple)]
    assert attached_to is job
    assert (conditioning.strength.weight, conditioning.strength.start, conditioning.strength.end) == (0.7, 0.1, 0.9)
    assert (conditioning.region, conditioning.strength.hires) == (None, "both")
    points = (person.landmarks.scaled(512, 512).points - CROP[:2]) * 512 / 106
    np.testing.assert_allclose(conditioning.landmarks.scaled(512, 512).points, points, atol=1e-3)

    np.testing.assert_array_equal(np.asarray(after), np.asarray(paste_back(image, Crop(27, 31, 106, 106), RED)))
    assert world.calls[-1] == "detach"
    assert (world.state.job_no, world.state.job_count, world.state.textinfo) == (1, 3, "before")
    assert world.sd_model.applied_token_merged_ratio == 0.4
    assert world.history == []
    assert not world.cmd_opts.no_prompt_history
    assert p.extra_generation_params == {"FaceSnap": "1"}
    assert p.comments == []
    assert len(p.scripts.alwayson_scripts) == 1


def test_each_face_is_redrawn_with_its_persons_strength(world):
    jobs = []
    world.draw = lambda p, i, conditionings: jobs.append((p.denoising_strength, len(conditionings))) or p.init_images[0]
    faces = [face(60, 60, 100, 110), face(400, 60, 440, 110), face(200, 300, 240, 350)]
    people = [person_at(80, 85), person_at(420, 85), person_at(220, 325), person_at(221, 325)]
    redraw(finished(), noise(), people, [0.3, 0, 0, 0.6], lambda photo: faces, world.adapter)
    assert jobs == [(0.3, 1), (0.6, 2)]


def test_without_a_small_face_the_image_is_unchanged(world):
    world.draw = lambda p, i, conditionings: pytest.fail("drawn")
    image = noise()
    for found, message in (([], "No face was found"), ([face(100, 100, 300, 360)], None)):
        p = finished()
        assert redraw(p, image, [person_at(200, 230)], [0.4], lambda photo, found=found: found, world.adapter) is image
        assert [message in comment for comment in p.comments] == ([True] if message else [])


def broken(p, i, conditionings):
    raise RuntimeError("out of memory")


def interrupted(p, i, conditionings):
    mock_processing._worlds[-1].state.interrupted = True
    return p.init_images[0]


def skipped(p, i, conditionings):
    mock_processing._worlds[-1].state.skipped = True
    return p.init_images[0]


@pytest.mark.parametrize(("draw", "message"), [(broken, "out of memory"), (interrupted, "interr"), (skipped, "interr")])
def test_errors_and_interrupts_are_reported_and_leave_the_image_unchanged(world, draw, message):
    world.draw = draw
    p, image = finished(), noise()
    world.state.job_no, world.state.job_count = 1, 2
    assert redraw(p, image, [person_at(80, 85)], [0.4], lambda photo: [face(*SMALL_FACE)], world.adapter) is image
    (comment,) = p.comments
    assert message in comment
    assert "is unchanged" in comment
    assert world.calls[-1] == "detach"
    assert (world.state.job_no, world.state.job_count) == (1, 2)
    assert not world.cmd_opts.no_prompt_history


def test_an_interrupted_job_is_not_redrawn(world):
    world.draw = lambda p, i, conditionings: pytest.fail("drawn")
    for name in ("interrupted", "skipped"):
        p, image = finished(), noise()
        world.state.interrupted = world.state.skipped = False
        setattr(world.state, name, True)
        found = [face(*SMALL_FACE)]
        assert redraw(p, image, [person_at(80, 85)], [0.4], lambda photo, found=found: found, world.adapter) is image
        assert "interrupted" in p.comments[0]


def test_a_missing_face_pack_is_reported(world):
    def find(photo):
        raise FaceSnapError("There is no face pack.")

    p, image = finished(), noise()
    assert redraw(p, image, [person_at(80, 85)], [0.4], find, world.adapter) is image
    assert "no face pack" in p.comments[0]


def test_a_failure_to_attach_is_an_error(world):
    """The host swallows exceptions of scripts and would draw a different person's face."""

    def attach(p, conditionings):
        raise RuntimeError("no room")

    world.adapter.attach = attach
    p, image = finished(), noise()
    found = [face(*SMALL_FACE)]
    assert redraw(p, image, [person_at(80, 85)], [0.4], lambda photo: found, world.adapter) is image
    assert "could not be attached" in p.comments[0]


def test_controlnet_does_not_act_on_the_crop(world, monkeypatch):
    """ControlNet replaces the UNet's `forward` from the beginning to the end of a job."""
    unet = SimpleNamespace(forward="ControlNet's", _original_forward="own")
    model = SimpleNamespace(applied_token_merged_ratio=0, model=SimpleNamespace(diffusion_model=unet))
    monkeypatch.setattr(Processing, "sd_model", model)
    seen = []
    for draw in (lambda p, i, conditionings: seen.append(unet.forward) or p.init_images[0], broken):
        world.draw = draw
        redraw(finished(), noise(), [person_at(80, 85)], [0.4], lambda photo: [face(*SMALL_FACE)], world.adapter)
        assert unet.forward == "ControlNet's"
    assert seen == ["own"]


def test_no_hook_is_left_on_a1111s_unet(world, monkeypatch):
    unet = ldm_unet()

    def hooks():
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())

    model = SimpleNamespace(is_sdxl=True, model=SimpleNamespace(diffusion_model=unet), applied_token_merged_ratio=0)
    monkeypatch.setattr(Processing, "sd_model", model)
    seen = []

    def draw(p, i, conditionings):
        seen.append(hooks())
        if len(seen) > 1:
            raise RuntimeError("out of memory")
        return p.init_images[0]

    world.draw = draw
    before = hooks()
    for _ in range(2):
        redraw(finished(), noise(), [person_at(80, 85)], [0.4], lambda photo: [face(*SMALL_FACE)], a1111)
        assert hooks() == before
    assert min(seen) > before
