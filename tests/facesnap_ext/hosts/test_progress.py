"""The progress of a pass with different kinds of samplers."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from facesnap_ext.hosts.progress import Progress, fraction_of
from facesnap_ext.settings.strength import Strength


def karras(steps: int, low: float = 0.03, high: float = 14.6) -> list[float]:
    ramp = torch.linspace(0, 1, steps)
    sigmas = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return [*sigmas.tolist(), 0.0]


def steps_of(sampler):
    """Return a function with the signature of k-diffusion's samplers: some receive the schedule, others only its
    ends."""

    def with_schedule(model, x, sigmas): ...

    def with_ends(model, x, sigma_min, sigma_max): ...

    return with_ends if sampler in ("adaptive", "fast") else with_schedule


def evaluations(sampler: str, schedule: list[float]) -> list[float]:
    """The noise level at each evaluation of a sampler."""
    pairs = list(pairwise(schedule))
    middle = [math.sqrt(high * low) for high, low in pairs if low]
    if sampler == "euler":
        return schedule[:-1]
    if sampler == "heun":
        return [sigma for high, low in pairs for sigma in ((high, low) if low else (high,))]
    if sampler == "sde":
        return [sigma for (high, _), mid in zip(pairs, middle) for sigma in (high, mid)] + [schedule[-2]]
    if sampler == "three per step":  # from another extension, which does not announce the number
        return [sigma for high, low in pairs for sigma in (high, high - (high - low) / 3, high - (high - low) / 1.5)]
    if sampler == "restart":
        half = len(schedule) // 2
        return schedule[:half] + schedule[half - 4 : half] + schedule[half - 4 : -1]
    high, low = schedule[0], schedule[-2]
    count = {"adaptive": 54, "fast": len(schedule) - 1}[sampler]
    return [high * (low / high) ** (i / count) for i in range(count)]


def progress_of(sampler: str, steps: int = 20, skipped: int = 0, evaluations_per_step: int = 1) -> list[float]:
    schedule = karras(steps + skipped)[skipped:]
    host = SimpleNamespace(func=steps_of(sampler), get_sigmas=lambda p, n: torch.tensor(karras(n)))
    p = SimpleNamespace(sampler=host, steps=steps)
    measure, found = Progress([Strength(end=0.5)]), []
    for step, sigma in enumerate(evaluations(sampler, schedule)):
        denoiser = SimpleNamespace(step=step, steps=steps, total_steps=steps * evaluations_per_step)
        found.append(measure.at(p, SimpleNamespace(denoiser=denoiser, sigma=torch.full((2,), sigma))))
    return found


@pytest.mark.parametrize("steps", [4, 20, 33])
@pytest.mark.parametrize(("sampler", "per_step"), [("euler", 1), ("heun", 2), ("sde", 2), ("fast", 1)])
def test_with_ordinary_samplers_the_evaluations_are_counted(sampler, per_step, steps):
    found = progress_of(sampler, steps, evaluations_per_step=per_step)
    assert found == [i / (steps * per_step) for i in range(len(found))]


def acting(found: list[float], start: float, end: float) -> list[int]:
    strength = Strength(start=start, end=end)
    return [i for i, progress in enumerate(found) if strength.acts_at(progress)]


@pytest.mark.parametrize(
    ("sampler", "count"), [("adaptive", 54), ("three per step", 60), ("restart", 28), ("heun", 39), ("sde", 39)]
)
def test_start_and_end_are_parts_of_the_pass_with_every_sampler(sampler, count):
    found = progress_of(sampler)  # one evaluation is announced per step
    assert found == sorted(found)
    assert len(found) == count
    assert found[0] < 0.05
    assert found[-1] > 0.9
    if sampler != "restart":
        assert len(acting(found, 0, 0.8)) == pytest.approx(0.8 * count, abs=2)
        assert acting(found, 0.5, 1)[0] == pytest.approx(0.5 * count, abs=2)


def test_a_pass_of_img2img_is_measured_from_its_own_beginning(monkeypatch):
    import sys
    from types import ModuleType

    common = ModuleType("modules.sd_samplers_common")
    common.setup_img2img_steps = lambda p, steps=None: (40, 19)
    for name, module in (("modules", ModuleType("modules")), ("modules.sd_samplers_common", common)):
        monkeypatch.setitem(sys.modules, name, module)
    schedule = karras(40)[20:]
    host = SimpleNamespace(func=steps_of("euler"), get_sigmas=lambda p, n: torch.tensor(karras(n)))
    measure, found = Progress([Strength(end=0.5)]), []
    for step, sigma in enumerate(sigma for sigma in schedule[:-1] for _ in range(3)):
        denoiser = SimpleNamespace(step=step, steps=20, total_steps=20)
        p = SimpleNamespace(sampler=host, steps=40, init_images=[None])
        found.append(measure.at(p, SimpleNamespace(denoiser=denoiser, sigma=torch.tensor([sigma]))))
    assert len(acting(found, 0, 0.5)) == pytest.approx(30, abs=2)


@pytest.mark.parametrize(
    "sampler",
    [
        None,
        SimpleNamespace(),
        SimpleNamespace(func=steps_of("euler"), get_sigmas=lambda p, n: torch.tensor([900.0, 800, 700, 0])),
    ],
)
def test_without_a_schedule_that_fits_the_evaluations_are_counted(sampler):
    measure = Progress([Strength(end=0.5)])
    p = SimpleNamespace(sampler=sampler, steps=3)
    for step in range(3):
        denoiser = SimpleNamespace(step=step, steps=3, total_steps=3)
        assert measure.at(p, SimpleNamespace(denoiser=denoiser, sigma=torch.tensor([14.0 - step]))) == step / 3


def test_the_fraction_of_a_schedule_is_exact_at_its_steps():
    schedule = karras(20)
    assert [fraction_of(sigma, schedule) for sigma in schedule] == [i / 20 for i in range(21)]
    assert fraction_of(99, schedule) == 0
    assert fraction_of(math.sqrt(schedule[3] * schedule[4]), schedule) == pytest.approx(3.5 / 20)
