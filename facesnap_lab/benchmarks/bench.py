"""The cost of FaceSnap compared with plain SDXL, a ControlNet on both rows, and an InstantID-style network.

All methods take turns in one process, so that other load on the machine affects them equally. FLOPs are counted on the
meta device at SDXL's real size.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from facesnap_ext.networks.ffrnet import FFRNet
from facesnap_ext.networks.mixer import FacialAttributeMixer, MixerConfig
from facesnap_ext.weights.search import find_models
from facesnap_lab.benchmarks.sampler import (
    COMPILED,
    CONTROLNET,
    FACESNAP_VARIANTS,
    INSTANTID,
    INSTANTID_COND_ONLY,
    PLAIN,
    SDXL_WIDTHS,
    BenchSampler,
    Networks,
)
from facesnap_lab.markdown import markdown_table

STEPS = 8  # per image, as in the paper
SDXL_PIXELS = 1024
SMALL_WIDTHS, SMALL_PIXELS = (64, 128, 256), 512
GROWTH = {"people": (1, 2, 4), "side": (0.5, 1.0, 1.5), "pictures": (1, 2, 4, 8)}  # side: relative to the default side
GROWTH_STEPS = 4
REFERENCES = (1, 2, 4, 8)


def bench(repeats: int = 5, steps: int = STEPS, growth: bool = False, pictures: Sequence[int] = (1,)) -> dict[str, Any]:
    """Measure the time per image of each method.

    On a GPU this is done at SDXL's size in half precision, otherwise at a fifth of the widths and 512² in single
    precision.

    Args:
        pictures: batch sizes. The results for all but the first are in `batches`, by batch size, with half the steps.

    Returns:
        `size`: what was timed. `methods`: for each, the median seconds per image and the median ratio to plain SDXL in
        the same round; on a GPU, further values (see `take_turns`). `at_full_size`: FLOP ratios, and the added weights
        in GB in half precision. `preparation`: see `measure_preparation`. `growth`, if requested: see `measure_growth`.
    """
    if torch.cuda.is_available():
        device, dtype, widths, pixels = torch.device("cuda"), torch.float16, SDXL_WIDTHS, SDXL_PIXELS
    else:
        device, dtype, widths, pixels = torch.device("cpu"), torch.float32, SMALL_WIDTHS, SMALL_PIXELS
    networks = Networks.random(widths, dtype, device)
    first, *others = pictures
    methods = take_turns(BenchSampler(networks, pixels, first).methods(steps), repeats, device, "pictures")
    found = {
        "size": {
            "pixels": pixels,
            "widths": widths,
            "steps": steps,
            "pictures": first,
            "repeats": repeats,
            "device": _name(device),
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).split(".")[-1],
        },
        "methods": methods,
        "at_full_size": at_full_size(steps),
        "preparation": measure_preparation(repeats),
    }
    if others:
        half = max(1, steps // 2)
        found["batches"] = {
            str(count): take_turns(
                BenchSampler(networks, pixels, count).methods(half), repeats, device, f"{count} each"
            )
            for count in others
        }
    if growth:
        found["growth"] = measure_growth(networks, pixels, repeats, device)
    return found


def measure_preparation(repeats: int) -> dict[str, float]:
    """Return the seconds of preparation before the first UNet call, with the miniature's networks.

    `first` is a person's first image; `again` is the median of the next ones, with the same photos but a different
    size, weight and position.
    """
    from facesnap_ext.engine import Engine
    from facesnap_ext.photos import Photo
    from facesnap_ext.settings.strength import Strength
    from facesnap_ext.settings.unit import Unit
    from facesnap_lab.miniature import shipped
    from facesnap_lab.miniature.measure import photo

    reference, driving = (Photo(photo("test", index, 0)[0], f"Person {index}") for index in (0, 1))
    unit = Unit(enabled=True, references=(reference,), driving=driving)
    seconds = []
    with TemporaryDirectory() as folder:
        shipped.write_models(Path(folder))
        engine = Engine(lambda: find_models(Path(folder)))
        for turn in range(repeats + 1):
            began = time.perf_counter()
            strength = Strength(weight=1 - turn / 100)
            engine.prepare(replace(unit, strength=strength, x=0.5 + turn / 100), 1024, 1024 + 64 * turn)
            seconds.append(time.perf_counter() - began)
    return {"first": round(seconds[0], 3), "again": round(statistics.median(seconds[1:]), 4)}


def take_turns(
    methods: dict[str, Callable[[], None]], repeats: int, device: torch.device, title: str
) -> dict[str, dict[str, float]]:
    """Return the medians of seconds and of the ratios to plain SDXL, taken round by round.

    On a GPU, also return its busy seconds and their ratio, which exclude waits for the CPU, and how far the peak memory
    in GB exceeds plain SDXL's. Weights are excluded, since all of them are loaded.
    """
    from tqdm import tqdm

    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in tqdm(range(repeats + 1), desc=title, unit="turn"):  # the first round is a warm-up
        for name, draw in methods.items():
            _wait_for(device)
            began = time.perf_counter()
            draw()
            _wait_for(device)
            took = time.perf_counter() - began
            if turn:
                seconds[name].append(took)
    found = {}
    for name, times in seconds.items():
        ratios = [time / plain for time, plain in zip(times, seconds[PLAIN])]
        found[name] = {"seconds": round(statistics.median(times), 4), "ratio": round(statistics.median(ratios), 4)}
    if device.type == "cuda":
        busy, peaks = ({name: measure(draw) for name, draw in methods.items()} for measure in (_busy, _peak))
        for name, row in found.items():
            row["gpu_seconds"] = round(busy[name], 4)
            row["gpu_ratio"] = round(busy[name] / (busy[PLAIN] or math.nan), 4)  # a profiler may record nothing
            row["added_activations_GB"] = round((peaks[name] - peaks[PLAIN]) / 1e9, 3)
    return found


def _busy(draw: Callable[[], None]) -> float:
    """Return how many seconds the GPU is busy."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        draw()
        torch.cuda.synchronize()
    events = (event for event in profiler.events() if event.device_type == DeviceType.CUDA)
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    total, done = 0.0, -math.inf
    for start, end in spans:  # kernels and copies, which may overlap
        total += max(0.0, end - max(start, done))
        done = max(done, end)
    return total / 1e6


