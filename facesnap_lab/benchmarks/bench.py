"""What FaceSnap costs beside plain SDXL, and beside a ControlNet on both rows and InstantID's shape.

All ways take turns in one process, so that whatever else the machine does falls on all of them. FLOPs are counted on
the meta device at SDXL's real size.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
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
from facesnap_lab.benchmarks.sampler import BOTH_ROWS, COMPILED, INSTANTID, OWN, PLAIN, BenchSampler, Networks
from facesnap_lab.markdown import markdown_table

STEPS = 8  # of a picture, the paper's
SDXL_WIDTHS, SDXL_PIXELS = (320, 640, 1280), 1024
SMALL_WIDTHS, SMALL_PIXELS = (64, 128, 256), 512
GROWTH = {"people": (1, 2, 4), "side": (0.5, 1.0, 1.5), "pictures": (1, 2, 4, 8)}  # side: of the usual one
GROWTH_STEPS = 4
REFERENCES = (1, 2, 4, 8)


def bench(repeats: int = 5, steps: int = STEPS, growth: bool = False) -> dict[str, Any]:
    """Measure a picture drawn in each way.

    With a GPU at SDXL's size in half precision, else at a fifth of the widths and 512² in single precision.

    Returns:
        `size`: of what was timed. `methods`: for each the median of its seconds a picture, and of their ratio to plain
        SDXL's in the same turn; with a GPU more, see `take_turns`. `at_full_size`: ratios of FLOPs, and the GB of
        added weights in half precision. `preparation`, and `growth` where it is asked for: see `measure_preparation`
        and `measure_growth`.
    """
    if torch.cuda.is_available():
        device, dtype, widths, pixels = torch.device("cuda"), torch.float16, SDXL_WIDTHS, SDXL_PIXELS
    else:
        device, dtype, widths, pixels = torch.device("cpu"), torch.float32, SMALL_WIDTHS, SMALL_PIXELS
    networks = Networks.random(widths, dtype, device)
    methods = take_turns(BenchSampler(networks, pixels).methods(steps), repeats, device, "pictures")
    found = {
        "size": {
            "pixels": pixels,
            "widths": widths,
            "steps": steps,
            "repeats": repeats,
            "device": _name(device),
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).split(".")[-1],
        },
        "methods": methods,
        "at_full_size": at_full_size(steps),
        "preparation": measure_preparation(repeats),
    }
    if growth:
        found["growth"] = measure_growth(networks, pixels, repeats, device)
    return found


def measure_preparation(repeats: int) -> dict[str, float]:
    """Seconds before the first call of the UNet, with the miniature's networks: of the first picture of a person, and
    of the next ones with the same photos and another size, weight and place, as a median."""
    from facesnap_ext.engine import Engine
    from facesnap_ext.photos import Photo
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
            engine.prepare(replace(unit, weight=1 - turn / 100, x=0.5 + turn / 100), 1024, 1024 + 64 * turn)
            seconds.append(time.perf_counter() - began)
    return {"first": round(seconds[0], 3), "again": round(statistics.median(seconds[1:]), 4)}


def take_turns(
    methods: dict[str, Callable[[], None]], repeats: int, device: torch.device, title: str
) -> dict[str, dict[str, float]]:
    """Medians of seconds, and of the ratios to plain SDXL turn by turn.

    With a GPU also the seconds in which it was busy, and their ratio, without the waits for a slow processor; and the
    peak memory in GB beyond plain SDXL's, but for the weights, which all lie there.
    """
    from tqdm import tqdm

    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in tqdm(range(repeats + 1), desc=title, unit="turn"):  # the first one warms up
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
            row["gpu_ratio"] = round(busy[name] / (busy[PLAIN] or math.nan), 4)  # a profiler may see nothing
            row["added_activations_GB"] = round((peaks[name] - peaks[PLAIN]) / 1e9, 3)
    return found


def _busy(draw: Callable[[], None]) -> float:
    """Seconds in which the GPU computes."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        draw()
        torch.cuda.synchronize()
    events = (event for event in profiler.events() if event.device_type == DeviceType.CUDA)
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    total, done = 0.0, -math.inf
    for start, end in spans:  # of kernels and copies, which may overlap
        total += max(0.0, end - max(start, done))
        done = max(done, end)
    return total / 1e6


