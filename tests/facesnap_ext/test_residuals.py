"""Residuals for whatever rows a host sends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from facesnap_ext import conditioning as guidance_module
from facesnap_ext.conditioning import Guidance, Residuals, landmark_picture, networks
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.regions import Drawn
from tests.support import tiny

NETWORK = tiny.ffrnet()


@torch.no_grad()
def alone(guidance: Guidance, x, timestep, y=None):
    features = guidance.ffrnet.embed_landmarks(landmark_picture(guidance.landmarks, 8 * x.shape[3], 8 * x.shape[2]))
    return [
        guidance.weight * r
        for r in guidance.ffrnet(x, timestep, guidance.ffrnet.embed_tokens(guidance.tokens), features, y)
    ]


@settings(max_examples=15, deadline=None)
@given(
    images=st.integers(1, 3),
    data=st.data(),
    cond_only=st.booleans(),
    text_free=st.booleans(),
)
def test_each_row_gets_what_it_would_get_alone(images, data, cond_only, text_free):
    """Rows in any order, repeated at will, in any number of calls, over two steps."""
    guidance = tiny.guidance(network=NETWORK, cond_only=cond_only, text_free=text_free, weight=0.6)
    residuals = Residuals((guidance,))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for _step in range(2):
        latents = torch.randn(images, 4, 8, 8, generator=g)
        timesteps = torch.randint(0, 1000, (images,), generator=g).float()
        for _call in range(data.draw(st.integers(1, 3))):
            rows = data.draw(st.lists(st.integers(0, images - 1), min_size=1, max_size=5))
            sides = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
            y = torch.randn(len(rows), tiny.ADM, generator=g)
            got = residuals.rows(latents[rows], timesteps[rows], sides, y)
            for i, (row, is_cond) in enumerate(zip(rows, sides)):
                own_y = None if text_free else y[i : i + 1]
                wanted = alone(guidance, latents[row : row + 1], timesteps[row : row + 1], own_y)
                for residual, expected in zip(got, wanted):
                    mine = residual.expand(len(rows), -1, -1, -1)[i : i + 1]
                    if cond_only and not is_cond:
                        assert (mine == 0).all()
                    else:
                        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


def test_weights_trained_with_text_refuse_to_run_without_it():
    with pytest.raises(ValueError, match="trained with text"):
        Residuals((tiny.guidance(network=NETWORK, text_free=False),)).rows(
            torch.randn(1, 4, 8, 8), torch.tensor([1.0]), [True]
        )


def test_landmarks_are_embedded_once_a_size(monkeypatch):
    sizes = []
    embed = NETWORK.embed_landmarks
    monkeypatch.setattr(NETWORK, "embed_landmarks", lambda picture: sizes.append(picture.shape[2:]) or embed(picture))
    residuals = Residuals((tiny.guidance(network=NETWORK),))
    for step in range(3):
        for size in ((8, 8), (12, 8)):
            residuals.rows(torch.randn(1, 4, *size), torch.tensor([float(step)]), [True])
    assert sizes == [(64, 64), (96, 64)]


def test_tokens_are_embedded_once_a_pass_and_each_side_gets_its_own(monkeypatch):
    guidance = tiny.guidance(network=NETWORK)
    guidance = replace(guidance, uncond_tokens=2 * guidance.tokens)
    embedded = []
    embed = NETWORK.embed_tokens
    monkeypatch.setattr(NETWORK, "embed_tokens", lambda tokens: embedded.append(len(tokens)) or embed(tokens))
    residuals = Residuals((guidance,))
    x, t = inputs()
    both, sides = (x[[0, 0]], t[[0, 0]]), ([True, False], [False, True])
    got = [residuals.rows(both[0] + step, both[1] + step, sides[step]) for step in range(2)]
    assert embedded == [2]
    for step, parts in enumerate(got):
        for row, is_cond in enumerate(sides[step]):
            tokens = guidance.tokens if is_cond else guidance.uncond_tokens
            wanted = alone(replace(guidance, tokens=tokens), x + step, t + step)
            for one, other in zip(parts, wanted):
                torch.testing.assert_close(one[row : row + 1], other, atol=1e-4, rtol=1e-4)


def test_it_computes_in_its_own_type_inside_a_hosts_autocast():
    residuals = Residuals((tiny.guidance(network=NETWORK),))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5.0])
    plain = residuals.rows(x, t, [True])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Residuals((tiny.guidance(network=NETWORK),)).rows(x, t, [True])
    assert all(torch.equal(a, b) for a, b in zip(plain, inside))


@pytest.mark.parametrize(
    ("start", "end", "acts"), [(0, 1, "1111"), (0.5, 1, "0011"), (0, 0.5, "1100"), (0.5, 0.5, "0000")]
)
def test_the_window(start, end, acts):
    guidance = tiny.guidance(network=NETWORK, start=start, end=end)
    assert "".join(str(int(guidance.acts_at(step / 4))) for step in range(4)) == acts


def test_devices_that_know_no_autocast_need_none(monkeypatch):
    """PyTorch before 2.5 on a Mac, and DirectML, refuse even to switch it off."""

    def refuse(device_type, **options):
        raise RuntimeError(f"User specified an unsupported autocast device_type {device_type!r}")

    monkeypatch.setattr(torch, "autocast", refuse)
    for device_type in ("mps", "privateuseone"):
        with guidance_module._own_type(device_type):
            pass


def test_rows_that_are_no_numbers_are_run_as_the_host_runs_them():
    """And then the host says that the checkpoint made them."""
    x = torch.full((2, 4, 8, 8), float("nan"))
    residuals = Residuals((tiny.guidance(network=NETWORK),)).rows(x, torch.tensor([5.0, 5.0]), [True, False])
    assert all(residual.isnan().any() for residual in residuals)


def test_no_landmarks_are_a_black_drawing():
    black = landmark_picture(None, 64, 48)
    assert black.shape == (1, 3, 48, 64)
    assert (black == 0).all()
    drawn = landmark_picture(tiny.landmarks(), 64, 64)
    assert 0 < drawn.max() <= 1


OTHER = tiny.ffrnet(seed=7)
LEFT = np.zeros((16, 16), np.float32)
LEFT[:, :8] = 1


def of_one(guidance: Guidance, x, timestep, y=None):
    return Residuals((replace(guidance, region=None),)).rows(x, timestep, [True] * len(x), y)


def inputs(rows=1, seed=0):
    """Latents, and the timestep that all rows of an evaluation have in common."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, 8, 8, generator=g), torch.randint(0, 1000, (1,), generator=g).float().expand(rows)


