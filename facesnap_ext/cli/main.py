"""The command `facesnap`: its arguments; `commands` does what they say."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from facesnap_ext.cli import commands
from facesnap_ext.errors import FaceSnapError

DTYPES = ("float16", "bfloat16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; an error for the user becomes one line and exit code 1."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file on Windows takes the letters of its own country alone
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options.run(options)
    except FaceSnapError as error:
        print(f"facesnap: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="facesnap", description="Portraits of a person from one photo, on any SDXL.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    convert = subparsers.add_parser(
        "convert", help="turn DECA's, FLAME's or a ControlNet's file into one FaceSnap reads"
    )
    convert.add_argument(
        "source",
        nargs="+",
        help="deca_model.tar, generic_model.pkl, or a diffusers SDXL ControlNet; or 'instantid CONTROLNET ADAPTER "
        "OUT', which packs InstantID's two files into one",
    )
    convert.add_argument("--out", type=Path, help="by default beside the source, as .safetensors")
    convert.set_defaults(run=commands.run_convert)

    init = subparsers.add_parser("init", help="make a FaceSnap file as training starts from it")
    source = init.add_mutually_exclusive_group(required=True)
    source.add_argument("checkpoint", type=Path, nargs="?", help="an SDXL checkpoint, .safetensors")
    source.add_argument("--instantid", type=Path, metavar="FOLDER", help="InstantID, to start from its weights")
    init.add_argument("--out", type=Path, required=True)
    init.add_argument("--head-dim", type=int, default=64, help="channels of an attention head (default: SDXL's 64)")
    init.add_argument("--size-dim", type=int, default=256, help="channels of an embedded size (default: SDXL's 256)")
    init.add_argument("--seed", type=int, default=0)
    init.add_argument("--dtype", choices=DTYPES, help="default: float16, or what InstantID's files have")
    init.set_defaults(run=commands.run_init)

    compress = subparsers.add_parser("compress", help="make a lighter FaceSnap file: fewer blocks, or 8 bits")
    compress.add_argument("source", type=Path, help="a FaceSnap file")
    compress.add_argument("out", type=Path)
    compress.add_argument(
        "--blocks",
        type=lambda text: _count(text, least=0),
        help="transformer blocks in a row that FFRNet's deepest level keeps, such as 2; then train it on",
    )
    compress.add_argument("--fp8", action="store_true", help="store FFRNet's matrices in 8 bits")
    compress.set_defaults(run=commands.run_compress)

    prepare = subparsers.add_parser("prepare", help="write a photo's tokens, points and drawings")
    prepare.add_argument("photo", type=Path, nargs="+", help="reference photos of one person")
    prepare.add_argument("--drive", type=Path, help="photo whose pose and expression to take")
    prepare.add_argument("--models", type=Path, required=True, help="the folder with the model files")
    prepare.add_argument("--model", default="", help="name of the FaceSnap file, where there are several")
    prepare.add_argument("--face", type=int, default=0, help="which face of the photo, by size (default: the largest)")
    prepare.add_argument(
        "--reference-mode",
        choices=("fused", "averaged"),
        default="fused",
        help="how several photos are combined (default: fused)",
    )
    prepare.add_argument("--width", type=int, default=1024)
    prepare.add_argument("--height", type=int, default=1024)
    prepare.add_argument("--out", type=Path, required=True)
    prepare.add_argument("--json", action="store_true", help="print what was done as JSON")
    prepare.set_defaults(run=commands.run_prepare)

    models = subparsers.add_parser(
        "models", help="list every part: found where, missing, from where, under which licence"
    )
    _model_folders(models, None, [])
    models.add_argument("--hash", action="store_true", help="compute the files' SHA-256 and compare those known")
    models.add_argument("--json", action="store_true", help="print everything that is known as JSON")
    models.set_defaults(run=commands.run_models)
    get = models.add_subparsers(metavar="get").add_parser("get", help="download a part whose hash is known")
    get.add_argument("part", help="its name in the list")
    _model_folders(get, argparse.SUPPRESS, argparse.SUPPRESS)  # before or behind `get`
    get.set_defaults(run=commands.run_models_get)

    identity = subparsers.add_parser("identity", help="look at photos of one person, and save them as features")
    identity.add_argument("photo", type=Path, nargs="+", help="reference photos of one person")
    identity.add_argument("--models", type=Path, required=True, help="the folder with the model files")
    identity.add_argument(
        "--out", metavar="NAME", help="save the person: a name, or a .safetensors file (default: only look)"
    )
    identity.add_argument("--face", type=int, default=0, help="which face of the photo, by size (default: the largest)")
    identity.add_argument("--overwrite", action="store_true", help="replace an identity of the same name")
    identity.add_argument("--json", action="store_true", help="print the report as JSON")
    identity.set_defaults(run=commands.run_identity)

    train = subparsers.add_parser("train", help="train Mixer and FFRNet on pictures of many people")
    train.add_argument("config", type=Path, help="a YAML file; facesnap_lab/training/config.py lists its fields")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the run's folder")
    train.set_defaults(run=commands.run_train)

    dataset = subparsers.add_parser("dataset", help="training data at full size")
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
    build.set_defaults(run=commands.run_dataset_build)

    demo = subparsers.add_parser("demo", help="run every stage on a person of the miniature world")
    demo.add_argument("--out", type=Path, default=Path("out/demo.png"))
    demo.set_defaults(run=commands.run_demo)

    plan = subparsers.add_parser("plan", help="write the list of an evaluation from folders of photos")
    plan.add_argument("list", type=Path, help="the YAML file to write")
    plan.add_argument("--identities", type=Path, required=True, help="folder with a photo, or a folder, a person")
    plan.add_argument("--poses", type=Path, required=True, help="folder with driving photos")
    plan.add_argument("--prompts", type=Path, required=True, help="text file with a prompt a line")
    plan.add_argument("--seed", type=int, default=0)
    plan.set_defaults(run=commands.run_plan)

    evaluate = subparsers.add_parser("evaluate", help="measure FaceSnap and other methods as the paper's Table 1 does")
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
    evaluate.set_defaults(run=commands.run_evaluate)

    ablation = subparsers.add_parser(
        "ablation", help="the paper's Tables 2 and 3, trained and measured in the miniature"
    )
    ablation.add_argument("config", type=Path, help="a training's YAML without 'out', with seeds, people, references")
    ablation.add_argument("--out", type=Path, required=True, help="folder; what is finished there is not done again")
    ablation.set_defaults(run=commands.run_ablation)

    bench = subparsers.add_parser("bench", help="what FaceSnap costs beside plain SDXL and other ways to condition it")
    bench.add_argument("--repeats", type=_count, default=5, help="turns, of which medians are taken (default: 5)")
    bench.add_argument("--steps", type=_count, default=8, help="of a picture (default: the paper's 8)")
    bench.add_argument("--growth", type=Path, metavar="PNG", help="also measure how cost grows with work, and draw it")
    bench.add_argument("--json", action="store_true", help="print JSON in place of a table")
    bench.set_defaults(run=commands.run_bench)
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


if __name__ == "__main__":
    sys.exit(main())
