"""Several init images in one batch, tiles, and masks: each image has separate people and placements."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from facesnap_ext.conditioning import Placement
from facesnap_ext.engine import Engine as RealEngine
from facesnap_ext.engine import Prepared
from facesnap_ext.hosts import a1111, forge
from facesnap_ext.hosts.attention import AdapterHooks, Call
from facesnap_ext.hosts.init_image import init_images, init_part, is_tile, remember_request
from facesnap_ext.hosts.job import PreparedBatch, PreparedImage, prepare
from facesnap_ext.hosts.windows import for_pass
from facesnap_ext.photos import Photo, from_pil
from facesnap_ext.regions import PaintedRegion, RoundedBox
from facesnap_ext.residuals import Residuals
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights.search import find_models
from tests.facesnap_ext.hosts import test_a1111 as in_a1111
from tests.facesnap_ext.hosts import test_forge as in_forge
from tests.support import tiny
from tests.support.ldm_unet import inputs, ldm_unet
from tests.support.units import changed, make_unit

NETWORK = tiny.ffrnet()
HALF = PaintedRegion(np.float32([[1, 0]]))
PLACES = {
    "different poses": (Placement(tiny.landmarks(1), None), Placement(tiny.landmarks(2), None)),
    "the second without the person": (Placement(tiny.landmarks(1), None), None),
    "the first without the person": (None, Placement(tiny.landmarks(2), None)),
    "different regions": (
        Placement(tiny.landmarks(1), HALF),
        Placement(tiny.landmarks(2), PaintedRegion(1 - HALF.mask)),
    ),
}


def person(places, **changes):
    return tiny.conditioning(network=NETWORK, weight=0.7, placements=places, **changes)


def alone(conditioning, image):
    """The people of one image."""
    people = []
    for one in conditioning:
        place = one.in_image(image)
        if place is not None:
            people.append(replace(one, placements=(), landmarks=place.landmarks, region=place.region))
    return people


@torch.no_grad()
def residuals_of(people, x, timesteps, is_cond):
    return None if not people else Residuals(people).rows(x, timesteps, is_cond)


@pytest.mark.parametrize(
    "second", [None, tiny.conditioning(3, weight=1.2), person(PLACES["different poses"][::-1], seed=4)]
)
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("same_latents", [False, True])
def test_each_row_gets_the_residuals_of_its_own_image(name, second, same_latents):
    people = [person(PLACES[name]), *([] if second is None else [second])]
    x, timesteps, _, _ = inputs(2)
    timesteps = timesteps[:1].expand(2)
    x = x[[0, 0]] if same_latents else x
    images = [0, 1, 0, 1, 1]
    sides = [True, True, False, False, True]
    blended = Residuals(people).rows(x[images], timesteps[[0] * 5], sides, images=images)
    for row, image in enumerate(images):
        expected = residuals_of(alone(people, image), x[image : image + 1], timesteps[:1], [sides[row]])
        for i, residual in enumerate(blended):
            wanted = torch.zeros_like(residual[row]) if expected is None else expected[i][0]
            torch.testing.assert_close(residual[row], wanted, atol=1e-4, rtol=1e-4)


def test_people_without_placements_share_one_run_as_before():
    people = [tiny.conditioning(network=NETWORK)]
    x, timesteps, _, _ = inputs(2)
    for images in (None, [0, 1, 0, 1]):
        rows = Residuals(people).rows(
            x[[0, 1, 0, 1]], timesteps[[0, 0, 0, 0]], [True, True, False, False], images=images
        )
        if images is None:
            expected = rows
    assert all(torch.equal(a, b) for a, b in zip(rows, expected))


@pytest.mark.parametrize("size", [8, 5])
def test_the_adapter_follows_each_images_region(size):
    """The keys and values add 1 to every token, which shows where they act in each row."""
    width = 8

    def adapter():
        return ((torch.zeros(2, 1, width), torch.ones(2, 1, width)),)

    one = person(PLACES["different regions"], adapter=adapter, adapter_weight=1.0)
    hooks = AdapterHooks(Residuals([one, person(PLACES["the second without the person"])]))
    hooks._keys_values = {0: adapter()}
    call = Call((True, True, False), (True, False), (0, 1, 1))
    hooks._size, queries = (size, size), torch.randn(3, size * size, width)
    added = hooks._attend(call, 0, queries, queries, 2)
    for row, image in enumerate(call.images):
        region = one.placements[image].region.sample(size, size).flatten()
        np.testing.assert_allclose(added[row, :, 0], region, atol=1e-5)


@pytest.fixture(scope="module")
def unet():
    return ldm_unet()


@pytest.fixture
def sd_unet(monkeypatch):
    module = ModuleType("modules.sd_unet")
    module.current_unet = None
    modules = ModuleType("modules")
    modules.sd_unet = module
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "modules.sd_unet", module)
    yield
    a1111.detach()


# the image of each conditional row, and the rows of each call
A1111_CALLS = {
    "joint": ([0, 1], [[0, 1, 2, 3]]),
    "one row at a time": ([0, 1], [[0], [1], [2], [3]]),
    "unconditional rows skipped": ([0, 1], [[0, 1]]),
    "A AND B in the first": ([0, 0, 1], [[0, 1, 2, 3, 4]]),
    "A AND B in the second": ([0, 1, 1], [[0, 1], [2], [3, 4]]),
    "A AND B in both": ([0, 0, 1, 1], [[0, 1, 2, 3], [4, 5]]),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("calls", A1111_CALLS)
@pytest.mark.usefixtures("sd_unet")
def test_a1111s_rows_are_told_apart(unet, calls, name):
    cond, groups = A1111_CALLS[calls]
    images = [*cond, 0, 1]
    x, timesteps, _, _ = inputs(2)
    _, _, context, y = inputs(len(images))
    x, timesteps = x[images], timesteps[[0] * len(images)]
    people = (person(PLACES[name]),)
    job = in_a1111.Job(unet)
    a1111.attach(job, people)
    in_a1111.announce(job, x, len(cond))
    results = {}
    for rows in groups:
        results.update(zip(rows, in_a1111.call(unet, x, timesteps, context, y, rows)))
    a1111.detach()
    for row, result in results.items():
        one = [part[row : row + 1] for part in (x, timesteps, context, y)]
        wanted = in_a1111.expected_output(unet, alone(people, images[row]), *one, 1)
        torch.testing.assert_close(result, wanted[0], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("calls", [name for name, (images, _) in in_forge.GROUPINGS.items() if images == 2])
@pytest.mark.parametrize("reforge", [False, True])
def test_forges_rows_are_told_apart(unet, calls, name, reforge):
    images, groups = in_forge.GROUPINGS[calls]
    rows = 1 + max(first + images - 1 for group in groups for _, first in group)
    is_cond = [True] * rows
    for group in groups:
        for side, first in group:
            is_cond[first : first + images] = [side == 0] * images
    x, _, context, y = inputs(rows)
    x = torch.cat([x[:images]] * (rows // images))  # the host's chunks are copies
    sigmas = torch.full((images,), 5.0)
    people = (person(PLACES[name]),)
    job = in_forge.make_job(unet, reforge)
    forge.attach(job, people)
    out = in_forge.sample_once(job, x, sigmas, context, y, groups)
    for row in range(rows):
        one = x[row : row + 1], sigmas[:1], context[row : row + 1], y[row : row + 1]
        wanted = in_forge.expected_output(unet, alone(people, row % images), *one, [is_cond[row]])
        torch.testing.assert_close(out[row], wanted[0], atol=2e-4, rtol=1e-3)
    forge.detach(job)


def prepared(seed, absent=False, **changes):
    landmarks = None if absent else tiny.landmarks(seed, 400, 200)
    conditioning = tiny.conditioning(network=NETWORK, landmarks=landmarks, **changes)
    return Prepared(conditioning, (), None, True, (), absent=absent)


def job(**values):
    comments = {}
    defaults = {"paste_to": None, "resize_mode": 0, "width": 512, "height": 512, "extra_generation_params": {}}
    return SimpleNamespace(
        **{**defaults, "comments": comments, "comment": lambda text: comments.update({text: 1}), **values}
    )


@pytest.mark.parametrize("resize_mode", [0, 1, 2])
def test_each_image_of_a_batch_has_its_own_window(resize_mode):
    first, second = prepared(1), prepared(2)
    sizes = ((400, 200), (200, 400))
    images = tuple(PreparedImage((one,), size) for one, size in zip((first, second), sizes))
    p = job(resize_mode=resize_mode)
    (placed,) = for_pass(p, PreparedBatch((first,), sizes[0], images=images))
    for i, (one, size) in enumerate(zip((first, second), sizes)):
        (single,) = for_pass(p, PreparedBatch((one,), size))
        np.testing.assert_allclose(placed.placements[i].landmarks.points, single.landmarks.points)


def test_people_who_are_in_no_image_are_left_out():
    absent, present = prepared(1, absent=True), prepared(2)
    assert for_pass(job(), PreparedBatch((absent, present), (400, 200))) == (present.conditioning,)
    images = (PreparedImage((absent, present), (400, 200)), PreparedImage((absent, absent), (400, 200)))
    (only,) = for_pass(job(), PreparedBatch(images[0].people, (400, 200), images=images))
    assert only.placements[0].landmarks is present.conditioning.landmarks
    assert only.placements[1] is None


class Engine:
    """Prepares landmarks from the brightness of the init image; dark images have no face."""

    def prepare(self, unit, width, height, init_image, progress, files_kept, part):
        bright = int(init_image.pixels[0, 0, 0])
        notes = ("left out",) if bright < 10 and part.tile else ()
        return replace(prepared(bright, absent=bool(notes)), notes=notes)


def grey(value, size=(64, 48)):
    return Image.new("RGB", size, (value,) * 3)


@pytest.mark.parametrize("values", [(50, 90), (50, 90, 130)])
def test_a_batch_of_init_images_is_prepared_image_by_image(values):
    p = job(init_images=[grey(value, (64 + value, 48)) for value in values])
    (batch,) = prepare(p, [{1: Unit()}], Engine(), lambda *parts: None)
    assert [image.init_size for image in batch.images] == [(64 + value, 48) for value in values]
    expected = [tiny.landmarks(value, 400, 200).points for value in values]
    for image, points in zip(batch.images, expected, strict=True):
        np.testing.assert_array_equal(image.people[0].conditioning.landmarks.points, points)
    assert batch.of_image(1) is batch.images[1]


def test_one_init_image_for_all_images_is_prepared_once():
    image = grey(50)
    for given in ([image], [image] * 4):
        p = job(init_images=given)
        (batch,) = prepare(p, [{1: Unit()}], Engine(), lambda *parts: None)
        assert batch.images == ()
        assert batch.init_size == (64, 48)
    assert init_images(job(init_images=None)) == init_images(job()) == []


def tile_of(p, **changes):
    """The job that a script derives from the user's job."""
    made = copy.copy(p)
    vars(made).update(changes)
    return made


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),  # X/Y/Z plot, loopback
        ({"init_images": [grey(1)]}, False),
        ({"init_images": [grey(0, (32, 32))]}, True),  # SD upscale
        ({"init_images": [grey(1, (96, 48))], "image_mask": grey(255, (96, 48))}, True),  # outpainting
        ({"image_mask": grey(255)}, True),  # Ultimate SD Upscale without enlargement
        ({"_ad_inner": True}, True),
    ],
)
def test_what_a_script_made_of_the_init_image_is_a_tile(changes, expected):
    p = job(init_images=[grey(1)], image_mask=None)
    assert not is_tile(tile_of(p, **changes)) or "_ad_inner" in changes  # no request has been recorded
    remember_request(p)
    assert is_tile(tile_of(p, **changes)) == expected
    assert not is_tile(job())


