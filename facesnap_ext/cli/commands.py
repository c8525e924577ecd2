"""What each command of `cli` does with its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from facesnap_ext.errors import FaceSnapError


def run_convert(options: argparse.Namespace) -> None:
    from facesnap_ext.convert import convert, convert_instantid

    first, *others = options.source
    if first == "instantid" and len(others) == 3 and options.out is None:
        print(convert_instantid(*map(Path, others)))
    elif others:
        raise FaceSnapError("Give one file to convert, or 'instantid CONTROLNET ADAPTER OUT'.")
    else:
        print(convert(Path(first), options.out))


def run_init(options: argparse.Namespace) -> None:
    import torch

    from facesnap_ext.weights.initialise import initialise
    from facesnap_ext.weights.instantid import from_instantid

    chosen = {"head_dim": options.head_dim, "size_dim": options.size_dim, "seed": options.seed}
    if options.dtype:
        chosen["dtype"] = getattr(torch, options.dtype)
    if options.instantid:
        from_instantid(options.instantid, options.out, **chosen)
    else:
        initialise(options.checkpoint, options.out, **chosen)
    print(options.out)


def run_compress(options: argparse.Namespace) -> None:
    from facesnap_ext.weights.compress import compress

    if options.blocks is None and not options.fp8:
        raise FaceSnapError("Say how the file is to become lighter: --blocks 2, --fp8, or both.")
    compress(options.source, options.out, options.blocks, options.fp8)
    print(options.out)


def run_prepare(options: argparse.Namespace) -> None:
    from facesnap_ext.cli.prepare import prepare

    result = prepare(
        options.photo,
        options.drive,
        options.models,
        options.out,
        model=options.model,
        face=options.face,
        reference_mode=options.reference_mode,
        width=options.width,
        height=options.height,
        progress=lambda message: print(message, file=sys.stderr),
    )
    _print(result, options.json)


def run_models(options: argparse.Namespace) -> None:
    from facesnap_ext.weights.model_list import as_text, compute_hashes, list_models, to_json

    files = _model_files(options)
    if options.hash:
        compute_hashes(files, lambda message: print(message, file=sys.stderr))
    roles = list_models(files)
    if options.json:
        places = {"folder": str(files.folder), "elsewhere": [str(place) for place in files.elsewhere]}
        _print({**places, "passed_over": files.passed_over, "parts": to_json(roles)}, as_json=True)
    else:
        print(as_text(roles, files))


def run_models_get(options: argparse.Namespace) -> None:
    from facesnap_ext.weights.download import download, part_to_download

    files = _model_files(options)
    part = part_to_download(options.part, files)
    told = -1

    def progress(done: int) -> None:
        nonlocal told
        if (percent := 100 * done // part.size) != told:
            told = percent
            print(f"\r{part.title}: {percent} %", end="", file=sys.stderr, flush=True)

    try:
        print(download(part, files.folder, progress))
    except KeyboardInterrupt:
        raise FaceSnapError("Stopped; what has arrived is kept, and the same command goes on from there.") from None
    finally:
        print(file=sys.stderr)


def _model_files(options: argparse.Namespace) -> Any:
    """The model files of `--models`, or of the WebUI that FaceSnap is an extension of, and what that shares."""
    from facesnap_ext.hosts.model_folders import shared_model_folders
    from facesnap_ext.weights.search import find_models

    root = Path(__file__).resolve().parents[2]
    if options.models is None and root.parent.name != "extensions":
        raise FaceSnapError("FaceSnap is in no WebUI here: say with --models where the model folder is.")
    folder = options.models or root.parents[2] / "models" / "facesnap"
    models = folder.resolve().parent
    shared = shared_model_folders(models, models.parent) if models.name == "models" else ()
    return find_models(folder, (*options.also_look_in, *shared))


def run_identity(options: argparse.Namespace) -> None:
    from facesnap_ext import photos
    from facesnap_ext.engine import Engine
    from facesnap_ext.identity.saved import save_identity
    from facesnap_ext.weights.search import find_models

    def tell(message: str) -> None:
        print(message, file=sys.stderr)

    engine = Engine(lambda: find_models(options.models))
    references = [photos.from_path(path) for path in options.photo]
    report = engine.examine(references, options.face)
    result = {**report.to_json(), "written": None}
    if not options.json:
        print("\n".join(report.lines()))
    if options.out:
        out = Path(options.out)
        file = None  # a bare name goes into the model folder
        if out.suffix == ".safetensors" or len(out.parts) > 1:
            file = out.with_name(f"{out.name.removesuffix('.safetensors')}.safetensors")
        result["written"] = str(
            save_identity(
                engine.encoders(engine.files(tell)),
                references,
                file.stem if file else options.out,
                file,
                face_index=options.face,
                overwrite=options.overwrite,
                progress=tell,
            )
        )
    if options.json:
        _print(result, as_json=True)
    elif options.out:
        print(result["written"])


def run_train(options: argparse.Namespace) -> None:
    from facesnap_lab.training.config import read_config
    from facesnap_lab.training.trainer import train

    print(train(read_config(options.config), options.resume))


def run_dataset_build(options: argparse.Namespace) -> None:
    from facesnap_lab.dataset.build import build
    from facesnap_lab.dataset.images import Settings

    result = build(
        options.folder,
        options.out,
        options.models,
        Settings(
            resolution=options.resolution,
            crops=options.crops,
            min_face=options.min_face,
            min_score=options.min_score,
            jpeg=options.jpeg,
            device=options.device,
        ),
        per_shard=options.per_shard,
        layout=options.layout,
        identities=options.identities,
        blip2=options.blip2,
        workers=options.workers,
    )
    _print(result, options.json)


def run_demo(options: argparse.Namespace) -> None:
    from facesnap_lab.miniature.demo import demo

    demo(options.out)
    print(options.out)


def run_plan(options: argparse.Namespace) -> None:
    from facesnap_lab.evaluation.protocol import plan

    planned = plan(options.identities, options.poses, options.prompts, options.list, options.seed)
    print(f"{options.list}: {len(planned.cases())} pictures")


def run_evaluate(options: argparse.Namespace) -> None:
    from facesnap_lab.evaluation.from_options import run

    if (table := run(options)) is not None:
        print(table)


def run_ablation(options: argparse.Namespace) -> None:
    from facesnap_lab.ablation.ablate import ablate, read_ablation

    print(ablate(read_ablation(options.config), options.out))


def run_bench(options: argparse.Namespace) -> None:
    from facesnap_lab.benchmarks.bench import as_text, bench, draw_growth

    found = bench(options.repeats, options.steps, options.growth is not None)
    if options.growth is not None:
        draw_growth(found["growth"], options.growth)
    print(json.dumps(found, indent=2) if options.json else as_text(found))


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        for key, value in result.items():
            print(f"{key}: {value}")
