"""FFRNet's residuals for any combination of rows that a host sends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from facesnap_ext import residuals as residuals_module
from facesnap_ext.conditioning import Conditioning, Placement, ffrnets
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.networks import unet_rows
from facesnap_ext.regions import PaintedRegion
from facesnap_ext.residuals import Residuals, landmark_image
from facesnap_ext.settings.script_args import from_script_args
from tests.support import tiny
from tests.support.units import changed

NETWORK = tiny.ffrnet()


@torch.no_grad()
def alone(conditioning: Conditioning, x, timestep, y=None):
    features = conditioning.ffrnet.embed_landmarks(
        landmark_image(conditioning.landmarks, 8 * x.shape[3], 8 * x.shape[2])
    )
    return [
        conditioning.strength.weight * r
        for r in conditioning.ffrnet(x, timestep, conditioning.ffrnet.embed_tokens(conditioning.tokens), features, y)
    ]


@settings(max_examples=15, deadline=None)
@given(
    images=st.integers(1, 3),
    data=st.data(),
    cond_only=st.booleans(),
    text_free=st.booleans(),
)
def test_each_row_gets_the_residuals_it_would_get_alone(images, data, cond_only, text_free):
    """Rows come in any order, possibly repeated, in any number of calls, over two steps."""
    conditioning = tiny.conditioning(network=NETWORK, cond_only=cond_only, text_free=text_free, weight=0.6)
    residuals = Residuals((conditioning,))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for _step in range(2):
        latents = torch.randn(images, 4, 8, 8, generator=g)
        timesteps = torch.randint(0, 1000, (images,), generator=g).float()
        for _call in range(data.draw(st.integers(1, 3))):
            rows = data.draw(st.lists(st.integers(0, images - 1), min_size=1, max_size=5))
            sides = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
            y = torch.randn(len(rows), tiny.ADM, generator=g)
            got = residuals.rows(latents[rows], timesteps[rows], sides, y)
            assert (got is None) == (cond_only and not any(sides))
            got = got or [torch.zeros(1, 1, 1, 1)] * 10
            for i, (row, is_cond) in enumerate(zip(rows, sides)):
                own_y = None if text_free else y[i : i + 1]
                reference = alone(conditioning, latents[row : row + 1], timesteps[row : row + 1], own_y)
                for residual, expected in zip(got, reference):
                    actual = residual.expand(len(rows), -1, -1, -1)[i : i + 1]
                    if cond_only and not is_cond:
                        assert (actual == 0).all()
                    else:
                        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_weights_trained_with_text_refuse_to_run_without_it():
    with pytest.raises(ValueError, match="trained with text"):
        Residuals((tiny.conditioning(network=NETWORK, text_free=False),)).rows(
            torch.randn(1, 4, 8, 8), torch.tensor([1.0]), [True]
        )


def test_landmarks_are_embedded_once_per_size(monkeypatch):
    sizes = []
    embed = NETWORK.embed_landmarks
    monkeypatch.setattr(NETWORK, "embed_landmarks", lambda picture: sizes.append(picture.shape[2:]) or embed(picture))
    residuals = Residuals((tiny.conditioning(network=NETWORK),))
    for step in range(3):
        for size in ((8, 8), (12, 8)):
            residuals.rows(torch.randn(1, 4, *size), torch.tensor([float(step)]), [True])
    assert sizes == [(64, 64), (96, 64)]


def test_tokens_are_embedded_once_per_pass_and_each_side_gets_its_own(monkeypatch):
    conditioning = tiny.conditioning(network=NETWORK)
    conditioning = replace(conditioning, uncond_tokens=2 * conditioning.tokens)
    embedded = []
    embed = NETWORK.embed_tokens
    monkeypatch.setattr(NETWORK, "embed_tokens", lambda tokens: embedded.append(len(tokens)) or embed(tokens))
    residuals = Residuals((conditioning,))
    x, t = inputs()
    both, sides = (x[[0, 0]], t[[0, 0]]), ([True, False], [False, True])
    got = [residuals.rows(both[0] + step, both[1] + step, sides[step]) for step in range(2)]
    assert embedded == [2]
    for step, parts in enumerate(got):
        for row, is_cond in enumerate(sides[step]):
            tokens = conditioning.tokens if is_cond else conditioning.uncond_tokens
            reference = alone(replace(conditioning, tokens=tokens), x + step, t + step)
            for one, other in zip(parts, reference):
                torch.testing.assert_close(one[row : row + 1], other, atol=1e-4, rtol=1e-4)


def test_it_computes_in_its_own_dtype_inside_autocast():
    residuals = Residuals((tiny.conditioning(network=NETWORK),))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5.0])
    plain = residuals.rows(x, t, [True])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Residuals((tiny.conditioning(network=NETWORK),)).rows(x, t, [True])
    assert all(torch.equal(a, b) for a, b in zip(plain, inside))


@pytest.mark.parametrize(
    ("start", "end", "acts"), [(0, 1, "1111"), (0.5, 1, "0011"), (0, 0.5, "1100"), (0.5, 0.5, "0000")]
)
def test_it_acts_from_start_to_end(start, end, acts):
    conditioning = tiny.conditioning(network=NETWORK, start=start, end=end)
    assert "".join(str(int(conditioning.strength.acts_at(step / 4))) for step in range(4)) == acts


def test_devices_without_autocast_are_supported(monkeypatch):
    """PyTorch before 2.5 on a Mac, and DirectML, raise an error even when autocast is disabled."""

    def refuse(device_type, **options):
        raise RuntimeError(f"User specified an unsupported autocast device_type {device_type!r}")

    monkeypatch.setattr(torch, "autocast", refuse)
    for device_type in ("mps", "privateuseone"):
        with residuals_module._without_autocast(device_type):
            pass


def test_rows_of_nan_are_processed_like_any_others():
    """The host then detects the NaNs and blames the checkpoint."""
    x = torch.full((2, 4, 8, 8), float("nan"))
    residuals = Residuals((tiny.conditioning(network=NETWORK),)).rows(x, torch.tensor([5.0, 5.0]), [True, False])
    assert all(residual.isnan().any() for residual in residuals)


def test_without_landmarks_the_landmark_image_is_black():
    black = landmark_image(None, 64, 48)
    assert black.shape == (1, 3, 48, 64)
    assert (black == 0).all()
    drawn = landmark_image(tiny.landmarks(), 64, 64)
    assert 0 < drawn.max() <= 1


OTHER = tiny.ffrnet(seed=7)
LEFT = np.zeros((16, 16), np.float32)
LEFT[:, :8] = 1


def of_one(conditioning: Conditioning, x, timestep, y=None):
    return Residuals((replace(conditioning, region=None),)).rows(x, timestep, [True] * len(x), y)


def inputs(rows=1, seed=0):
    """The latents, and the timestep that all rows of an evaluation share."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, 8, 8, generator=g), torch.randint(0, 1000, (1,), generator=g).float().expand(rows)