def _peak(draw: Callable[[], None]) -> int:
    """Return the peak GPU memory in bytes, minus the memory that was allocated before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    draw()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def at_full_size(steps: int = STEPS) -> dict[str, dict[str, float]]:
    """Return each method's FLOPs relative to plain SDXL, and its added weights in GB in half precision, at 1024²."""
    sampler = _at_full_size()
    networks = sampler.networks

    def costs(network: FFRNet) -> tuple[int, int]:
        """What an image costs once, and what each run costs."""
        x, timestep = sampler.latents, torch.empty(1, device="meta")
        features, identity = network.embed_landmarks(sampler.landmark_image), network.embed_tokens(sampler.tokens)
        once = count(lambda: (network.embed_landmarks(sampler.landmark_image), network.embed_tokens(sampler.tokens)))
        return once, count(lambda: network(x, timestep, identity, features))

    plain = steps * _plain_step()
    flops = {PLAIN: plain}
    by_lightness = {False: costs(networks.ffrnet), True: costs(networks.light)}
    for name, (light, interval) in FACESNAP_VARIANTS.items():
        once, run = by_lightness[light]
        flops[name] = plain + once + -(-steps // interval) * run
    flops[CONTROLNET] = steps * count(lambda: sampler.controlnet(1))
    flops[INSTANTID] = steps * count(lambda: sampler.instantid(1))
    adapters = flops[INSTANTID] - flops[CONTROLNET]
    flops[INSTANTID_COND_ONLY] = flops["FaceSnap"] + adapters
    controlnet, light = (_gigabytes(network) for network in (networks.controlnet, networks.light))
    adapter = [processor for processor in sampler.adapter.values() if isinstance(processor, nn.Module)]
    projections = sum(parameter.numel() for processor in adapter for parameter in processor.parameters())
    weights = {PLAIN: 0.0, CONTROLNET: controlnet, INSTANTID: controlnet + 2 * projections / 1e9}
    weights[INSTANTID_COND_ONLY] = weights[INSTANTID]
    weights |= {name: light if is_light else controlnet for name, (is_light, _) in FACESNAP_VARIANTS.items()}
    return {
        name: {"flop_ratio": round(flops[name] / plain, 4), "added_weights_GB": round(weights[name], 3)}
        for name in flops
    }


def measure_growth(networks: Networks, pixels: int, repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Measure how the cost of an image of `GROWTH_STEPS` steps grows with the amount of work.

    Returns:
        The ratio of FaceSnap to plain SDXL (on a GPU, of busy seconds) by the number of people in an image, the side in
        pixels, and the batch size. For references, which enter the Mixer once per person, the ratio of the Mixer's
        FLOPs to the FLOPs of a plain image at full size.
    """
    found: dict[str, dict[str, float]] = {}
    for axis, values in GROWTH.items():
        found[axis] = {}
        for value in values:
            side = int(pixels * value) // 64 * 64 if axis == "side" else pixels
            sampler = BenchSampler(networks, side, value if axis == "pictures" else 1)
            people = value if axis == "people" else 1
            turns = {PLAIN: lambda sampler=sampler: sampler.plain(GROWTH_STEPS)}
            turns["FaceSnap"] = lambda sampler=sampler, people=people: sampler.facesnap(GROWTH_STEPS, people=people)
            label = str(side if axis == "side" else value)
            row = take_turns(turns, repeats, device, f"{axis} {label}")["FaceSnap"]
            found[axis][label] = row.get("gpu_ratio", row["ratio"])
    found["references"] = {str(count): mixer_flop_ratio(count) for count in REFERENCES}
    return found


def mixer_flop_ratio(references: int) -> float:
    """Return the Mixer's FLOPs for a person with that many references, relative to a plain 8-step image."""
    with torch.device("meta"):
        mixer = FacialAttributeMixer(MixerConfig()).eval().requires_grad_(False)
        features = torch.empty(1, references, 512), torch.empty(1, references, 257, 1280)
    return round(count(lambda: mixer(*features)) / (STEPS * _plain_step()), 6)


def as_text(found: dict[str, Any]) -> str:
    """Format the results as Markdown tables: one for the first batch size, and one for each further batch size."""
    text = _table(found["methods"], found["at_full_size"])
    for count, methods in found.get("batches", {}).items():
        text += f"\n\n{count} images per batch:\n\n{_table(methods, found['at_full_size'])}"
    return text


def _table(measured: dict[str, dict[str, float]], counted: dict[str, dict[str, float]]) -> str:
    on_gpu = "gpu_ratio" in measured[PLAIN]
    rows = []
    for name, row in measured.items():
        full = counted[name.removesuffix(COMPILED)]
        cells = [row["seconds"], f"{row['ratio']:.3f}"]
        if on_gpu:
            cells += [row["gpu_seconds"], f"{row['gpu_ratio']:.3f}"]
        cells += [f"{full['flop_ratio']:.3f}", full["added_weights_GB"]]
        if on_gpu:
            cells.append(round(full["added_weights_GB"] + row["added_activations_GB"], 2))
        rows.append((name, list(map(str, cells))))
    head = ["seconds", "relative to plain SDXL", *(["GPU busy, s", "relative to plain SDXL"] if on_gpu else [])]
    head += ["FLOPs relative to plain SDXL, 1024²", "added weights, GB", *(["added peak, GB"] if on_gpu else [])]
    return "\n".join(markdown_table(head, rows))


def flops_as_text(counted: dict[str, dict[str, float]]) -> str:
    """Format the result of `at_full_size` as a Markdown table."""
    rows = [(name, [f"{row['flop_ratio']:.3f}", str(row["added_weights_GB"])]) for name, row in counted.items()]
    return "\n".join(markdown_table(["FLOPs relative to plain SDXL, 1024²", "added weights, GB"], rows))


def draw_growth(growth: dict[str, dict[str, float]], path: Path) -> None:
    """Plot the result of `measure_growth`, one panel per curve."""
    from matplotlib.figure import Figure

    titles = {"people": "people per image", "side": "side in pixels", "pictures": "batch size"}
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    panels = figure.subplots(1, len(growth))
    for axes, (axis, curve) in zip(panels, growth.items()):
        work = [float(value) for value in curve]
        axes.plot(work, list(curve.values()), "o-", color="tab:blue")
        axes.set_xticks(work, list(curve))
        axes.set(xlabel=titles.get(axis, axis), ylim=(0, 1.15 * max(curve.values())))
    panels[0].set_ylabel("cost relative to plain SDXL")
    panels[-1].set(ylabel="Mixer FLOPs relative to one image", xlabel="references per person")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def count(run: Callable[[], Any]) -> int:
    """Return the FLOPs of a function that runs on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@cache
def _at_full_size() -> BenchSampler:
    return BenchSampler(Networks.random(SDXL_WIDTHS, torch.float32, torch.device("meta")), SDXL_PIXELS)


@cache
def _plain_step() -> int:
    """Return the FLOPs of one step of plain SDXL at full size."""
    return count(lambda: _at_full_size().plain(1))


def _gigabytes(network: nn.Module) -> float:
    return 2 * sum(parameter.numel() for parameter in network.parameters()) / 1e9


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