def _peak(draw: Callable[[], None]) -> int:
    """Bytes of the GPU's memory that are in use at most, beyond those before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    draw()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def at_full_size(steps: int = STEPS) -> dict[str, dict[str, float]]:
    """For each way at SDXL's size and 1024² the ratio of its FLOPs a picture to plain SDXL's, and the GB of weights in
    half precision that it adds."""
    easel = _at_full_size()
    networks = easel.networks

    def runs(network: FFRNet, times: int) -> int:
        x, timestep = easel.latents, torch.empty(1, device="meta")
        features, identity = network.embed_landmarks(easel.drawing), network.embed_tokens(easel.tokens)
        once = count(lambda: (network.embed_landmarks(easel.drawing), network.embed_tokens(easel.tokens)))
        return once + times * count(lambda: network(x, timestep, identity, features))

    plain = steps * _plain_step()
    flops = {PLAIN: plain}
    for name, (light, every) in OWN.items():
        flops[name] = plain + runs(networks.light if light else networks.ffrnet, -(-steps // every))
    flops[BOTH_ROWS] = steps * count(lambda: easel.both_rows(1))
    flops[INSTANTID] = steps * count(lambda: easel.instantid(1))
    controlnet, light = (_gigabytes(network) for network in (networks.controlnet, networks.light))
    adapter = [processor for processor in easel.adapter.values() if isinstance(processor, nn.Module)]
    projections = sum(parameter.numel() for processor in adapter for parameter in processor.parameters())
    weights = {PLAIN: 0.0, BOTH_ROWS: controlnet, INSTANTID: controlnet + 2 * projections / 1e9}
    weights |= {name: light if is_light else controlnet for name, (is_light, _) in OWN.items()}
    return {
        name: {"flop_ratio": round(flops[name] / plain, 4), "added_weights_GB": round(weights[name], 3)}
        for name in flops
    }


def measure_growth(networks: Networks, pixels: int, repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """How the cost of a picture of `GROWTH_STEPS` steps grows with work: the ratio of FaceSnap to plain SDXL, with a
    GPU of the seconds in which it is busy, for several people in a picture, sides of the picture in pixels, and
    pictures at once; for several references, which enter the Mixer once a person, the Mixer's FLOPs to those of a
    plain picture at full size."""
    found: dict[str, dict[str, float]] = {}
    for axis, values in GROWTH.items():
        found[axis] = {}
        for value in values:
            side = int(pixels * value) // 64 * 64 if axis == "side" else pixels
            easel = BenchSampler(networks, side, value if axis == "pictures" else 1)
            people = value if axis == "people" else 1
            turns = {PLAIN: lambda easel=easel: easel.plain(GROWTH_STEPS)}
            turns["FaceSnap"] = lambda easel=easel, people=people: easel.facesnap(GROWTH_STEPS, people=people)
            shown = str(side if axis == "side" else value)
            row = take_turns(turns, repeats, device, f"{axis} {shown}")["FaceSnap"]
            found[axis][shown] = row.get("gpu_ratio", row["ratio"])
    found["references"] = {str(count): mixer_flop_ratio(count) for count in REFERENCES}
    return found


def mixer_flop_ratio(references: int) -> float:
    """FLOPs of the paper's Mixer for a person of so many references, to those of a plain picture of 8 steps."""
    with torch.device("meta"):
        mixer = FacialAttributeMixer(MixerConfig()).eval().requires_grad_(False)
        features = torch.empty(1, references, 512), torch.empty(1, references, 257, 1280)
    return round(count(lambda: mixer(*features)) / (STEPS * _plain_step()), 6)


def as_text(found: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    measured, counted = found["methods"], found["at_full_size"]
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
    head = ["seconds", "to plain SDXL", *(["GPU busy, s", "to plain SDXL"] if on_gpu else [])]
    head += ["FLOPs to plain SDXL, 1024²", "added weights, GB", *(["added peak, GB"] if on_gpu else [])]
    return "\n".join(markdown_table(head, rows))


def draw_growth(growth: dict[str, dict[str, float]], path: Path) -> None:
    """A picture of `measure_growth`, one curve a panel."""
    from matplotlib.figure import Figure

    titles = {"people": "people in a picture", "side": "side in pixels", "pictures": "pictures at once"}
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    panels = figure.subplots(1, len(growth))
    for axes, (axis, curve) in zip(panels, growth.items()):
        work = [float(value) for value in curve]
        axes.plot(work, list(curve.values()), "o-", color="tab:blue")
        axes.set_xticks(work, list(curve))
        axes.set(xlabel=titles.get(axis, axis), ylim=(0, 1.15 * max(curve.values())))
    panels[0].set_ylabel("a picture to plain SDXL's")
    panels[-1].set(ylabel="Mixer's FLOPs to a picture's", xlabel="references of a person")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def count(run: Callable[[], Any]) -> int:
    """FLOPs of what a function does on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@cache
def _at_full_size() -> BenchSampler:
    return BenchSampler(Networks.random(SDXL_WIDTHS, torch.float32, torch.device("meta")), SDXL_PIXELS)


@cache
def _plain_step() -> int:
    """FLOPs of plain SDXL's step at full size."""
    return count(lambda: _at_full_size().plain(1))


def _gigabytes(network: nn.Module) -> float:
    return 2 * sum(parameter.numel() for parameter in network.parameters()) / 1e9


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