def two(**changes):
    """Two people with different weight files, on the left and on the right."""
    return (
        tiny.conditioning(1, NETWORK, region=PaintedRegion(LEFT), weight=0.8, **changes),
        tiny.conditioning(2, OTHER, region=PaintedRegion(1 - LEFT), weight=1.3, **changes),
    )


def test_two_people_side_by_side_are_bit_identical_in_their_halves():
    x, t = inputs(2)
    conditionings = two()
    for got, left, right in zip(
        Residuals(conditionings).rows(x, t, [True, False]), *(of_one(g, x, t) for g in conditionings)
    ):
        middle = got.shape[3] // 2
        assert torch.equal(got[..., :middle], left[..., :middle])
        assert torch.equal(got[..., middle:], right[..., middle:])


def test_two_people_in_one_place_are_averaged_there_and_zero_elsewhere():
    x, t = inputs()
    a, b = (replace(conditioning, region=PaintedRegion(LEFT)) for conditioning in two())
    for got, first, second in zip(Residuals((a, b)).rows(x, t, [True]), of_one(a, x, t), of_one(b, x, t)):
        middle = got.shape[3] // 2
        torch.testing.assert_close(got[..., :middle], ((first + second) / 2)[..., :middle])
        assert (got[..., middle:] == 0).all()


