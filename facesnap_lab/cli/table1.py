"""`facesnap table1`: train FaceSnap and its rivals in the miniature's second edition, and compare them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from facesnap_ext.cli.common import positive_int

HELP = "train and compare the methods of the paper's Table 1 in the miniature world"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stages", type=Path, help="folder of all stages of the miniature's second edition")
    parser.add_argument(
        "--out", type=Path, required=True, help="output folder; results that are already in it are kept"
    )
    parser.add_argument("--steps", type=positive_int, help="training steps of each method (default: FaceSnap's)")
    parser.add_argument("--people", type=positive_int, default=200, help="number of people (default: 200)")
    parser.add_argument(
        "--images", type=positive_int, help="images of each person (default: one for each pose and prompt)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the training (default: 0 1 2)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time after which training stops; resumable")


def run(options: argparse.Namespace) -> None:
    from facesnap_lab.evaluation.draw import processes
    from facesnap_lab.table1.run import run as run_table
    from facesnap_lab.table1.world import second_edition

    out = options.out.absolute()
    world = second_edition(
        options.stages, out / "world", options.people, options.images, options.steps, processes().device
    )
    table = run_table(world, out, options.seeds, options.minutes)
    print(table or "Time is up; run the command again to continue.")
