"""`facesnap demo`: show every stage of FaceSnap in one image."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "run every stage on a person of the miniature world"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), help="image to write (default: out/demo.png)")


def run(options: argparse.Namespace) -> None:
    from facesnap_lab.miniature.demo import demo

    demo(options.out)
    print(options.out)