def two(**changes):
    """Two people of two weight files, on the left and on the right."""
    return (
        tiny.guidance(1, NETWORK, region=Drawn(LEFT), weight=0.8, **changes),
        tiny.guidance(2, OTHER, region=Drawn(1 - LEFT), weight=1.3, **changes),
    )


def test_two_people_side_by_side_each_have_their_half_bit_for_bit():
    x, t = inputs(2)
    guidances = two()
    for got, left, right in zip(Residuals(guidances).rows(x, t, [True, False]), *(of_one(g, x, t) for g in guidances)):
        middle = got.shape[3] // 2
        assert torch.equal(got[..., :middle], left[..., :middle])
        assert torch.equal(got[..., middle:], right[..., middle:])


def test_two_people_in_one_place_are_half_and_half_and_outside_is_nothing():
    x, t = inputs()
    a, b = (replace(guidance, region=Drawn(LEFT)) for guidance in two())
    for got, first, second in zip(Residuals((a, b)).rows(x, t, [True]), of_one(a, x, t), of_one(b, x, t)):
        middle = got.shape[3] // 2
        torch.testing.assert_close(got[..., :middle], ((first + second) / 2)[..., :middle])
        assert (got[..., middle:] == 0).all()


def test_one_without_a_region_is_the_ground_of_the_others():
    x, t = inputs()
    a, b = two()
    ground = replace(b, region=None)
    for got, first, second in zip(Residuals((ground, a)).rows(x, t, [True]), of_one(a, x, t), of_one(b, x, t)):
        middle = got.shape[3] // 2
        assert torch.equal(got[..., :middle], first[..., :middle])
        assert torch.equal(got[..., middle:], second[..., middle:])


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(3)), seeds=st.lists(st.integers(0, 9), min_size=2, max_size=2), cond=st.booleans())
def test_the_order_of_people_does_not_matter(order, seeds, cond):
    x, t = inputs()
    regions = [Drawn(np.random.default_rng(s).uniform(0, 1, (5, 3)).astype(np.float32)) for s in seeds]
    people = [
        tiny.guidance(i, network, region=region, cond_only=i == 1)
        for i, (network, region) in enumerate(zip((NETWORK, OTHER, NETWORK), (*regions, None)))
    ]
    one = Residuals(people).rows(x, t, [cond])
    other = Residuals([people[i] for i in order]).rows(x, t, [cond])
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_who_does_not_act_leaves_their_place_to_the_others():
    x, t = inputs()
    a, b = (replace(guidance, region=Drawn(LEFT)) for guidance in two())
    residuals = Residuals((a, b))
    half = residuals.rows(x, t, [True], acting=[True, True])
    alone_now = residuals.rows(x, t, [True], acting=[False, True])
    assert not torch.equal(half[0], alone_now[0])
    for got, wanted in zip(alone_now, Residuals((b,)).rows(x, t, [True])):
        assert torch.equal(got, wanted)
    assert residuals.rows(x, t, [True], acting=[False, False]) is None


