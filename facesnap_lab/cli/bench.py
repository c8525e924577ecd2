"""`facesnap bench`: measure the cost of FaceSnap."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from facesnap_ext.cli.common import positive_int

HELP = "compare the cost of FaceSnap with plain SDXL and with other ways to condition it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repeats", type=positive_int, default=5, help="repetitions; the median is reported (default: 5)"
    )
    parser.add_argument("--steps", type=positive_int, default=8, help="sampling steps (default: 8, as in the paper)")
    parser.add_argument("--growth", type=Path, metavar="PNG", help="also measure how cost scales, and plot it")
    parser.add_argument(
        "--flops", action="store_true", help="only count FLOPs and weights at SDXL's size, which takes a few seconds"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> None:
    from facesnap_lab.benchmarks.bench import as_text, at_full_size, bench, draw_growth, flops_as_text

    if options.flops:
        counted = at_full_size(options.steps)
        print(json.dumps({"at_full_size": counted}, indent=2) if options.json else flops_as_text(counted))
        return
    result = bench(options.repeats, options.steps, options.growth is not None)
    if options.growth is not None:
        draw_growth(result["growth"], options.growth)
    print(json.dumps(result, indent=2) if options.json else as_text(result))
