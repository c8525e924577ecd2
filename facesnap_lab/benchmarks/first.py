"""From a job's start to its first UNet call, phase by phase, and whole jobs at real sizes.

All model files have random numbers (`random_files`). The jobs run in the order in which a user makes them: a first one,
the same person again, a new person. They call the engine and the adapter for diffusers, as the WebUIs' adapters do, and
a UNet of SDXL's size. Without sampling, the UNet needs no memory, because the job ends at its first call.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from facesnap_ext.engine import Engine
from facesnap_ext.hosts.diffusers import conditioned
from facesnap_ext.photos import Photo
from facesnap_ext.settings.strength import Strength
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights.search import find_models
from facesnap_lab.benchmarks.memory import PeakMemory, resident
from facesnap_lab.benchmarks.random_files import FULL_SIZE, Sizes, build
from facesnap_lab.benchmarks.sampler import create_unet
from facesnap_lab.markdown import markdown_table

PHOTO_SIDE = 1024  # pixels
BEFORE, HOOKS = "model files", "hooks and adapter"
PLAIN, PLAIN_AGAIN = "plain SDXL", "plain SDXL again"


@dataclass(frozen=True)
class Job:
    """One job: the index of its person in the miniature's world, None for plain SDXL, and the strength."""

    name: str
    person: int | None
    strength: Strength = field(default_factory=Strength)


FIRST_JOBS = (Job("first job", 0), Job("same person again", 0), Job("new person", 1))
WHOLE_JOBS = (
    Job(PLAIN, None),
    *FIRST_JOBS,
    Job("positive prompt only", 1, Strength(cond_only=True)),
    Job(PLAIN_AGAIN, None),
)


class _Reached(Exception):
    """The job has reached its first UNet call."""


class Pipe:
    """What `conditioned` needs of a pipeline, and a sampling loop with classifier-free guidance.

    Args:
        unet: diffusers' UNet of SDXL's layout, which may be on the meta device if nothing is sampled.
        dtype: the type in which it computes.
    """

    do_classifier_free_guidance = True

    def __init__(self, unet: Any, dtype: torch.dtype):
        from diffusers import EulerDiscreteScheduler

        self.unet = unet
        self.scheduler = EulerDiscreteScheduler()
        self.num_timesteps = 1
        weight = unet.conv_in.weight
        self.device = torch.device("cpu") if weight.is_meta else weight.device
        self.dtype = dtype

    @torch.no_grad()
    def sample(self, steps: int, pixels: int) -> Tensor:
        """The latents [1, 4, h, w] of an image, the same in each call."""
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(self.device, self.dtype)

        self.scheduler.set_timesteps(steps, device=self.device)
        self.num_timesteps = steps
        latents = random(1, 4, pixels // 8, pixels // 8) * self.scheduler.init_noise_sigma
        text = random(2, 77, self.unet.config.cross_attention_dim)
        added = {"text_embeds": random(2, 1280), "time_ids": torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * 2)}
        added["time_ids"] = added["time_ids"].to(self.device, self.dtype)
        for timestep in self.scheduler.timesteps:
            rows = self.scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
            noise = self.unet(rows.to(self.dtype), timestep, text, added_cond_kwargs=added).sample
            uncond, cond = noise.chunk(2)
            latents = self.scheduler.step(uncond + 5 * (cond - uncond), timestep, latents).prev_sample
        return latents