def test_one_person_may_be_absent_from_the_unconditional_side():
    x, t = inputs()
    a, b = two()
    a = replace(a, cond_only=True)
    both = x[[0, 0]], t[[0, 0]]
    for got, first, second in zip(Residuals((a, b)).rows(*both, [False, True]), of_one(a, x, t), of_one(b, x, t)):
        middle = got.shape[3] // 2
        assert (got[0, ..., :middle] == 0).all()  # and nobody takes their place there
        assert torch.equal(got[1, ..., :middle], first[0, ..., :middle])
        assert torch.equal(got[:, ..., middle:], second[..., middle:].expand(2, -1, -1, -1))


def test_only_who_was_trained_with_text_gets_it():
    x, t = inputs()
    a, b = two()
    b = replace(b, text_free=False)
    y = torch.randn(1, tiny.ADM, generator=torch.Generator().manual_seed(1))
    for got, first, second in zip(Residuals((a, b)).rows(x, t, [True], y), of_one(a, x, t), of_one(b, x, t, y)):
        middle = got.shape[3] // 2
        assert torch.equal(got[..., :middle], first[..., :middle])
        assert torch.equal(got[..., middle:], second[..., middle:])


def test_ffrnet_runs_once_a_person_and_image_however_rows_come(monkeypatch):
    runs = []
    forward = type(NETWORK).forward
    monkeypatch.setattr(
        type(NETWORK), "forward", lambda self, x, *rest: runs.append((self, len(x))) or forward(self, x, *rest)
    )
    a, b = two()
    c = replace(a, landmarks=None)
    residuals = Residuals((a, b, c))
    x, t = inputs(2)
    for step in range(2):
        for call in ([0, 1], [1, 0], [0]):
            residuals.rows(x[call] + step, t[call] + step, [True] * len(call))
    assert runs == [(NETWORK, 2), (OTHER, 2), (NETWORK, 2)] * 2
    assert networks((a, b, c)) == [NETWORK, OTHER]


def test_without_regions_and_blocks_no_bit_differs_from_the_networks_own():
    x, t = inputs()
    guidance = tiny.guidance(network=NETWORK, weight=1.0)
    with torch.no_grad():
        wanted = alone(guidance, x, t)
    for changes in ({}, {"blocks": (1,) * 10}, {"region": Drawn(np.ones((1, 1), np.float32))}):
        got = Residuals((replace(guidance, **changes),)).rows(x, t, [True])
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))


@settings(max_examples=10, deadline=None)
@given(blocks=st.lists(st.floats(0, 2), min_size=10, max_size=10))
def test_each_residual_is_scaled_by_its_own_block(blocks):
    x, t = inputs()
    guidance = tiny.guidance(network=NETWORK, weight=0.5)
    plain = Residuals((guidance,)).rows(x, t, [True])
    got = Residuals((replace(guidance, blocks=tuple(blocks)),)).rows(x, t, [True])
    for residual, block, whole in zip(got, blocks, plain):
        torch.testing.assert_close(residual, block * whole)
        if block == 0:
            assert (residual == 0).all()


def test_as_many_block_weights_as_residuals():
    with pytest.raises(FaceSnapError, match="10 residuals and there are 3 block weights"):
        tiny.guidance(network=NETWORK, blocks=(1, 1, 1))


@pytest.mark.parametrize(("hires", "acts"), [("both", "11"), ("first", "10"), ("second", "01")])
def test_the_pass(hires, acts):
    guidance = tiny.guidance(network=NETWORK, hires=hires)
    assert "".join(str(int(guidance.acts_in(second))) for second in (False, True)) == acts


