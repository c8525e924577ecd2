"""`facesnap identity`: check reference photos, and save their features as an identity."""

from __future__ import annotations

import argparse
from pathlib import Path

from facesnap_ext.cli.common import print_progress, print_result

HELP = "check reference photos of one person, and save them as an identity"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photo", type=Path, nargs="+", help="reference photos of one person")
    parser.add_argument("--models", type=Path, required=True, help="folder with the model files")
    parser.add_argument(
        "--out", metavar="NAME", help="save the identity under a name or as a .safetensors file (default: only check)"
    )
    parser.add_argument("--face-index", type=int, default=0, help="face to use in each photo (default: 0 = largest)")
    parser.add_argument("--overwrite", action="store_true", help="replace an identity of the same name")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> None:
    from facesnap_ext import photos
    from facesnap_ext.engine import Engine
    from facesnap_ext.identity.saved import save_identity
    from facesnap_ext.weights.search import find_models

    engine = Engine(lambda: find_models(options.models))
    references = [photos.from_path(path) for path in options.photo]
    report = engine.examine(references, options.face_index)
    result = {**report.to_json(), "written": None}
    if not options.json:
        print("\n".join(report.lines()))
    if options.out:
        out = Path(options.out)
        file = None  # a name without a path refers to the model folder
        if out.suffix == ".safetensors" or len(out.parts) > 1:
            file = out.with_name(f"{out.name.removesuffix('.safetensors')}.safetensors")
        written = save_identity(
            engine.encoders(engine.files(print_progress)),
            references,
            file.stem if file else options.out,
            file,
            face_index=options.face_index,
            overwrite=options.overwrite,
            progress=print_progress,
        )
        result["written"] = str(written)
    if options.json:
        print_result(result, as_json=True)
    elif options.out:
        print(result["written"])