def test_a_person_without_a_region_fills_the_rest():
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
    regions = [PaintedRegion(np.random.default_rng(s).uniform(0, 1, (5, 3)).astype(np.float32)) for s in seeds]
    people = [
        tiny.conditioning(i, network, region=region, cond_only=i == 1)
        for i, (network, region) in enumerate(zip((NETWORK, OTHER, NETWORK), (*regions, None)))
    ]
    one = Residuals(people).rows(x, t, [cond])
    other = Residuals([people[i] for i in order]).rows(x, t, [cond])
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_an_inactive_person_leaves_their_place_to_the_others():
    x, t = inputs()
    a, b = (replace(conditioning, region=PaintedRegion(LEFT)) for conditioning in two())
    residuals = Residuals((a, b))
    half = residuals.rows(x, t, [True], acting=[True, True])
    alone_now = residuals.rows(x, t, [True], acting=[False, True])
    assert not torch.equal(half[0], alone_now[0])
    for got, reference in zip(alone_now, Residuals((b,)).rows(x, t, [True])):
        assert torch.equal(got, reference)
    assert residuals.rows(x, t, [True], acting=[False, False]) is None


def test_one_person_can_be_left_out_of_the_unconditional_side():
    x, t = inputs()
    a, b = two()
    a = changed(a, cond_only=True)
    both = x[[0, 0]], t[[0, 0]]
    for got, first, second in zip(Residuals((a, b)).rows(*both, [False, True]), of_one(a, x, t), of_one(b, x, t)):
        middle = got.shape[3] // 2
        assert (got[0, ..., :middle] == 0).all()  # no one takes this person's place
        assert torch.equal(got[1, ..., :middle], first[0, ..., :middle])
        assert torch.equal(got[:, ..., middle:], second[..., middle:].expand(2, -1, -1, -1))


def test_only_weights_trained_with_text_receive_it():
    x, t = inputs()
    a, b = two()
    b = replace(b, text_free=False)
    y = torch.randn(1, tiny.ADM, generator=torch.Generator().manual_seed(1))
    for got, first, second in zip(Residuals((a, b)).rows(x, t, [True], y), of_one(a, x, t), of_one(b, x, t, y)):
        middle = got.shape[3] // 2
        assert torch.equal(got[..., :middle], first[..., :middle])
        assert torch.equal(got[..., middle:], second[..., middle:])


def test_ffrnet_runs_once_per_person_and_image_however_rows_are_grouped(monkeypatch):
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
    assert ffrnets((a, b, c)) == [NETWORK, OTHER]


def test_without_regions_and_block_weights_residuals_are_bit_identical_to_ffrnets():
    x, t = inputs()
    conditioning = tiny.conditioning(network=NETWORK, weight=1.0)
    with torch.no_grad():
        reference = alone(conditioning, x, t)
    for changes in ({}, {"block_weights": (1,) * 10}, {"region": PaintedRegion(np.ones((1, 1), np.float32))}):
        got = Residuals((changed(conditioning, **changes),)).rows(x, t, [True])
        assert all(torch.equal(a, b) for a, b in zip(got, reference))


@settings(max_examples=10, deadline=None)
@given(block_weights=st.lists(st.floats(0, 2), min_size=10, max_size=10))
def test_each_residual_is_scaled_by_its_block_weight(block_weights):
    x, t = inputs()
    conditioning = tiny.conditioning(network=NETWORK, weight=0.5)
    plain = Residuals((conditioning,)).rows(x, t, [True])
    got = Residuals((changed(conditioning, block_weights=tuple(block_weights)),)).rows(x, t, [True])
    for residual, block, whole in zip(got, block_weights, plain):
        torch.testing.assert_close(residual, block * whole)
        if block == 0:
            assert (residual == 0).all()


def test_the_number_of_block_weights_must_match_the_residuals():
    for wrong in (3, 7, 11):
        with pytest.raises(FaceSnapError, match=f"10 residuals, but the number of block weights is {wrong}; enter 10"):
            tiny.conditioning(network=NETWORK, block_weights=(1,) * wrong)
    tiny.conditioning(network=NETWORK, block_weights=(1,) * 10)


