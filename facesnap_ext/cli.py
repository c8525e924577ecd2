"""The command `facesnap`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from facesnap_ext.errors import FaceSnapError

DTYPES = ("float16", "bfloat16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; an error for the user becomes one line and exit code 1."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except FaceSnapError as error:
        print(f"facesnap: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="facesnap", description="Portraits of a person from one photo, on any SDXL.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    convert = commands.add_parser("convert", help="turn DECA's, FLAME's or a ControlNet's file into one FaceSnap reads")
    convert.add_argument(
        "source",
        nargs="+",
        help="deca_model.tar, generic_model.pkl, or a diffusers SDXL ControlNet; or 'instantid CONTROLNET ADAPTER "
        "OUT', which packs InstantID's two files into one",
    )
    convert.add_argument("--out", type=Path, help="by default beside the source, as .safetensors")
    convert.set_defaults(run=run_convert)

    init = commands.add_parser("init", help="make a FaceSnap file as training starts from it")
    source = init.add_mutually_exclusive_group(required=True)
    source.add_argument("checkpoint", type=Path, nargs="?", help="an SDXL checkpoint, .safetensors")
    source.add_argument("--instantid", type=Path, metavar="FOLDER", help="InstantID, to start from its weights")
    init.add_argument("--out", type=Path, required=True)
    init.add_argument("--head-dim", type=int, default=64, help="channels of an attention head (default: SDXL's 64)")
    init.add_argument("--size-dim", type=int, default=256, help="channels of an embedded size (default: SDXL's 256)")
    init.add_argument("--seed", type=int, default=0)
    init.add_argument("--dtype", choices=DTYPES, help="default: float16, or what InstantID's files have")
    init.set_defaults(run=run_init)

    compress = commands.add_parser("compress", help="make a lighter FaceSnap file: fewer blocks, or 8 bits")
    compress.add_argument("source", type=Path, help="a FaceSnap file")
    compress.add_argument("out", type=Path)
    compress.add_argument(
        "--blocks",
        type=lambda text: _count(text, least=0),
        help="transformer blocks in a row that FFRNet's deepest level keeps, such as 2; then train it on",
    )
    compress.add_argument("--fp8", action="store_true", help="store FFRNet's matrices in 8 bits")
    compress.set_defaults(run=run_compress)

    prepare = commands.add_parser("prepare", help="write a photo's tokens, points and drawings")
    prepare.add_argument("photo", type=Path, nargs="+", help="reference photos of one person")
    prepare.add_argument("--drive", type=Path, help="photo whose pose and expression to take")
    prepare.add_argument("--models", type=Path, required=True, help="the folder with the model files")
    prepare.add_argument("--model", default="", help="name of the FaceSnap file, where there are several")
    prepare.add_argument("--face", type=int, default=0, help="which face of the photo, by size (default: the largest)")
    prepare.add_argument(
        "--several",
        choices=("mixed", "averaged"),
        default="mixed",
        help="what is done with several photos (default: mixed)",
    )
    prepare.add_argument("--width", type=int, default=1024)
    prepare.add_argument("--height", type=int, default=1024)
    prepare.add_argument("--out", type=Path, required=True)
    prepare.add_argument("--json", action="store_true", help="print what was done as JSON")
    prepare.set_defaults(run=run_prepare)

    models = commands.add_parser(
        "models", help="list every part: found where, missing, from where, under which licence"
    )
    _model_folders(models, None, [])
    models.add_argument("--hash", action="store_true", help="compute the files' SHA-256 and compare those known")
    models.add_argument("--json", action="store_true", help="print everything that is known as JSON")
    models.set_defaults(run=run_models)
    get = models.add_subparsers(metavar="get").add_parser("get", help="download a part whose hash is known")
    get.add_argument("part", help="its name in the list")
    _model_folders(get, argparse.SUPPRESS, argparse.SUPPRESS)  # before or behind `get`
    get.set_defaults(run=run_models_get)

    identity = commands.add_parser("identity", help="look at photos of one person, and save them as features")
    identity.add_argument("photo", type=Path, nargs="+", help="reference photos of one person")
    identity.add_argument("--models", type=Path, required=True, help="the folder with the model files")
    identity.add_argument(
        "--out", metavar="NAME", help="save the person: a name, or a .safetensors file (default: only look)"
    )
    identity.add_argument("--face", type=int, default=0, help="which face of the photo, by size (default: the largest)")
    identity.add_argument("--overwrite", action="store_true", help="replace an identity of the same name")
    identity.add_argument("--json", action="store_true", help="print the report as JSON")
    identity.set_defaults(run=run_identity)

    train = commands.add_parser("train", help="train Mixer and FFRNet on pictures of many people")
    train.add_argument("config", type=Path, help="a YAML file; facesnap_ext/training/config.py lists its fields")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the run's folder")
    train.set_defaults(run=run_train)

    dataset = commands.add_parser("dataset", help="training data at full size")
    datasets = dataset.add_subparsers(required=True, metavar="WHAT")
    build = datasets.add_parser("build", help="make shards of folders of photos; give the command again to go on")
    build.add_argument("folder", type=Path, nargs="+", help="photos in VGGFace2's, FFHQ's or CelebA-HQ's layout")
    build.add_argument("--out", type=Path, required=True, help="the folder of the shards")
    build.add_argument("--models", type=Path, required=True, help="the folder with face pack, DECA and FLAME")
    build.add_argument("--resolution", type=_count, default=1024, help="side of the pictures (default: 1024)")
    build.add_argument(
        "--crops", type=_count, default=5, help="pictures of a photo, all but one augmented (default: 5)"
    )
    build.add_argument("--min-face", type=_count, default=64, help="least size of a face in pixels (default: 64)")
    build.add_argument("--min-score", type=float, default=0.5, help="least confidence of the detector (default: 0.5)")
    build.add_argument(
        "--jpeg", type=int, choices=range(1, 101), metavar="QUALITY", help="pictures as JPEG (default: PNG)"
    )
    build.add_argument("--per-shard", type=_count, default=200, help="photos in a shard (default: 200)")
    build.add_argument(
        "--layout", choices=("auto", "people", "singles"), default="auto", help="a folder a person, or a photo a person"
    )
    build.add_argument("--identities", type=Path, metavar="FILE", help="lines NAME ID: who is in photos that lie flat")
    build.add_argument("--blip2", type=Path, metavar="FOLDER", help="BLIP-2, for photos without a text beside them")
    build.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of detector, ArcFace and DECA")
    build.add_argument("--workers", type=_count, default=os.cpu_count(), help="processes (default: one for each core)")
    build.add_argument("--json", action="store_true", help="print the counts as JSON")
    build.set_defaults(run=run_dataset_build)

    demo = commands.add_parser("demo", help="run every stage on a person of the miniature world")
    demo.add_argument("--out", type=Path, default=Path("out/demo.png"))
    demo.set_defaults(run=run_demo)

    plan = commands.add_parser("plan", help="write the list of an evaluation from folders of photos")
    plan.add_argument("list", type=Path, help="the YAML file to write")
    plan.add_argument("--identities", type=Path, required=True, help="folder with a photo, or a folder, a person")
    plan.add_argument("--poses", type=Path, required=True, help="folder with driving photos")
    plan.add_argument("--prompts", type=Path, required=True, help="text file with a prompt a line")
    plan.add_argument("--seed", type=int, default=0)
    plan.set_defaults(run=run_plan)

    evaluate = commands.add_parser("evaluate", help="measure FaceSnap and other methods as the paper's Table 1 does")
    evaluate.add_argument("list", type=Path, nargs="?", help="YAML or JSON file; docs/evaluation.md says what is in it")
    evaluate.add_argument("--miniature", action="store_true", help="the miniature world in place of a list")
    evaluate.add_argument("--people", type=int, default=10, help="of the miniature world (default: 10)")
    evaluate.add_argument("--out", type=Path, required=True)
    evaluate.add_argument(
        "--pictures", action="append", default=[], metavar="NAME=DIR", help="another method's pictures of the same list"
    )
    evaluate.add_argument("--base", type=Path, help="SDXL to draw FaceSnap's pictures with")
    evaluate.add_argument("--base-config", type=Path, help="SDXL's configurations, for a base in one file")
    evaluate.add_argument("--models", type=Path, help="the folder with FaceSnap's model files")
    evaluate.add_argument("--model", default="", help="name of the FaceSnap file, where there are several")
    evaluate.add_argument("--clip", type=Path, help="whole CLIP in transformers' folder: CLIP-T, CLIP-face")
    evaluate.add_argument("--facenet", type=Path, help="face recognition, ONNX or TorchScript: FaceSim")
    evaluate.add_argument("--inception", type=Path, help="inception-2015-12-05.pt, TorchScript: FID")
    evaluate.add_argument("--width", type=int, default=1024)
    evaluate.add_argument("--height", type=int, default=1024)
    evaluate.add_argument("--steps", type=int, help="default: the paper's 8; 12 in the miniature")
    evaluate.add_argument(
        "--scale", type=float, default=2.0, help="of classifier-free guidance (default: the paper's 2)"
    )
    evaluate.add_argument("--dtype", choices=DTYPES, default="float16")
    evaluate.set_defaults(run=run_evaluate)

    ablation = commands.add_parser("ablation", help="the paper's Tables 2 and 3, trained and measured in the miniature")
    ablation.add_argument("config", type=Path, help="a training's YAML without 'out', with seeds, people, references")
    ablation.add_argument("--out", type=Path, required=True, help="folder; what is finished there is not done again")
    ablation.set_defaults(run=run_ablation)

    bench = commands.add_parser("bench", help="what FaceSnap costs beside plain SDXL and other ways to condition it")
    bench.add_argument("--repeats", type=_count, default=5, help="turns, of which medians are taken (default: 5)")
    bench.add_argument("--steps", type=_count, default=8, help="of a picture (default: the paper's 8)")
    bench.add_argument("--growth", type=Path, metavar="PNG", help="also measure how cost grows with work, and draw it")
    bench.add_argument("--json", action="store_true", help="print JSON in place of a table")
    bench.set_defaults(run=run_bench)
    return parser


def _model_folders(parser: argparse.ArgumentParser, models: Any, also: Any) -> None:
    parser.add_argument(
        "--models", type=Path, default=models, help="the model folder (default: that of the WebUI around this folder)"
    )
    parser.add_argument(
        "--also-look-in", type=Path, action="append", default=also, metavar="DIR", help="another program's models"
    )


def _count(text: str, least: int = 1) -> int:
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return int(text)


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
    from facesnap_ext.prepare import prepare

    result = prepare(
        options.photo,
        options.drive,
        options.models,
        options.out,
        model=options.model,
        face=options.face,
        several=options.several,
        width=options.width,
        height=options.height,
        progress=lambda message: print(message, file=sys.stderr),
    )
    _print(result, options.json)


def run_models(options: argparse.Namespace) -> None:
    from facesnap_ext.weights.inventory import as_text, compute_hashes, take_stock, to_json

    files = _model_files(options)
    if options.hash:
        compute_hashes(files, lambda message: print(message, file=sys.stderr))
    roles = take_stock(files)
    if options.json:
        places = {"folder": str(files.folder), "elsewhere": [str(place) for place in files.elsewhere]}
        _print({**places, "passed_over": files.unreadable, "parts": to_json(roles)}, as_json=True)
    else:
        print(as_text(roles, files))


def run_models_get(options: argparse.Namespace) -> None:
    from facesnap_ext.weights.download import download, needed

    files = _model_files(options)
    part = needed(options.part, files)
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
    from facesnap_ext.hosts.folders import usual_places
    from facesnap_ext.weights.places import find_models

    root = Path(__file__).resolve().parents[1]
    if options.models is None and root.parent.name != "extensions":
        raise FaceSnapError("FaceSnap is in no WebUI here: say with --models where the model folder is.")
    folder = options.models or root.parents[1] / "models" / "facesnap"
    models = folder.resolve().parent
    shared = usual_places(models, models.parent) if models.name == "models" else ()
    return find_models(folder, (*options.also_look_in, *shared))


def run_identity(options: argparse.Namespace) -> None:
    from facesnap_ext import photos
    from facesnap_ext.engine import Engine
    from facesnap_ext.identities import save_identity
    from facesnap_ext.weights.places import find_models

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
                engine.encoders,
                engine.files(tell),
                references,
                file.stem if file else options.out,
                file,
                which=options.face,
                overwrite=options.overwrite,
                progress=tell,
            )
        )
    if options.json:
        _print(result, as_json=True)
    elif options.out:
        print(result["written"])


def run_train(options: argparse.Namespace) -> None:
    from facesnap_ext.training.config import read_config
    from facesnap_ext.training.trainer import train

    print(train(read_config(options.config), options.resume))


def run_dataset_build(options: argparse.Namespace) -> None:
    from facesnap_ext.dataset.build import build
    from facesnap_ext.dataset.pictures import Settings

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
    from facesnap_ext.miniature.demo import demo

    demo(options.out)
    print(options.out)


def run_plan(options: argparse.Namespace) -> None:
    from facesnap_ext.evaluation.protocol import plan

    planned = plan(options.identities, options.poses, options.prompts, options.list, options.seed)
    print(f"{options.list}: {len(planned.cases())} pictures")


def run_evaluate(options: argparse.Namespace) -> None:
    from facesnap_ext.evaluation.command import run

    if (table := run(options)) is not None:
        print(table)


def run_ablation(options: argparse.Namespace) -> None:
    from facesnap_ext.evaluation.ablation import ablate, read_ablation

    print(ablate(read_ablation(options.config), options.out))


def run_bench(options: argparse.Namespace) -> None:
    from facesnap_ext.evaluation.benchmarks import as_text, bench, draw_growth

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


if __name__ == "__main__":
    sys.exit(main())