@pytest.mark.parametrize(
    ("title", "same_size", "other_size"),
    [
        ("SD upscale", True, True),  # takes the tiles' size from the job's, which is usually that of the init image
        ("Ultimate SD upscale", True, True),
        ("Loopback", False, False),  # its results have the job's size, and not always that of the init image
        ("X/Y/Z plot", False, True),
        (None, False, True),
    ],
)
def test_some_scripts_are_known_by_their_title(title, same_size, other_size):
    scripts = [SimpleNamespace(title=lambda: "Prompt matrix"), SimpleNamespace(title=lambda: title)]
    runner = SimpleNamespace(selectable_scripts=scripts)
    p = job(init_images=[grey(1)], image_mask=None, scripts=runner, script_args=(2 if title else 0, None, 64))
    remember_request(p)
    assert is_tile(tile_of(p, init_images=[grey(2)])) == same_size
    assert is_tile(tile_of(p, init_images=[grey(2, (32, 32))])) == other_size


def test_inpainting_and_the_tab_batch_are_the_users_own():
    p = job(init_images=[grey(1)], image_mask=grey(255))
    remember_request(p)
    assert not is_tile(p)
    p = job(init_images=[None], image_mask=None)
    remember_request(p)
    assert not is_tile(tile_of(p, init_images=[grey(1)]))