@pytest.mark.parametrize("count", [4, 7, 13])
def test_block_weights_fit_a_file_with_any_number_of_residuals(count):
    """From the request to the residuals, each residual is scaled by its own weight."""
    network = tiny.ffrnet(**of_residuals(count))
    weights = [round(0.1 * (i + 1), 1) for i in range(count)]
    (unit,) = from_script_args([{"references": [], "block_weights": weights}]).values()
    x, timesteps = torch.randn(1, 4, 16, 16), torch.tensor([500.0])
    plain = Residuals([tiny.conditioning(network=network)]).rows(x, timesteps, [True])
    scaled = Residuals([replace(tiny.conditioning(network=network), strength=unit.strength)]).rows(x, timesteps, [True])
    assert len(plain) == count
    for weight, before, after in zip(weights, plain, scaled):
        torch.testing.assert_close(after, before * weight)
    with pytest.raises(FaceSnapError, match=f"has {count} residuals, but the number of block weights is 10"):
        tiny.conditioning(network=network, block_weights=(1,) * 10)


def of_residuals(count):
    """Changes to `tiny.config` for a network with this number of residuals: 1, 3 for each level, and 1 for the middle
    block."""
    levels = (count - 1) // 3
    widths = (32, 64, 96, 96)[:levels]
    return {
        "widths": widths,
        "depths": ((0, 0),) * levels,
        "heads": (2, 4, 6, 6)[:levels],
    }


@pytest.mark.parametrize(("hires", "acts"), [("both", "11"), ("first", "10"), ("second", "01")])
def test_it_acts_in_the_passes_that_hires_names(hires, acts):
    conditioning = tiny.conditioning(network=NETWORK, hires=hires)
    assert "".join(str(int(conditioning.strength.acts_in(second))) for second in (False, True)) == acts


@pytest.fixture
def runs(monkeypatch):
    """The number of rows in each run of FFRNet."""
    seen = []
    forward = type(NETWORK).forward
    monkeypatch.setattr(type(NETWORK), "forward", lambda self, x, *rest: seen.append(len(x)) or forward(self, x, *rest))
    return seen


def test_rows_that_arrive_one_by_one_run_once_each(runs):
    """Some hosts split batches with prompts of different lengths into single rows."""
    residuals = Residuals((tiny.conditioning(network=NETWORK),))
    x, t = inputs(2)
    for row in (0, 1, 0, 1):
        residuals.rows(x[[row]], t[:1], [True])
    assert runs == [1, 1]


def test_residuals_of_tiles_are_kept_only_up_to_a_limit(runs):
    residuals = Residuals((tiny.conditioning(network=NETWORK),))
    x, t = inputs(unet_rows.MAX_ROWS + 1)
    for row in range(len(x)):
        residuals.rows(x[[row]], t[:1], [True])
    kept = residuals._runners[0]._current
    assert len(kept.labels) == len(kept.outputs[0]) == 1
    got = residuals.rows(x[[-1, 0]], t[:2], [True, True])
    for row, i in enumerate((-1, 0)):
        reference = alone(residuals.people[0], x[[i]], t[:1])
        for residual, other in zip(got, reference):
            torch.testing.assert_close(residual[row : row + 1], other, atol=1e-4, rtol=1e-4)


def test_a_batch_of_any_size_runs_once_for_both_sides(runs):
    """This includes hosts that send conditional and unconditional rows one after the other."""
    residuals = Residuals((tiny.conditioning(network=NETWORK),))
    x, t = inputs(unet_rows.MAX_ROWS + 4)
    for side in (True, False):
        residuals.rows(x, t, [side] * len(x))
    assert runs == [len(x)]


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_ffrnet_runs_in_every_nth_evaluation_and_its_residuals_are_reused(runs, interval):
    conditioning = tiny.conditioning(network=NETWORK, ffrnet_interval=interval)
    residuals = Residuals((conditioning,))
    x, t = inputs(2)
    for step in range(7):
        got = residuals.rows(x + step, t - step, [True, True])
        if step % interval == 0:
            assert len(runs) == step // interval + 1
            ran = got
            fresh = Residuals((changed(conditioning, ffrnet_interval=1),)).rows(x + step, t - step, [True, True])
            runs.pop()
            assert all(torch.equal(a, b) for a, b in zip(got, fresh))
        assert all(torch.equal(a, b) for a, b in zip(got, ran))


