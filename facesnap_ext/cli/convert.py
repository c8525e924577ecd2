"""`facesnap convert`: turn published files into files that FaceSnap reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from facesnap_ext.errors import FaceSnapError

HELP = "convert a DECA, FLAME, MediaPipe, ControlNet or InstantID file to a file that FaceSnap reads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="+",
        help="deca_model.tar, generic_model.pkl, MediaPipe's face_landmarker.task, or an SDXL ControlNet in diffusers "
        "format; or 'instantid CONTROLNET ADAPTER OUT' to pack InstantID's two files into one",
    )
    parser.add_argument(
        "--out", type=Path, help="output file (default: a .safetensors or .onnx file next to the source)"
    )


def run(options: argparse.Namespace) -> None:
    from facesnap_ext.convert import convert, convert_instantid

    first, *others = options.source
    if first == "instantid" and len(others) == 3 and options.out is None:
        print(convert_instantid(*map(Path, others)))
    elif others:
        raise FaceSnapError("Give one file to convert, or 'instantid CONTROLNET ADAPTER OUT'.")
    else:
        print(convert(Path(first), options.out))