def test_a_tile_without_a_face_is_commented_once():
    p = job(init_images=[grey(50, (512, 512))], image_mask=None)
    remember_request(p)
    for tiles in ([grey(50), grey(5)], [grey(5)], [grey(5), grey(6)]):
        p.init_images = tiles
        (batch,) = prepare(p, [{1: Unit()}], Engine(), lambda *parts: None)
        absent = [one.people[0].absent for one in batch.images or (batch.of_image(0),)]
        assert absent == [tile.getpixel((0, 0))[0] < 10 for tile in tiles]
    assert list(p.comments) == ["FaceSnap: left out"]


@pytest.fixture(scope="module")
def two_people(stand_ins, group):
    """An engine, a tile that shows two neighbours of a group, their boxes in it, and a photo of each."""
    engine = RealEngine(lambda: find_models(stand_ins))
    first, second = sorted(engine.encoders().faces(group), key=lambda face: face.box[0])[1:3]
    left, top = np.minimum(first.box[:2], second.box[:2]).astype(int) - 20
    right, bottom = np.maximum(first.box[2:], second.box[2:]).astype(int) + 20
    tile = Image.fromarray(group.pixels[top:bottom, left:right])
    boxes = [one.box - np.tile([left, top], 2) for one in (first, second)]
    middle = int(boxes[0][2] + boxes[1][0]) // 2
    shown = [tile.crop((0, 0, middle, tile.height)), tile.crop((middle, 0, *tile.size))]
    return engine, tile, boxes, [from_pil(photo, f"photo {i}") for i, photo in enumerate(shown)]