@settings(max_examples=20, deadline=None)
@given(data=st.data(), images=st.integers(1, 3), sides_differ=st.booleans())
def test_between_runs_each_image_keeps_its_residuals_however_rows_are_grouped(data, images, sides_differ):
    """In each evaluation, rows may be grouped differently and unconditional rows may be missing, but hosts keep the
    order of images among the conditional and among the unconditional rows. Rows may be run again, but never get the
    residuals of a different image or of the other kind of row."""
    conditioning = tiny.conditioning(network=NETWORK, ffrnet_interval=2)
    if sides_differ:
        conditioning = replace(conditioning, uncond_tokens=2 * conditioning.tokens)
    residuals = Residuals((conditioning,))
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

    def reference(row, step):
        side, image = row
        tokens = conditioning.uncond_tokens if sides_differ and not side else conditioning.tokens
        return alone(replace(conditioning, tokens=tokens), x[[image]] + step, t[:1] - step)[-1][0]

    first, second = evaluate(0), evaluate(1)
    for row, residual in first.items():
        torch.testing.assert_close(residual, reference(row, 0), atol=1e-4, rtol=1e-4)
    for row, residual in second.items():
        candidates = [reference(row, step) for step in (0, 1)]
        assert any(torch.allclose(residual, one, atol=1e-4, rtol=1e-4) for one in candidates)


NOWHERE = PaintedRegion(np.float32([[1, 0]]), window=(0.75, 0.0, 0.2, 1.0))  # hires fix has cut off the person's half
HERE = Placement(tiny.landmarks(), None)


@pytest.mark.parametrize(
    ("changes", "run"),
    [
        ({"cond_only": True}, [0, 1]),
        ({"cond_only": True, "text_free": False}, [0, 1]),
        ({"text_free": False}, [0, 1, 2, 3]),
        ({"placements": (None, HERE)}, [1]),
        ({"placements": (None, HERE), "text_free": False}, [1, 3]),
        ({"placements": (HERE, replace(HERE, region=NOWHERE)), "cond_only": True}, [0]),
        ({"region": NOWHERE}, []),
        ({"placements": (None, None)}, []),
    ],
    ids=str,
)
@pytest.mark.parametrize("announced", [True, False], ids=["announced", "by value"])
def test_ffrnet_runs_only_for_rows_with_the_person(runs, announced, changes, run):
    """In the other rows, the residuals are zero. Those that remain are the same to the bit as in a call without the
    other rows."""
    conditioning = tiny.conditioning(network=NETWORK, **changes)
    x, timesteps = inputs(2)
    y = torch.randn(4, tiny.ADM, generator=torch.Generator().manual_seed(1))
    images, sides = [0, 1, 0, 1], [True, True, False, False]

    def residuals_of(rows):
        residuals = Residuals((conditioning,))
        residuals.begin_evaluation()
        chosen = [images[row] for row in rows]
        return residuals.rows(
            x[chosen], timesteps[chosen], [sides[row] for row in rows], y[rows], None, chosen, announced=announced
        )

    got = residuals_of(range(4))
    assert sum(runs) == len(run)
    if not run:
        assert got is None
        return
    both_sides = not conditioning.strength.cond_only
    acting = [row for row in range(4) if images[row] in [images[i] for i in run] and (both_sides or sides[row])]
    for residual, alone_now in zip(got, residuals_of(acting)):
        assert torch.equal(residual[acting], alone_now.expand(len(acting), -1, -1, -1))
        assert all((residual[row] == 0).all() for row in range(4) if row not in acting)


def test_announced_rows_of_an_image_share_a_run_without_being_compared(runs, monkeypatch):
    monkeypatch.setattr(unet_rows, "_find", None)
    residuals = Residuals((tiny.conditioning(network=NETWORK),))
    x, timesteps = inputs(2)
    for _ in range(2):  # equal timesteps, as with samplers that repeat a step
        residuals.begin_evaluation()
        for call in ([0, 1], [1], [0, 0, 1]):
            sides = [True] * len(call)
            got = residuals.rows(x[call], timesteps[call], sides, images=call, announced=True)
            assert got[0].shape[0] in (1, len(call))
    assert runs == [2, 2]
