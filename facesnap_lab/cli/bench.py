"""`facesnap bench`: measure the cost of FaceSnap."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from facesnap_ext.cli.common import positive_int
from facesnap_ext.errors import FaceSnapError

HELP = "compare the cost of FaceSnap with plain SDXL, or profile the start of jobs at real sizes"
METHODS, FIRST, REHEARSAL, GPU = "methods", "first", "rehearsal", "gpu"
DEVICE_SCRIPT = {"repeats": 2, "pictures": (1, 4)}  # what `gpu` measures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        choices=(METHODS, FIRST, REHEARSAL, GPU),
        default=METHODS,
        help="methods (default): seconds per image of each method; gpu: the same for one and four images, in a few "
        "minutes; first: the phases from a job's start to its first UNet call; rehearsal: complete jobs. The last two "
        "use model files with random numbers",
    )
    parser.add_argument(
        "--repeats", type=positive_int, default=5, help="repetitions; the median is reported (default: 5)"
    )
    parser.add_argument("--steps", type=positive_int, default=8, help="sampling steps (default: 8, as in the paper)")
    parser.add_argument("--growth", type=Path, metavar="PNG", help="also measure how cost scales, and plot it")
    parser.add_argument(
        "--flops", action="store_true", help="only count FLOPs and weights at SDXL's size, which takes a few seconds"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    jobs = parser.add_argument_group("first and rehearsal")
    jobs.add_argument(
        "--files",
        choices=("instantid", "facesnap"),
        default="instantid",
        help="InstantID's pair and a face model pack (default), or a FaceSnap file with CLIP, DECA and FLAME",
    )
    jobs.add_argument(
        "--folder", type=Path, help="keep the model files here and use them again; 4.3 GB, or 4.7 GB for facesnap"
    )
    jobs.add_argument("--small", action="store_true", help="use small networks, to try the command")
    jobs.add_argument("--pixels", type=positive_int, default=1024, help="side of the image (default: 1024)")
    jobs.add_argument("--device", default="cpu", help="device of the UNet (default: cpu)")


def run(options: argparse.Namespace) -> None:
    from facesnap_lab.benchmarks.bench import as_text, at_full_size, bench, draw_growth, flops_as_text

    if options.what in (FIRST, REHEARSAL):
        _run_jobs(options)
        return
    if options.flops:
        counted = at_full_size(options.steps)
        print(json.dumps({"at_full_size": counted}, indent=2) if options.json else flops_as_text(counted))
        return
    chosen = DEVICE_SCRIPT if options.what == GPU else {"repeats": options.repeats}
    result = bench(steps=options.steps, growth=options.growth is not None, **chosen)
    if options.growth is not None:
        draw_growth(result["growth"], options.growth)
    print(json.dumps(result, indent=2) if options.json else as_text(result))


def _run_jobs(options: argparse.Namespace) -> None:
    import torch

    from facesnap_lab.benchmarks.first import as_text, profile
    from facesnap_lab.benchmarks.random_files import FULL_SIZE, SMALL_SIZE, write_models

    if options.pixels % 64:
        raise FaceSnapError(f"--pixels is {options.pixels}, which is not a multiple of 64; choose a multiple.")
    sizes = SMALL_SIZE if options.small else FULL_SIZE
    with TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if not folder.is_dir() or not any(folder.iterdir()):
            write_models(folder, options.files, sizes)
        dtype = torch.bfloat16 if options.device == "cpu" else torch.float16
        steps = options.steps if options.what == REHEARSAL else 0
        jobs = profile(folder, sizes, steps, options.pixels, options.device, dtype)
    print(json.dumps({"jobs": jobs}, indent=2) if options.json else as_text(jobs))
