"""A1111's host adapter on a real LDM UNet, called the way the host's denoiser calls it."""

from __future__ import annotations

import gc
import sys
import weakref
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts import a1111
from facesnap_ext.hosts.errors import Refusal
from facesnap_ext.hosts.unet import skip_widths
from facesnap_ext.networks.ffrnet import FFRNet
from tests.support import tiny
from tests.support.ldm_unet import both_sides, inputs, ldm_unet, reference_walk, resized
from tests.support.units import changed


@dataclass(eq=True)  # as in StableDiffusionProcessing, which is therefore not hashable
class Job:
    unet: nn.Module
    is_sdxl: bool = True
    lowvram: bool = False  # --medvram or --lowvram
    comments: list[str] = field(default_factory=list)
    extra_generation_params: dict[str, str] = field(default_factory=dict)

    @property
    def sd_model(self):
        info = SimpleNamespace(title="loaded.safetensors")
        return SimpleNamespace(
            is_sdxl=self.is_sdxl,
            model=SimpleNamespace(diffusion_model=self.unet),
            sd_checkpoint_info=info,
            lowvram=self.lowvram,
        )

    def comment(self, text: str) -> None:
        self.comments.append(text)


@pytest.fixture(autouse=True)
def host(monkeypatch):
    sd_unet = ModuleType("modules.sd_unet")
    sd_unet.current_unet = None
    modules = ModuleType("modules")
    modules.sd_unet = sd_unet
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "modules.sd_unet", sd_unet)
    yield sd_unet
    a1111.detach()


@pytest.fixture(scope="module")
def unet():
    return ldm_unet()


