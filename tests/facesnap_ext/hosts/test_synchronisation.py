"""Sampling does not make the CPU wait for the GPU.

No value that a step computes reaches the CPU, and none is copied from it. The exceptions are the first evaluation of a
pass, and the first call with a new arrangement of rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from facesnap_ext.conditioning import Placement
from facesnap_ext.hosts import a1111, forge
from facesnap_ext.regions import PaintedRegion
from tests.facesnap_ext.hosts import test_a1111, test_attention, test_forge
from tests.support import tiny
from tests.support.ldm_unet import inputs, ldm_unet

host = test_a1111.host  # a fixture
prepared = test_forge.prepared  # a fixture

SCALARS = {"_local_scalar_dense", "equal", "is_nonzero"}
SELECTIONS = {"nonzero", "nonzero_numpy", "masked_select", "unique_dim", "unique_consecutive", "_unique", "_unique2"}
CONSTANTS = {"index", "index_put", "index_put_", "lift_fresh"}  # lists of indices, and new tensors
DISPATCHED = SCALARS | SELECTIONS | CONSTANTS
READS = {"tolist", "numpy", "item", "cpu", "__bool__", "__float__", "__int__", "__index__", "__contains__"}
METHODS = READS | {"new_tensor"}
FUNCTIONS = {"tensor", "as_tensor", "from_numpy"}


class Dispatched(TorchDispatchMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in DISPATCHED:
            self.found[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def calls_counted(found: Counter[str]) -> Iterator[None]:
    """Count calls of `METHODS` and `FUNCTIONS`.

    `tolist` and `numpy` read the memory of a CPU tensor without dispatching an operation.
    """

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args, **kwargs):
            found[name] += 1
            return function(*args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:  # a TorchFunctionMode would slow down every operation
        for owner, names in ((torch.Tensor, METHODS), (torch, FUNCTIONS)):
            for name in names:
                patch.setattr(owner, name, counting(name, getattr(owner, name)))
        yield


def synchronisations(run: Callable[[], object]) -> Counter[str]:
    found: Counter[str] = Counter()
    with calls_counted(found), Dispatched(found):
        run()
    return found


@pytest.mark.parametrize(
    "run",
    [
        lambda x: float(x[0, 0]),
        lambda x: x.tolist(),
        lambda x: torch.equal(x, x + 1),
        lambda x: x[[1, 0]],
        lambda x: x[x > 0],
        lambda x: bool((x == 0).all()),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.tensor([True, False]),
        lambda x: torch.from_numpy(np.zeros(2)),
        lambda x: x.unique(),
    ],
)
def test_the_count_notices_each_kind_of_synchronisation(run):
    x = torch.randn(2, 2)
    assert synchronisations(lambda: run(x))
    assert not synchronisations(lambda: (x[:1] + 1).index_select(0, torch.zeros(1, dtype=torch.long)))


@pytest.fixture(scope="module")
def unet():
    return ldm_unet()


@pytest.fixture(scope="module")
def counted_once():
    """Counts by arrangement of rows: without a person they are the same in every test."""
    return {}


def without_person(counted_once, key, sample: Callable[[int], None]) -> list[Counter[str]]:
    """The synchronisations of each of five steps of the host alone."""
    if key not in counted_once:
        counted_once[key] = [synchronisations(lambda step=step: sample(step)) for step in range(5)]
    return counted_once[key]


def placed(network):
    """A person with a different place in each image, who is absent from the second one."""
    left = PaintedRegion(np.float32([[1, 0]]))
    return tiny.conditioning(1, network, placements=(Placement(tiny.landmarks(1), left), None))


NETWORK = tiny.ffrnet()
PEOPLE = {
    "one": lambda unet: (tiny.conditioning(network=NETWORK),),
    "trained with text, conditional rows": lambda unet: (
        tiny.conditioning(network=NETWORK, text_free=False, cond_only=True),
    ),
    "InstantID": lambda unet: (test_attention.person(unet, network=NETWORK, text_free=False)[0],),
    "every 2 steps": lambda unet: (tiny.conditioning(network=NETWORK, ffrnet_interval=2),),
    "start and end": lambda unet: (tiny.conditioning(network=NETWORK, start=0.1, end=0.9),),
    "several": lambda unet: (
        *(conditioning for conditioning, *_ in test_attention.people_of(unet, "two")),
        placed(NETWORK),
        tiny.conditioning(4, NETWORK),
    ),
}
# The others change when FFRNet runs, not how rows are read, so the groupings that skip rows or split them suffice.
IN_EVERY_GROUPING = ("one", "InstantID", "several")
SIGMAS = torch.linspace(10, 1, 6)


def sample_euler(): ...


def with_sampler(job):
    """The job with a sampler of k-diffusion."""
    job.sampler = SimpleNamespace(func=sample_euler, get_sigmas=lambda p, steps: SIGMAS)
    job.steps = len(SIGMAS)
    return job


# how A1111 groups rows in two alternating steps: number of conditional and unconditional rows, the rows of each call
A1111_STEPS = {
    "one image": (1, 1, [[[0, 1]], [[0, 1]]]),
    "A AND B": (2, 1, [[[0, 1, 2]], [[0, 1, 2]]]),
    "prompts of different length": (1, 1, [[[0], [1]], [[0], [1]]]),
    "unconditional rows skipped": (1, 1, [[[0]], [[0, 1]]]),
    "batch of two, A AND B, different length": (4, 2, [[[0, 1], [2, 3], [4, 5]], [[0, 1, 2, 3]]]),
}


HARDEST = ("unconditional rows skipped", "batch of two, A AND B, different length")


def cases(groupings):
    """Each grouping with the people to test it with."""
    pairs = [(one, people) for one in groupings for people in PEOPLE if one in HARDEST or people in IN_EVERY_GROUPING]
    return [pytest.param(*pair, id="-".join(pair)) for pair in pairs]


@pytest.mark.parametrize(("grouping", "people"), cases(A1111_STEPS))
def test_no_step_in_a1111_waits_for_the_gpu(unet, counted_once, grouping, people):
    cond, uncond, steps = A1111_STEPS[grouping]
    images = [i * uncond // cond for i in range(cond)] + list(range(uncond))
    x, timesteps, context, y = inputs(cond + uncond)
    x, timesteps = x[images], timesteps[images]
    job = with_sampler(test_a1111.Job(unet))

    def sample(step: int) -> None:
        test_a1111.announce(job, x, cond, step, len(SIGMAS), SIGMAS[step].expand(len(x)))
        for part in calls[step % 2]:
            unet(part[0], timesteps=part[1], context=part[2], y=part[3])

    calls = [[[t[rows] for t in (x, timesteps, context, y)] for rows in step] for step in steps]
    with torch.no_grad():
        plain = without_person(counted_once, ("A1111", grouping), sample)
        a1111.attach(job, PEOPLE[people](unet))
        found = [synchronisations(lambda step=step: sample(step)) for step in range(5)]
    assert found[0] + found[1] > plain[0] + plain[1], "the first evaluation with a person checks the residuals"
    assert found[3:] == plain[3:]


# how Forge groups rows in two alternating steps: number of images, and each call's chunks (0 is conditional)
FORGE_STEPS = {
    "one image": (1, [[[1, 0]], [[1, 0]]]),
    "A AND B": (1, [[[1, 0, 0]], [[1, 0, 0]]]),
    "prompts of different length": (1, [[[0], [1]], [[0], [1]]]),
    "unconditional rows skipped": (1, [[[0]], [[1, 0]]]),
    "batch of two, A AND B, different length": (2, [[[0, 0], [1]], [[0, 0]]]),
}


@pytest.mark.parametrize(("grouping", "people"), cases(FORGE_STEPS))
def test_no_step_in_forge_waits_for_the_gpu(unet, prepared, counted_once, grouping, people):
    check_forge(unet, counted_once, grouping, people)


@pytest.mark.parametrize("people", PEOPLE)
def test_no_step_after_a_refiner_waits_for_the_gpu(unet, prepared, counted_once, people):
    """A refiner replaces the model. It does not change how rows are grouped."""
    check_forge(unet, counted_once, "batch of two, A AND B, different length", people, refiner=True)


def check_forge(unet, counted_once, grouping, people, refiner=False):
    images, steps = FORGE_STEPS[grouping]
    parts = max(step.count(0) for calls in steps for step in calls)
    x, _, context, y = inputs(images)
    wrapped = test_attention.ForgeUNet(unet)
    job = with_sampler(test_forge.make_job(wrapped))
    job.is_hr_pass = False

    def sample(step: int) -> None:
        test_forge.announce(job, x, step / 6, parts, SIGMAS[step].expand(images))
        patcher = job.sd_model.forge_objects.unet
        if (head := patcher.controlnet_linked_list) is not None:
            head.pre_run(patcher.model, None)
        for sides in steps[step % 2]:
            options = {"cond_or_uncond": sides}
            rows = [torch.cat([part] * len(sides)) for part in (x, SIGMAS[step].expand(images), context, y)]
            cond = {"y": rows[3], "transformer_options": options}
            control = None if head is None else head.get_control(rows[0], rows[1], cond, len(sides))
            scaled = test_forge.Predictor().calculate_input(rows[1], rows[0])
            timesteps = test_forge.Predictor().timestep(rows[1])
            wrapped(scaled, timesteps, rows[2], rows[3], control, options)

    with torch.no_grad():
        plain = without_person(counted_once, ("Forge", grouping), sample)
        forge.attach(job, PEOPLE[people](unet))
        if refiner:
            sample(0)
            job.sd_model = test_forge.load(wrapped)
        found = [synchronisations(lambda step=step: sample(step)) for step in range(5)]
    forge.detach(job)
    assert found[0] + found[1] > plain[0] + plain[1], "the first evaluation with a person checks the residuals"
    assert found[3:] == plain[3:]
