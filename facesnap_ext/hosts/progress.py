"""Measure the progress of a sampling pass by its noise level, because some samplers evaluate the UNet more or less
often than expected."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from facesnap_ext.settings.strength import Strength

TINY = 1e-6

COUNTED_SAMPLERS = frozenset(
    (
        "sample_euler",
        "sample_euler_ancestral",
        "sample_lms",
        "sample_heun",
        "sample_dpm_2",
        "sample_dpm_2_ancestral",
        "sample_dpmpp_2s_ancestral",
        "sample_dpmpp_sde",
        "sample_dpmpp_2m",
        "sample_dpmpp_2m_sde",
        "sample_dpmpp_3m_sde",
    )
)
"""k-diffusion's samplers with a fixed number of evaluations per step, which both hosts count correctly."""


class Progress:
    """The progress of one sampling pass, which never decreases.

    The host counts evaluations and expects a fixed number of evaluations per step. If this count agrees with the noise
    level to within one step, it is used; otherwise the noise level is used. The count can be wrong because DPM adaptive
    chooses its own steps, some samplers repeat a part of the pass, and samplers of other extensions may evaluate the
    UNet several times per step.

    Reading the noise level makes the CPU wait for the GPU. It is therefore read only if the count may be wrong, and if
    someone's start or end depends on it.

    Args:
        strengths: the settings of the people in the pass.
    """

    def __init__(self, strengths: Iterable[Strength] = ()) -> None:
        self._needed = any(one.start > 0 or one.end < 1 for one in strengths)
        self._reached = 0.0
        self._schedule: list[float] | None = None  # noise levels of the steps of the pass; empty if unknown

    def at(self, p: Any, params: Any) -> float:
        """The progress at an evaluation, from 0 to 1.

        Args:
            params: the host's `CFGDenoiserParams`.
        """
        denoiser = params.denoiser
        progress = denoiser.step / denoiser.total_steps
        sigma = getattr(params, "sigma", None)
        name = getattr(getattr(getattr(p, "sampler", None), "func", None), "__name__", "")
        if sigma is not None and self._needed and name not in COUNTED_SAMPLERS:
            noise = float(sigma.flatten()[0])
            if self._schedule is None:
                self._schedule = schedule_of(p, denoiser, noise)
            if self._schedule:
                by_noise = fraction_of(noise, self._schedule)
                if abs(by_noise - progress) > 1 / max(1, denoiser.steps) + TINY:
                    progress = by_noise
        self._reached = max(self._reached, progress)
        return self._reached


def schedule_of(p: Any, denoiser: Any, first: float) -> list[float]:
    """The noise levels at the beginning of each step of a pass, and at the end of the pass.

    For samplers that choose their own steps, the list has only the first and the last level. It is empty if the host's
    sampler has no noise levels, or if the pass begins with a different level.

    Args:
        first: the noise level of the pass's first evaluation.
    """
    sampler: Any = getattr(p, "sampler", None)
    if not hasattr(sampler, "get_sigmas"):
        return []
    steps = denoiser.steps
    second = bool(getattr(p, "is_hr_pass", False))
    if second or hasattr(p, "init_images"):
        from modules.sd_samplers_common import setup_img2img_steps

        all_steps, _ = setup_img2img_steps(p, (p.hr_second_pass_steps or p.steps) if second else None)
    else:
        all_steps = steps
    sigmas = [float(sigma) for sigma in sampler.get_sigmas(p, all_steps).tolist()][-(steps + 1) :]
    if len(sigmas) < 3 or sigmas[-2] <= 0 or not math.isclose(sigmas[0], first, rel_tol=0.02):
        return []
    if "sigmas" not in inspect.signature(sampler.func).parameters:
        return [sigmas[0], sigmas[-2]]
    return sigmas


def prompt_parts(denoiser: Any) -> list[int]:
    """The number of AND's parts in the prompt of each image of a batch, as the host's denoiser receives them; empty if
    they are unknown."""
    arguments = getattr(getattr(denoiser, "sampler", None), "sampler_extra_args", None) or {}
    return [len(parts) for parts in getattr(arguments.get("cond"), "batch", ())]


def fraction_of(noise: float, schedule: Sequence[float]) -> float:
    """The completed fraction of a schedule at a noise level, from 0 to 1; logarithmic in the noise within a step."""
    steps = len(schedule) - 1
    for step, (high, low) in enumerate(pairwise(schedule)):
        if noise > low:
            if noise >= high:
                return step / steps
            within = math.log(high / noise) / math.log(high / low) if low > 0 else 1 - noise / high
            return (step + within) / steps
    return 1.0