def hooks_of(unet: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


def announce(job: Job, x: Tensor, cond_rows: int, step: int = 0, total: int = 4, sigma: Tensor | None = None) -> None:
    """Do what the host does before each evaluation."""
    images = max(1, len(x) - cond_rows)
    cond = SimpleNamespace(batch=[[None] * (cond_rows // images)] * images)
    sampler = SimpleNamespace(sampler_extra_args={"cond": cond})
    denoiser = SimpleNamespace(p=job, step=step, steps=total, total_steps=total, sampler=sampler)
    text_cond = torch.empty(cond_rows, 77, tiny.CONTEXT)
    a1111.on_cfg_denoiser(SimpleNamespace(x=x, sigma=sigma, text_cond=text_cond, denoiser=denoiser))


@torch.no_grad()
def call(unet: nn.Module, x, timesteps, context, y, rows: list[int]) -> Tensor:
    """Call the UNet as sgm's wrapper does."""
    return unet(x[rows], timesteps=timesteps[rows], context=context[rows], y=y[rows])


@torch.no_grad()
def expected_output(unet, conditionings, x, timesteps, context, y, cond_rows: int) -> Tensor:
    """Compute each row separately with each FFRNet and `reference_walk`, for one person or several side by side."""
    rows = []
    for row in range(len(x)):
        one = [t[row : row + 1] for t in (x, timesteps, context, y)]
        residuals = [torch.zeros(1)] * 10
        for conditioning in conditionings:
            if row >= cond_rows and conditioning.strength.cond_only:
                continue
            network = conditioning.ffrnet
            picture = a1111_landmarks(conditioning, x)
            features = network.embed_landmarks(picture)
            own = [
                conditioning.strength.weight * residual
                for residual in network(one[0], one[1], network.embed_tokens(conditioning.tokens), features)
            ]
            if conditioning.region is not None:
                masks = [conditioning.region.sample(residual.shape[3], residual.shape[2]) for residual in own]
                own = [residual * torch.from_numpy(mask) for residual, mask in zip(own, masks)]
            residuals = [a + b for a, b in zip(residuals, own)]
        with torch.no_grad():
            rows.append(reference_walk(unet, *one, residuals))
    return torch.cat(rows)


def a1111_landmarks(conditioning, x) -> Tensor:
    from facesnap_ext.residuals import landmark_image

    return landmark_image(conditioning.landmarks, 8 * x.shape[3], 8 * x.shape[2])


# how the host groups rows: number of conditional rows, number of unconditional rows, the rows of each call
GROUPINGS = {
    "joint": (1, 1, [[0, 1]]),
    "batch of two": (2, 2, [[0, 1, 2, 3]]),
    "A AND B": (2, 1, [[0, 1, 2]]),
    "prompts of different length": (1, 1, [[0], [1]]),
    "batch of two, different length": (2, 2, [[0, 1], [2, 3]]),
    "A AND B, different length": (2, 1, [[0, 1], [2]]),
    "A AND B, one row at a time": (2, 1, [[0], [1], [2]]),
    "unconditional rows skipped": (1, 1, [[0]]),
    "batch of two, unconditional rows skipped": (2, 2, [[0, 1]]),
}


HARDEST = ("batch of two, different length", "A AND B, one row at a time")  # rows of one call are of different images


@pytest.mark.parametrize(
    ("grouping", "people"),
    [(grouping, people) for grouping in GROUPINGS for people in tiny.PEOPLE if people != "one" or grouping in HARDEST],
)
def test_each_row_gets_its_own_residuals_in_every_grouping(unet, grouping, people):
    cond, uncond, calls = GROUPINGS[grouping]
    conditionings = tiny.PEOPLE[people]()
    job = Job(unet)
    x, timesteps, context, y = inputs(cond + uncond)
    images = [i % uncond for i in range(cond)] + list(range(uncond))  # rows of one image share latent and timestep
    x, timesteps = x[images], timesteps[images]
    expected = expected_output(unet, conditionings, x, timesteps, context, y, cond)

    a1111.attach(job, conditionings)
    for step in range(2):  # the second evaluation counts rows from 0, even after skipped ones
        announce(job, x, cond, step)
        for rows in calls:
            torch.testing.assert_close(call(unet, x, timesteps, context, y, rows), expected[rows], atol=1e-4, rtol=1e-4)


def test_the_parts_of_the_prompts_map_rows_to_images_and_values_do_only_if_the_parts_are_unknown():
    latents = torch.randn(3, 4, 2, 2)
    parts = [2, 1, 3]
    expected = [0, 0, 1, 2, 2, 2, 0, 1, 2]
    assert a1111.images_of_rows(latents[expected], 6) == expected
    equal = latents[[0] * 9]  # the values do not tell the images apart
    assert a1111.images_of_rows(equal, 6, parts) == expected
    assert a1111.images_of_rows(latents[expected], 6, [2, 1]) == expected


def test_ffrnet_runs_once_per_image_and_step(unet, monkeypatch):
    conditioning = tiny.conditioning()
    runs = []
    forward = type(conditioning.ffrnet).forward
    monkeypatch.setattr(
        type(conditioning.ffrnet), "forward", lambda self, x, *rest: runs.append(len(x)) or forward(self, x, *rest)
    )
    job = Job(unet)
    x, timesteps, context, y = inputs(2)
    images = [0, 1, 0, 1]
    x, timesteps, context, y = x[images], timesteps[images], context[images], y[images]
    a1111.attach(job, (conditioning,))
    for step in range(3):
        announce(job, x + step, 2, step)
        for rows in ([0, 1], [2, 3]):
            call(unet, x + step, timesteps, context, y, rows)
    assert runs == [2, 2, 2]


@pytest.fixture
def resizing_cat(monkeypatch):
    """A1111 resizes the decoder's features to the skip's size."""
    import ldm.modules.diffusionmodules.openaimodel as openaimodel

    def cat(tensors, dim):
        a, b = tensors
        return torch.cat([resized(a, b, "nearest"), b], dim=dim)

    host_torch = SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch)})
    host_torch.cat = cat
    monkeypatch.setattr(openaimodel, "th", host_torch)


@pytest.mark.parametrize("size", [(33, 41), (16, 24)])
def test_sizes_that_the_unet_cannot_halve_exactly(unet, size, resizing_cat):
    conditioning, job = tiny.conditioning(), Job(unet)
    args = inputs(1, size)
    plain = call(unet, *args, [0])
    a1111.attach(job, (conditioning,))
    announce(job, args[0], 1)
    conditioned = call(unet, *args, [0])
    assert conditioned.shape == plain.shape
    assert not torch.allclose(conditioned, plain, atol=1e-3)


class Scaler(nn.Module):
    """Like the wrapper that deep shrink puts around a block: it resizes the features first."""

    def __init__(self, block: nn.Module, scale: float):
        super().__init__()
        self.block, self.scale = block, scale

    def forward(self, x, *args):
        return self.block(nn.functional.interpolate(x, scale_factor=self.scale, mode="bilinear"), *args)


def shrink(unet: nn.Module, depth: int, scale: float, early: bool = False) -> None:
    """Do what the Kohya Hires.fix extension does in `on_cfg_denoiser`, after FaceSnap."""
    unet.input_blocks[depth] = Scaler(unet.input_blocks[depth], scale)
    out = depth if early else -(depth + 1)
    unet.output_blocks[out] = Scaler(unet.output_blocks[out], 1 / scale)


def unwrap(unet: nn.Module) -> None:
    for blocks in (unet.input_blocks, unet.output_blocks):
        for i, block in enumerate(blocks):
            while isinstance(block, Scaler):
                block = blocks[i] = block.block


SHRINKS = {
    "depth 1": lambda unet: shrink(unet, 1, 0.5),
    "depth 3": lambda unet: shrink(unet, 3, 0.5),
    "depth 8": lambda unet: shrink(unet, 8, 0.5),
    "smooth scaling": lambda unet: shrink(unet, 3, 0.7),
    "early": lambda unet: shrink(unet, 3, 0.5, early=True),
    "twice": lambda unet: (shrink(unet, 2, 0.5), shrink(unet, 2, 0.8)),
    "larger": lambda unet: shrink(unet, 4, 1.5),
}


@pytest.mark.parametrize(
    ("people", "kind"), [*(("two", kind) for kind in SHRINKS), ("one", "depth 3"), ("one", "smooth scaling")]
)
def test_residuals_take_the_size_of_what_they_are_added_to(unet, resizing_cat, kind, people):
    """Deep shrink wraps blocks during a part of sampling, and a failed job leaves them wrapped."""
    conditionings, job, args = tiny.PEOPLE[people](), Job(unet), both_sides()
    before = hooks_of(unet)
    expected = expected_output(unet, conditionings, *args, 1)
    try:
        a1111.attach(job, conditionings)
        announce(job, args[0], 1)
        SHRINKS[kind](unet)
        shrunk = expected_output(unet, conditionings, *args, 1)
        assert not torch.allclose(shrunk, expected, atol=1e-3)
        announce(job, args[0], 1)
        torch.testing.assert_close(call(unet, *args, [0, 1]), shrunk, atol=1e-4, rtol=1e-4)
        unwrap(unet)
        announce(job, args[0], 1, step=1)
        torch.testing.assert_close(call(unet, *args, [0, 1]), expected, atol=1e-4, rtol=1e-4)
        SHRINKS[kind](unet)
        later = Job(unet)
        a1111.attach(later, conditionings)  # the blocks are still wrapped and are unwrapped later
        for result in (shrunk, expected):
            announce(later, args[0], 1)
            torch.testing.assert_close(call(unet, *args, [0, 1]), result, atol=1e-4, rtol=1e-4)
            unwrap(unet)
        a1111.detach(later)
    finally:
        unwrap(unet)
    assert hooks_of(unet) == before


@pytest.mark.parametrize("wrap", [lambda block: Scaler(Scaler(block, 1), 1), nn.Sequential], ids=["twice", "sequence"])
def test_widths_are_read_through_wrappers(unet, wrap):
    wrapped = [wrap(block) for block in unet.input_blocks]
    assert skip_widths(SimpleNamespace(input_blocks=wrapped)) == tiny.ffrnet().config.skip_widths


def test_a_replaced_block_stops_the_job_and_no_later_one(unet):
    job, args = Job(unet), inputs(1)
    kept = unet.input_blocks[2]
    unet.input_blocks[2] = nn.Identity()
    try:
        a1111.attach(job, (tiny.conditioning(),))
    finally:
        unet.input_blocks[2] = kept
    announce(job, args[0], 1)
    with pytest.raises(FaceSnapError, match="has replaced input block 2 of the UNet"):
        call(unet, *args, [0])
    conditioning, later = tiny.conditioning(), Job(unet)
    a1111.attach(later, (conditioning,))
    announce(later, args[0], 1)
    expected = expected_output(unet, (conditioning,), *args, 1)
    torch.testing.assert_close(call(unet, *args, [0]), expected, atol=1e-4, rtol=1e-4)


def test_start_and_end_are_fractions_of_the_steps(unet):
    job = Job(unet)
    args = inputs(1)
    plain = call(unet, *args, [0])
    a1111.attach(job, (tiny.conditioning(start=0.25, end=0.75),))
    acted = []
    for step in range(4):
        announce(job, args[0], 1, step, 4)
        acted.append(not torch.equal(call(unet, *args, [0]), plain))
    assert acted == [False, True, True, False]


def test_each_person_has_their_own_start_and_end(unet):
    job = Job(unet)
    args = inputs(1)
    first, second = tiny.conditioning(1, end=0.5), tiny.conditioning(2, start=0.25, end=0.75)
    # two people without regions share the image equally
    halves = [changed(conditioning, weight=0.5) for conditioning in (first, second)]
    expected = [expected_output(unet, acting, *args, 1) for acting in ([first], halves, [second], [])]
    a1111.attach(job, (first, second))
    for step in range(4):
        announce(job, args[0], 1, step, 4)
        torch.testing.assert_close(call(unet, *args, [0]), expected[step], atol=1e-4, rtol=1e-4)


def test_a_pass_without_people_is_left_unchanged(unet):
    """An example is the second pass of hires fix, if all people are active only in the first pass."""
    job, args = Job(unet), inputs(1)
    before, plain = hooks_of(unet), call(unet, *args, [0])
    a1111.attach(job, (tiny.conditioning(),))
    a1111.attach(job, ())
    announce(job, args[0], 1)
    assert hooks_of(unet) == before
    assert torch.equal(call(unet, *args, [0]), plain)


def test_end_1_includes_evaluations_beyond_the_announced_steps(unet):
    """DPM++ SDE evaluates the UNet more than once per step."""
    job = Job(unet)
    args = inputs(1)
    plain = call(unet, *args, [0])
    a1111.attach(job, (tiny.conditioning(),))
    announce(job, args[0], 1, step=6, total=4)
    assert not torch.equal(call(unet, *args, [0]), plain)


def test_detaching_removes_all_hooks_and_restores_bit_identical_output(unet):
    job = Job(unet)
    args = inputs(2)
    before, plain = hooks_of(unet), call(unet, *args, [0, 1])
    a1111.attach(job, (tiny.conditioning(),))
    announce(job, args[0], 1)
    assert not torch.equal(call(unet, *args, [0, 1]), plain)
    a1111.detach(job)
    assert hooks_of(unet) == before
    assert torch.equal(call(unet, *args, [0, 1]), plain)


def test_zero_residuals_do_not_change_a_bit(unet):
    network = tiny.ffrnet()
    for conv in [*network.controlnet_down_blocks, network.controlnet_mid_block]:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    job, args = Job(unet), inputs(2)
    plain = call(unet, *args, [0, 1])
    a1111.attach(job, (tiny.conditioning(network=network),))
    announce(job, args[0], 1)
    assert torch.equal(call(unet, *args, [0, 1]), plain)


def test_attaching_twice_acts_once(unet):
    """Hires fix attaches again for its second pass, when the hooks of the first pass may still exist."""
    conditioning, job, args = tiny.conditioning(), Job(unet), inputs(1)
    outputs = []
    for _ in range(2):
        a1111.attach(job, (conditioning,))
        announce(job, args[0], 1)
        outputs.append(call(unet, *args, [0]))
    assert torch.equal(*outputs)


def test_hooks_left_by_a_failed_job_do_not_affect_other_jobs(unet):
    args = inputs(2)
    plain = call(unet, *args, [0, 1])
    failed = Job(unet)
    a1111.attach(failed, (tiny.conditioning(),))
    announce(failed, args[0], 1)  # sampling then raises an error, and the announced rows never arrive
    other = Job(unet)
    announce(other, args[0], 1)
    assert torch.equal(call(unet, *args, [0, 1]), plain)
    assert torch.equal(call(unet, *args, [0, 1]), plain)  # an unannounced call


def test_unannounced_calls_are_left_unchanged_and_reported_once(unet):
    """Examples are tiles, and UNet calls by another extension. Calls of another job are not reported."""
    args, job = inputs(2), Job(unet)
    tile = inputs(2, (16, 8))
    plain, plain_tile = call(unet, *args, [0, 1]), call(unet, *tile, [0, 1])
    a1111.attach(job, (tiny.conditioning(),))
    assert torch.equal(call(unet, *args, [0, 1]), plain)
    assert job.comments == [], "before sampling has begun"
    for step in range(2):
        announce(job, args[0], 1, step)
        assert not torch.equal(call(unet, *args, [0, 1]), plain)
    assert job.comments == []
    announce(job, args[0], 1)
    assert torch.equal(call(unet, *tile, [0, 1]), plain_tile), "as many rows as announced, but of another size"
    for _ in range(2):
        call(unet, *args, [0, 1])
    assert torch.equal(call(unet, *args, [0, 1]), plain)
    (comment,) = job.comments
    assert "FaceSnap is not applied to those calls" in comment
    assert job.extra_generation_params == {"FaceSnap stopped": "UNet calls of another extension"}

    a1111.attach(job, (tiny.conditioning(),))
    announce(job, args[0], 1)
    call(unet, *args, [0, 1])
    announce(Job(unet), args[0], 1)
    call(unet, *args, [0, 1])
    assert len(job.comments) == 1

    a1111.refuse(job, Refusal("No face in reference photo 1; choose another."))
    announce(job, args[0], 1)
    with pytest.raises(FaceSnapError, match="No face"):
        call(unet, *tile, [0, 1])


def test_out_of_memory_while_moving_ffrnet_does_not_break_later_jobs(unet, monkeypatch):
    """Modules are moved one by one, so some are already on the GPU and others are not."""
    conditioning, args = tiny.conditioning(), inputs(1)
    expected = expected_output(unet, (conditioning,), *args, 1)
    conditioning.ffrnet.double()

    def run_out(*args):
        raise torch.cuda.OutOfMemoryError("halfway")

    with monkeypatch.context() as patched:
        patched.setattr(conditioning.ffrnet.mid_block, "_apply", run_out)
        failed = Job(unet)
        a1111.attach(failed, (conditioning,))
        announce(failed, args[0], 1)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            call(unet, *args, [0])
        assert conditioning.ffrnet in a1111.on_gpu, "otherwise it would never be offloaded"
    job = Job(unet)
    a1111.attach(job, (conditioning,))
    announce(job, args[0], 1)
    torch.testing.assert_close(call(unet, *args, [0]), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def moves(monkeypatch):
    """The devices that networks are moved to, in order."""
    sent = []
    monkeypatch.setattr(FFRNet, "to", lambda self, *args: sent.append(args[0]) or self)
    a1111.offload()
    sent.clear()
    return sent


def test_ffrnet_stays_on_the_gpu_until_an_image_without_facesnap(unet, moves):
    conditioning, args = tiny.conditioning(), inputs(1)
    for _picture in range(2):
        job = Job(unet)
        a1111.attach(job, (conditioning,))
        announce(job, args[0], 1)
        call(unet, *args, [0])
        a1111.detach(job)
    assert "cpu" not in moves
    a1111.attach(Job(unet), ())
    assert moves == ["cpu"]
    a1111.attach(Job(unet), ())
    assert moves == ["cpu"], "offloaded only once"


def test_with_medvram_ffrnet_is_offloaded_after_each_pass(unet, moves):
    args, job = inputs(1), Job(unet, lowvram=True)
    a1111.attach(job, (tiny.conditioning(), tiny.conditioning(3)))
    announce(job, args[0], 1)
    call(unet, *args, [0])
    assert moves == []
    a1111.detach(job)
    assert moves == ["cpu", "cpu"]


def test_an_unused_ffrnet_is_garbage_collected(unet):
    network, args, job = tiny.ffrnet(), inputs(1), Job(unet)
    gone = weakref.ref(network)
    a1111.attach(job, (tiny.conditioning(network=network),))
    announce(job, args[0], 1)
    call(unet, *args, [0])
    a1111.detach(job)
    del network
    gc.collect()
    assert gone() is None


def test_hooks_are_removed_when_their_job_is_garbage_collected(unet):
    before = hooks_of(unet)
    job = Job(unet)
    a1111.attach(job, (tiny.conditioning(),))
    assert hooks_of(unet) > before
    del job
    gc.collect()
    assert hooks_of(unet) == before


def test_a_refusal_stops_its_own_job_at_the_first_call_and_no_other(unet):
    args = inputs(1)
    plain = call(unet, *args, [0])
    job, other = Job(unet), Job(unet)
    a1111.refuse(job, Refusal("There is no face in reference photo 1; choose another photo."))
    announce(job, args[0], 1)
    with pytest.raises(FaceSnapError, match="no face in reference photo 1"):
        call(unet, *args, [0])
    announce(other, args[0], 1)
    assert torch.equal(call(unet, *args, [0]), plain)


@pytest.mark.parametrize("network", [None, tiny.ffrnet(widths=(32, 64, 64))], ids=["no face", "other widths"])
def test_the_hook_of_a_refused_job_is_removed_with_the_job(unet, network):
    before = hooks_of(unet)
    args, job = inputs(1), Job(unet)
    if network is None:
        a1111.refuse(job, Refusal("No face."))
    else:
        a1111.attach(job, (tiny.conditioning(network=network),))
    announce(job, args[0], 1)
    with pytest.raises(FaceSnapError):
        call(unet, *args, [0])
    assert hooks_of(unet) == before + 1
    del job
    gc.collect()
    assert hooks_of(unet) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda job, host: setattr(job, "is_sdxl", False),
            r"SDXL checkpoint and loaded\.safetensors is not one",
        ),
        (lambda job, host: setattr(host, "current_unet", object()), "alternative UNet"),
    ],
)
def test_unsupported_unets_stop_the_job(unet, host, change, message):
    job, args = Job(unet), inputs(1)
    change(job, host)
    a1111.attach(job, (tiny.conditioning(),))
    announce(job, args[0], 1)
    with pytest.raises(FaceSnapError, match=message):
        call(unet, *args, [0])


