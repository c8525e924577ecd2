"""What the options of `facesnap evaluate` ask for: which list, which judges, and FaceSnap's pictures or none."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity import faces
from facesnap_ext.weights.search import find_models
from facesnap_lab.evaluation.draw import EvaluationPipeline, load_pipeline, processes
from facesnap_lab.evaluation.evaluate import evaluate, named_folders
from facesnap_lab.evaluation.judges import Judges, load_clip, load_face_judge, load_inception
from facesnap_lab.evaluation.protocol import read_protocol
from facesnap_lab.evaluation.report import table


def run(options: argparse.Namespace) -> str | None:
    """Evaluate and return the table; None in processes other than accelerate's first.

    Raises:
        FaceSnapError: as `evaluate`, or options that do not go together.
    """
    others = named_folders(options.pictures)
    device = processes().device
    with tempfile.TemporaryDirectory() as temporary:
        if options.miniature:
            found = _miniature(options, others, device, Path(temporary))
        elif options.list is None:
            raise FaceSnapError("There is no list to evaluate; give one, or --miniature to try the command.")
        else:
            protocol = read_protocol(options.list)
            found = evaluate(protocol, _judges(options, device), others, options.out, _studio(options, device))
    return None if found is None else table(found)


def _miniature(options: argparse.Namespace, others: dict[str, Path], device: torch.device, models: Path):
    from facesnap_lab.evaluation.miniature import (
        DRIVER,
        STEPS,
        miniature_judges,
        miniature_pipeline,
        miniature_protocol,
    )

    given = [name for name in ("list", "base", "models", "clip", "facenet", "inception") if getattr(options, name)]
    if given:
        raise FaceSnapError(f"--miniature brings its own {given[0]}; leave out one of the two.")
    if not 1 <= options.people <= DRIVER:
        raise FaceSnapError(f"--people is {options.people}; give a number from 1 to {DRIVER}.")
    with processes().main_process_first():
        protocol = miniature_protocol(options.out / "world", options.people)
    studio = miniature_pipeline(models, device, options.steps or STEPS, options.scale)
    return evaluate(protocol, miniature_judges(), others, options.out, studio)


def _judges(options: argparse.Namespace, device: torch.device) -> Judges:
    """Of what was given; the detector is that of the models folder."""
    clip = load_clip(options.clip, device) if options.clip else None
    extractor = load_inception(options.inception, device) if options.inception else None
    pack = embed = None
    if clip or options.facenet:
        if options.models is None:
            raise FaceSnapError(
                "CLIP-face and FaceSim need a face detector; give the folder that has it with --models."
            )
        pack = faces.load_pack(
            find_models(options.models).require("face_pack"), "cuda" if device.type == "cuda" else "cpu"
        )
    if options.facenet:
        pack, embed = load_face_judge(options.facenet, pack)
    return Judges(clip, pack, embed, options.facenet.name if options.facenet else "", extractor)


def _studio(options: argparse.Namespace, device: torch.device) -> EvaluationPipeline | None:
    if options.base is None:
        return None
    if options.models is None:
        raise FaceSnapError("FaceSnap needs its model files to draw; give their folder with --models.")
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
