"""`facesnap init`: create the FaceSnap file that training starts from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from facesnap_ext.cli.common import DTYPES

HELP = "create a FaceSnap file to start training from"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("checkpoint", type=Path, nargs="?", help="SDXL checkpoint (.safetensors)")
    source.add_argument("--instantid", type=Path, metavar="FOLDER", help="start from InstantID's files in this folder")
    parser.add_argument("--out", type=Path, required=True, help="FaceSnap file to write")
    parser.add_argument(
        "--head-dim", type=int, default=64, help="channels per attention head (default: 64, as in SDXL)"
    )
    parser.add_argument(
        "--size-dim", type=int, default=256, help="channels per embedded image size (default: 256, as in SDXL)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16, or the dtype of InstantID's files")


def run(options: argparse.Namespace) -> None:
    import torch

    from facesnap_ext.weights.initialise import initialise
    from facesnap_ext.weights.instantid import from_instantid

    settings: dict[str, Any] = {"head_dim": options.head_dim, "size_dim": options.size_dim, "seed": options.seed}
    if options.dtype:
        settings["dtype"] = getattr(torch, options.dtype)
    if options.instantid:
        from_instantid(options.instantid, options.out, **settings)
    else:
        initialise(options.checkpoint, options.out, **settings)
    print(options.out)