def test_a_file_with_other_widths_is_reported_with_both_widths(unet):
    job, args = Job(unet), inputs(1)
    network = tiny.ffrnet(widths=(32, 64, 64))
    a1111.attach(job, (tiny.conditioning(), tiny.conditioning(network=network, name="other.safetensors")))
    announce(job, args[0], 1)
    with pytest.raises(FaceSnapError, match=r"other\.safetensors was made for .* 32/64 .* 32/64/96"):
        call(unet, *args, [0])


def test_it_follows_a_refiner_of_the_same_widths_and_reports_any_other(unet):
    args = inputs(1)
    job = Job(unet)
    a1111.attach(job, tiny.side_by_side())
    twin = ldm_unet(seed=5)
    plain = call(twin, *args, [0])
    job.unet = twin
    announce(job, args[0], 1)
    assert not torch.equal(call(twin, *args, [0]), plain)
    assert hooks_of(unet) == 0

    narrow = ldm_unet(seed=6)
    narrow.input_blocks = narrow.input_blocks[:-1]
    job.unet = narrow
    announce(job, args[0], 1)
    assert hooks_of(narrow) == hooks_of(twin) == 0
    assert "refiner" in job.comments[0]
    assert job.extra_generation_params == {"FaceSnap stopped": "refiner"}
