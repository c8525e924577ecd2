"""`facesnap evaluate`: measure FaceSnap and other methods as in the paper's Table 1."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facesnap_ext.cli.common import DTYPES
from facesnap_ext.errors import FaceSnapError

if TYPE_CHECKING:
    import torch

    from facesnap_lab.evaluation.draw import EvaluationPipeline
    from facesnap_lab.evaluation.judges import Judges

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
    parser.add_argument("--base", type=Path, help="SDXL checkpoint or diffusers folder to generate images with")
    parser.add_argument("--base-config", type=Path, help="folder with SDXL's configuration, for a single-file --base")
    parser.add_argument("--models", type=Path, help="folder with FaceSnap's model files")
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
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="dtype of the base model (default: float16)")


def run(options: argparse.Namespace) -> None:
    """Evaluate and print the table. Only accelerate's main process prints."""
    from facesnap_lab.evaluation.draw import processes
    from facesnap_lab.evaluation.evaluate import evaluate, named_folders
    from facesnap_lab.evaluation.protocol import read_protocol
    from facesnap_lab.evaluation.report import table

    others = named_folders(options.pictures)
    device = processes().device
    with tempfile.TemporaryDirectory() as temporary:
        if options.miniature:
            results = _evaluate_miniature(options, others, device, Path(temporary))
        elif options.list is None:
            raise FaceSnapError("There is no list to evaluate; specify one, or try the command with --miniature.")
        else:
            protocol = read_protocol(options.list)
            results = evaluate(protocol, _judges(options, device), others, options.out, _pipeline(options, device))
    if results is not None:
        print(table(results))


def _evaluate_miniature(
    options: argparse.Namespace, others: dict[str, Path], device: torch.device, models: Path
) -> dict[str, Any] | None:
    from facesnap_lab.evaluation.draw import processes
    from facesnap_lab.evaluation.evaluate import evaluate
    from facesnap_lab.evaluation.miniature import (
        DRIVER,
        STEPS,
        miniature_judges,
        miniature_pipeline,
        miniature_protocol,
    )

    given = [name for name in ("list", "base", "models", "clip", "facenet", "inception") if getattr(options, name)]
    if given:
        raise FaceSnapError(f"--miniature provides its own {given[0]}; omit one of the two.")
    if not 1 <= options.people <= DRIVER:
        raise FaceSnapError(f"--people is {options.people}; choose a number from 1 to {DRIVER}.")
    with processes().main_process_first():
        protocol = miniature_protocol(options.out / "world", options.people)
    pipeline = miniature_pipeline(models, device, options.steps or STEPS, options.scale)
    return evaluate(protocol, miniature_judges(), others, options.out, pipeline)


def _judges(options: argparse.Namespace, device: torch.device) -> Judges:
    """Load the networks used for measuring. The face detector comes from `--models`."""
    from facesnap_ext.identity import faces
    from facesnap_ext.weights.search import find_models
    from facesnap_lab.evaluation.judges import Judges, load_clip, load_face_judge, load_inception

    clip = load_clip(options.clip, device) if options.clip else None
    extractor = load_inception(options.inception, device) if options.inception else None
    pack = embed = None
    if clip or options.facenet:
        if options.models is None:
            raise FaceSnapError("CLIP-face and FaceSim need a face detector; specify its folder with --models.")
        face_pack = find_models(options.models).require("face_pack")
        pack = faces.load_pack(face_pack, "cuda" if device.type == "cuda" else "cpu")
    if options.facenet:
        pack, embed = load_face_judge(options.facenet, pack)
    return Judges(clip, pack, embed, options.facenet.name if options.facenet else "", extractor)


def _pipeline(options: argparse.Namespace, device: torch.device) -> EvaluationPipeline | None:
    import torch

    from facesnap_ext.weights.search import find_models
    from facesnap_lab.evaluation.draw import load_pipeline

    if options.base is None:
        return None
    if options.models is None:
        raise FaceSnapError("FaceSnap needs its model files to generate images; specify their folder with --models.")
    return load_pipeline(
        options.base,
        options.base_config,
        lambda: find_models(options.models),
        device,
        getattr(torch, options.dtype),
        model=options.model,
        width=options.width,
        height=options.height,
        steps=options.steps or 8,
        scale=options.scale,
    )