@pytest.fixture
def runs(monkeypatch):
    """How many rows FFRNet was given, run by run."""
    seen = []
    forward = type(NETWORK).forward
    monkeypatch.setattr(type(NETWORK), "forward", lambda self, x, *rest: seen.append(len(x)) or forward(self, x, *rest))
    return seen


def test_rows_that_come_one_by_one_are_run_once_each(runs):
    """As with prompts of different length in a host that splits batches: each side of each image by itself."""
    residuals = Residuals((tiny.guidance(network=NETWORK),))
    x, t = inputs(2)
    for row in (0, 1, 0, 1):
        residuals.rows(x[[row]], t[:1], [True])
    assert runs == [1, 1]


def test_tiles_of_a_picture_are_not_kept_without_end(runs):
    residuals = Residuals((tiny.guidance(network=NETWORK),))
    x, t = inputs(guidance_module.ROWS_KEPT + 1)
    for row in range(len(x)):
        residuals.rows(x[[row]], t[:1], [True])
    kept = residuals._people[0]._now
    assert len(kept.labels) == len(kept.outputs[0]) == 1
    got = residuals.rows(x[[-1, 0]], t[:2], [True, True])
    for row, i in enumerate((-1, 0)):
        wanted = alone(residuals.guidances[0], x[[i]], t[:1])
        for residual, other in zip(got, wanted):
            torch.testing.assert_close(residual[row : row + 1], other, atol=1e-4, rtol=1e-4)


def test_a_batch_of_any_size_is_run_once_for_both_sides(runs):
    """Also where a host sends the sides one after the other."""
    residuals = Residuals((tiny.guidance(network=NETWORK),))
    x, t = inputs(guidance_module.ROWS_KEPT + 4)
    for side in (True, False):
        residuals.rows(x, t, [side] * len(x))
    assert runs == [len(x)]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_so_many_evaluations_ffrnet_runs_and_between_its_residuals_stay(runs, every):
    guidance = tiny.guidance(network=NETWORK, every=every)
    residuals = Residuals((guidance,))
    x, t = inputs(2)
    for step in range(7):
        got = residuals.rows(x + step, t - step, [True, True])
        if step % every == 0:
            assert len(runs) == step // every + 1
            ran = got
            fresh = Residuals((replace(guidance, every=1),)).rows(x + step, t - step, [True, True])
            runs.pop()
            assert all(torch.equal(a, b) for a, b in zip(got, fresh))
        assert all(torch.equal(a, b) for a, b in zip(got, ran))


@settings(max_examples=20, deadline=None)
@given(data=st.data(), images=st.integers(1, 3), sides_differ=st.booleans())
def test_between_runs_each_image_keeps_its_own_residuals_however_rows_come(data, images, sides_differ):
    """Calls may be grouped anew, and unconditional rows left out, in each evaluation: hosts keep the order of images
    within a side. Rows may be run again, and never get another image's or another side's."""
    guidance = tiny.guidance(network=NETWORK, every=2)
    if sides_differ:
        guidance = replace(guidance, uncond_tokens=2 * guidance.tokens)
    residuals = Residuals((guidance,))
    x, t = inputs(images)
    rows = [(side, image) for side in (True, False) for image in range(images)]

    def evaluate(step):
        got = {}
        order = data.draw(st.sampled_from([rows, rows[images:] + rows[:images], rows[:images]]))
        cuts = sorted(data.draw(st.sets(st.integers(1, len(order) - 1)))) if len(order) > 1 else []
        for start, end in zip([0, *cuts], [*cuts, len(order)]):
            call = order[start:end]
            chosen = [image for _, image in call]
            parts = residuals.rows(x[chosen] + step, (t[:1] - step).expand(len(call)), [side for side, _ in call])
            for i, row in enumerate(call):
                got[row] = parts[-1].expand(len(call), -1, -1, -1)[i]
        return got

    def wanted(row, step):
        side, image = row
        tokens = guidance.uncond_tokens if sides_differ and not side else guidance.tokens
        return alone(replace(guidance, tokens=tokens), x[[image]] + step, t[:1] - step)[-1][0]

    first, second = evaluate(0), evaluate(1)
    for row, residual in first.items():
        torch.testing.assert_close(residual, wanted(row, 0), atol=1e-4, rtol=1e-4)
    for row, residual in second.items():
        candidates = [wanted(row, step) for step in (0, 1)]
        assert any(torch.allclose(residual, one, atol=1e-4, rtol=1e-4) for one in candidates)
