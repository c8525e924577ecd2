"""`facesnap evaluate`: measure FaceSnap and other methods as in the paper's Table 1."""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facesnap_ext.cli.common import DTYPES, positive_int
from facesnap_ext.errors import FaceSnapError

if TYPE_CHECKING:
    import torch

    from facesnap_lab.evaluation.draw import Generator
    from facesnap_lab.evaluation.judges import JudgeFiles

HELP = "measure FaceSnap and other methods as in the paper's Table 1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("list", type=Path, nargs="?", help="YAML or JSON file, described in docs/evaluation.md")
    parser.add_argument("--miniature", action="store_true", help="use the miniature world instead of a list")
    parser.add_argument("--people", type=int, default=10, help="number of people in the miniature (default: 10)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images and the report")
    parser.add_argument(
        "--pictures",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="images that another method generated from the same list; may be repeated",
    )
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="METHOD=PATH",
        help="published weights of ip-adapter, instantid or photomaker to generate images with; may be repeated",
    )
    parser.add_argument("--base", type=Path, help="SDXL checkpoint or diffusers folder to generate images with")
    parser.add_argument("--base-config", type=Path, help="folder with SDXL's configuration, for a single-file --base")
    parser.add_argument("--models", type=Path, help="folder with FaceSnap's model files, face model packs and CLIP")
    parser.add_argument("--model", default="", help="name of the FaceSnap file, if the folder has more than one")
    parser.add_argument("--clip", type=Path, help="CLIP model in transformers format, for CLIP-T and CLIP-face")
    parser.add_argument("--facenet", type=Path, help="face recognition network in ONNX or TorchScript, for FaceSim")
    parser.add_argument("--inception", type=Path, help="TorchScript file inception-2015-12-05.pt, for FID")
    parser.add_argument("--width", type=int, default=1024, help="image width in pixels (default: 1024)")
    parser.add_argument("--height", type=int, default=1024, help="image height in pixels (default: 1024)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: 8, as in the paper; 12 in the miniature)")
    parser.add_argument(
        "--scale", type=float, default=2.0, help="classifier-free guidance scale (default: 2, as in the paper)"
    )
    parser.add_argument(
        "--workers", type=positive_int, default=0, help="processes that measure images (default: the command's own)"
    )
    parser.add_argument(
        "--scheduler", default="", metavar="ADDRESS", help="measure on the workers of this dask scheduler instead"
    )
    parser.add_argument("--upload", metavar="URL", help="also copy the content of --out here, such as s3://bucket/run")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="dtype of the base model (default: float16)")


def run(options: argparse.Namespace) -> None:
    """Evaluate and print the table. Only accelerate's main process prints."""
    from facesnap_lab.evaluation.draw import processes
    from facesnap_lab.evaluation.evaluate import evaluate, named_folders
    from facesnap_lab.evaluation.judges import load_judges
    from facesnap_lab.evaluation.protocol import read_protocol
    from facesnap_lab.evaluation.report import table
    from facesnap_lab.storage import location, upload_folder

    others = named_folders(options.pictures)
    upload = None if options.upload is None else location(options.upload)
    if isinstance(upload, Path):
        raise FaceSnapError(f"--upload is {upload}, but must be a URL such as s3://bucket/run.")
    device = processes().device
    with tempfile.TemporaryDirectory() as temporary:
        if options.miniature:
            results = _evaluate_miniature(options, others, device, Path(temporary))
        elif options.list is None:
            raise FaceSnapError("There is no list to evaluate; specify one, or try the command with --miniature.")
        else:
            protocol = read_protocol(options.list)
            files = _judge_files(options)
            judges, generators = load_judges(files, device), _generators(options, device)
            results = evaluate(
                *(protocol, judges, others, options.out, generators, partial(load_judges, files)),
                *(options.workers, options.scheduler),
            )
    if results is not None:
        print(table(results))
        if upload is not None:
            upload_folder(upload, options.out)


def _evaluate_miniature(
    options: argparse.Namespace, others: dict[str, Path], device: torch.device, models: Path
) -> dict[str, Any] | None:
    from facesnap_lab.evaluation.draw import processes
    from facesnap_lab.evaluation.evaluate import FACESNAP, evaluate
    from facesnap_lab.evaluation.miniature import (
        DRIVER,
        STEPS,
        miniature_judges,
        miniature_pipeline,
        miniature_protocol,
    )

    given = [
        name for name in ("list", "base", "models", "method", "clip", "facenet", "inception") if getattr(options, name)
    ]
    if given:
        raise FaceSnapError(f"--miniature provides its own {given[0]}; omit one of the two.")
    if not 1 <= options.people <= DRIVER:
        raise FaceSnapError(f"--people is {options.people}; choose a number from 1 to {DRIVER}.")
    with processes().main_process_first():
        protocol = miniature_protocol(options.out.absolute() / "world", options.people)
    pipeline = miniature_pipeline(models, device, options.steps or STEPS, options.scale)
    return evaluate(
        *(protocol, miniature_judges(), others, options.out, {FACESNAP: pipeline}, miniature_judges),
        *(options.workers, options.scheduler),
    )


def _judge_files(options: argparse.Namespace) -> JudgeFiles:
    from facesnap_lab.evaluation.judges import JudgeFiles

    paths = (options.clip, options.facenet, options.inception, options.models)
    return JudgeFiles(*(path and path.absolute() for path in paths))


def _generators(options: argparse.Namespace, device: torch.device) -> dict[str, Generator]:
    """Return FaceSnap and the methods of `--method` by name. FaceSnap is left out if only the methods' files exist."""
    import torch

    from facesnap_ext.weights.search import find_models
    from facesnap_lab.evaluation.draw import facesnap_pipeline, load_base_sampler
    from facesnap_lab.evaluation.evaluate import FACESNAP
    from facesnap_lab.evaluation.rivals import open_rivals

    if options.base is None:
        if options.method:
            raise FaceSnapError(f"--method {options.method[0]} generates images; specify the SDXL model with --base.")
        return {}
    if options.models is None:
        raise FaceSnapError("FaceSnap needs its model files to generate images; specify their folder with --models.")
    base = load_base_sampler(
        *(options.base, options.base_config, device, getattr(torch, options.dtype)),
        width=options.width,
        height=options.height,
        steps=options.steps or 8,
        scale=options.scale,
    )
    generators = open_rivals(options.method, base, options.models)
    sources = find_models(options.models).facesnap.values()
    if generators and not options.model and all(isinstance(source, tuple) for source in sources):  # InstantID's pair
        print(f"{options.models} has no FaceSnap file, so only the other methods are evaluated.", file=sys.stderr)
        return generators
    facesnap = facesnap_pipeline(base, lambda: find_models(options.models), options.model)
    return {FACESNAP: facesnap} | generators