def profile(
    models: Path,
    sizes: Sizes = FULL_SIZE,
    steps: int = 0,
    pixels: int = 1024,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> list[dict[str, Any]]:
    """Run jobs with the files in a folder and measure each of them.

    Args:
        models: a folder written by `random_files.write_models` with the same sizes.
        steps: sampling steps; with 0, each job ends at its first UNet call.
        pixels: the side of the image.
        device, dtype: of the UNet.

    Returns:
        For each job: its name; `to_first_call`, the seconds from its start to its first UNet call; `phases`, the parts
        of that time; `processor`, the processor's seconds in that time, which other load hardly changes; `seconds`, for
        the complete job; `own_GB` and `peak_GB`, the highest memory without and with the pages of files, see `memory`;
        `added_GB`, the own memory that the job leaves behind; `same_as_plain`, for plain jobs after the first, whether
        the latents are the same to the bit.
    """
    if steps:
        unet = build(lambda: create_unet(sizes.widths), dtype).to(device)
    else:
        with torch.device("meta"):
            unet = create_unet(sizes.widths)
    pipe = Pipe(unet, dtype)
    engine = Engine(lambda: find_models(models))
    found, plain = [], None
    for job in WHOLE_JOBS if steps else FIRST_JOBS:
        row, latents = _run(job, engine, pipe, steps, pixels)
        if latents is not None and job.person is None:
            if plain is not None:
                row["same_as_plain"] = torch.equal(plain, latents)
            plain = latents
        found.append(row)
    return found


def as_text(jobs: list[dict[str, Any]]) -> str:
    """Format the result of `profile` as a Markdown table, and say whether FaceSnap's jobs left plain images alone."""
    head = ["seconds to the first UNet call", "processor", "phases", "complete job, s", "own memory, GB", "peak, GB"]
    rows = []
    for job in jobs:
        phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in job["phases"].items())
        values = [job["to_first_call"], job["processor"], phases, job["seconds"], job["own_GB"], job["peak_GB"]]
        rows.append((job["name"], list(map(str, values))))
    lines = markdown_table(head, rows)
    if unchanged := [job["same_as_plain"] for job in jobs if "same_as_plain" in job]:
        lines += ["", f"Plain images before and after: {'bit-identical' if all(unchanged) else 'different'}"]
    return "\n".join(lines)


def _run(job: Job, engine: Engine, pipe: Pipe, steps: int, pixels: int) -> tuple[dict[str, Any], Tensor | None]:
    photo = None if job.person is None else reference_photo(job.person)
    before = resident()
    began = time.perf_counter()
    processor = time.process_time()
    phases: list[tuple[str, float]] = [(BEFORE, began)]
    reached: list[tuple[float, float]] = []
    latents = None
    with PeakMemory() as peak, _first_call(pipe.unet, reached, stop=steps == 0):
        try:
            if photo is None:
                latents = pipe.sample(steps, pixels)
            else:
                unit = Unit(enabled=True, references=(photo,), strength=job.strength)
                prepared = engine.prepare(
                    unit, pixels, pixels, progress=lambda message: phases.append((message, time.perf_counter()))
                )
                phases.append((HOOKS, time.perf_counter()))
                with conditioned(pipe, prepared.conditioning):
                    latents = pipe.sample(max(1, steps), pixels)
        except _Reached:
            pass
    ended = time.perf_counter()
    after = resident()
    row: dict[str, Any] = {
        "name": job.name,
        "to_first_call": round(reached[0][0] - began, 4),
        "processor": round(reached[0][1] - processor, 4),
        "phases": _durations(phases, reached[0][0]) if photo is not None else {},
        "seconds": round(ended - began, 3),
        "own_GB": round(peak.own, 2),
        "peak_GB": round(peak.total, 2),
    }
    if before is not None and after is not None:
        row["added_GB"] = round(after.own - before.own, 2)
    return row, latents


def _durations(phases: list[tuple[str, float]], end: float) -> dict[str, float]:
    """The seconds of each phase, from the times at which they began; a name that occurs again is added to the first."""
    found: dict[str, float] = {}
    for (name, began), (_, until) in zip(phases, [*phases[1:], ("", end)]):
        found[name] = round(found.get(name, 0.0) + until - began, 4)
    return found


@contextmanager
def _first_call(unet: nn.Module, reached: list[tuple[float, float]], stop: bool) -> Iterator[None]:
    """Note the time of the first UNet call, before any other hook.

    Args:
        stop: whether to raise `_Reached` there.
    """

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not reached:
            reached.append((time.perf_counter(), time.process_time()))
        if stop:
            raise _Reached

    handle = unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def reference_photo(person: int) -> Photo:
    """A photo of a person of the miniature's world, enlarged to the size of a usual photo."""
    from facesnap_lab.miniature.measure import photo

    pixels, _ = photo("test", person, 0)
    enlarged = Image.fromarray(pixels).resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BICUBIC)

    return Photo(np.asarray(enlarged), f"Person {person}")