def people_of_tile(engine, tile, photos, masked=None, **settings):
    p = job(init_images=[tile], image_mask=None, width=512, height=512, _ad_inner=True)
    if masked is not None:
        p.image_mask = Image.new("L", tile.size)
        p.image_mask.paste(255, tuple(int(edge) for edge in masked))
    units = {
        number: changed(make_unit(True, (photo,), model="random.safetensors"), **settings)
        for number, photo in enumerate(photos, 1)
    }
    (batch,) = prepare(p, [units], engine, lambda *parts: None)
    return batch.people


def shows(person, box):
    left, top, right, bottom = person.conditioning.landmarks.box
    return box[0] < (left + right) / 2 < box[2] and box[1] < (top + bottom) / 2 < box[3]


def test_each_face_of_a_tile_belongs_to_the_person_whom_it_resembles(two_people, astronaut):
    engine, tile, boxes, photos = two_people
    for order in ([0, 1], [1, 0]):
        chosen = people_of_tile(engine, tile, [photos[i] for i in order])
        assert all(shows(person, boxes[i]) for person, i in zip(chosen, order))
        for masked in (0, 1):  # as ADetailer does, one face after the other
            chosen = people_of_tile(engine, tile, [photos[i] for i in order], boxes[masked])
            assert [person.absent for person in chosen] == [i != masked for i in order]
            assert shows(chosen[order.index(masked)], boxes[masked])
    *both, stranger = people_of_tile(engine, tile, [*photos, astronaut])
    assert stranger.absent
    assert not any(person.absent for person in both)


def test_a_place_and_a_region_of_the_whole_image_do_not_move_the_face_of_a_tile(two_people):
    """A tile has no mask. A mask comes with the whole image, where they mean the same as in the first pass."""
    engine, tile, boxes, photos = two_people
    painted = Photo(np.full((8, 8, 3), 255, np.uint8), "mask")
    (person,) = people_of_tile(engine, tile, photos[:1], x=0.9, y=0.9, size=0.3, region="mask", mask=painted)
    assert any(shows(person, box) for box in boxes)
    assert isinstance(person.conditioning.region, RoundedBox)
    (person,) = people_of_tile(engine, tile, photos[:1], boxes[0], x=0.9, y=0.9)
    assert not shows(person, boxes[0])


@pytest.mark.parametrize("inverted", [0, 1])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_the_mask_is_read_as_the_host_reads_it(mode, inverted):
    painted = Image.new("L", (8, 4))
    painted.paste(255, (0, 0, 4, 4))
    if mode == "RGBA":
        image = Image.new("RGBA", (8, 4), (9, 9, 9, 0))
        image.putalpha(painted)
    else:
        image = painted.convert(mode)
    part = init_part(job(init_images=[grey(1)], image_mask=image, inpainting_mask_invert=inverted))
    assert part.mask[0].tolist() == ([0] * 4 + [1] * 4 if inverted else [1] * 4 + [0] * 4)
    assert init_part(job(init_images=[grey(1)])).mask is None
