"""`facesnap compress`: make a FaceSnap file smaller."""

from __future__ import annotations

import argparse
from pathlib import Path

from facesnap_ext.cli.common import non_negative_int
from facesnap_ext.errors import FaceSnapError

HELP = "make a FaceSnap file smaller: fewer transformer blocks, 8-bit weights, or both"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="FaceSnap file to compress")
    parser.add_argument("out", type=Path, help="FaceSnap file to write")
    parser.add_argument(
        "--blocks",
        type=non_negative_int,
        help="transformer blocks to keep in each attention layer of FFRNet's deepest level, such as 2; the file then "
        "needs more training",
    )
    parser.add_argument("--fp8", action="store_true", help="store FFRNet's matrices in 8 bits")


def run(options: argparse.Namespace) -> None:
    from facesnap_ext.weights.compress import compress

    if options.blocks is None and not options.fp8:
        raise FaceSnapError("Choose how to compress the file: --blocks 2, --fp8, or both.")
    compress(options.source, options.out, options.blocks, options.fp8)
    print(options.out)
