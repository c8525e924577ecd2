"""`facesnap models`: list the model files, and download missing ones."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facesnap_ext.cli.common import print_progress, print_result
from facesnap_ext.errors import FaceSnapError

if TYPE_CHECKING:
    from facesnap_ext.weights.model_files import ModelFiles

HELP = "list the model files: which were found, which are missing, and their sources and licences"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_folders(parser, None, [])
    parser.add_argument("--hash", action="store_true", help="compute each file's SHA-256 and compare it to known ones")
    parser.add_argument("--json", action="store_true", help="print the full list as JSON")
    get = parser.add_subparsers(metavar="get").add_parser(
        "get", help="download a model file", description="Download a model file and check its SHA-256."
    )
    get.add_argument("part", help="name of the part, as listed, or starter for everything that a first image needs")
    _add_folders(get, argparse.SUPPRESS, argparse.SUPPRESS)  # the options are accepted before and after `get`
    get.set_defaults(run=run_get)


def _add_folders(parser: argparse.ArgumentParser, models: Any, also_look_in: Any) -> None:
    parser.add_argument(
        "--models",
        type=Path,
        default=models,
        help="model folder (default: models/facesnap of the WebUI that this extension is installed in)",
    )
    parser.add_argument(
        "--also-look-in",
        type=Path,
        action="append",
        default=also_look_in,
        metavar="DIR",
        help="another program's model folder to search; may be repeated",
    )


def run(options: argparse.Namespace) -> None:
    from facesnap_ext.weights.model_list import as_text, compute_hashes, list_models, to_json

    files = _find_files(options)
    if options.hash:
        compute_hashes(files, print_progress)
    roles = list_models(files)
    if options.json:
        folders = {"folder": str(files.folder), "elsewhere": [str(place) for place in files.elsewhere]}
        print_result({**folders, "passed_over": files.passed_over, "parts": to_json(roles)}, as_json=True)
    else:
        print(as_text(roles, files))


def run_get(options: argparse.Namespace) -> None:
    from facesnap_ext.weights.download import download_all, parts_to_download

    files = _find_files(options)
    parts = parts_to_download(options.part, files)
    title, size = ", ".join(part.title for part in parts), sum(part.size for part in parts)
    printed = -1

    def progress(received: int) -> None:
        nonlocal printed
        if (percent := 100 * received // size) != printed:
            printed = percent
            print(f"\r{title}: {percent} %", end="", file=sys.stderr, flush=True)

    try:
        print(*download_all(parts, files.folder, progress), sep="\n")
    except KeyboardInterrupt:
        raise FaceSnapError("The download was interrupted; run the same command again to resume it.") from None
    finally:
        print(file=sys.stderr)


def _find_files(options: argparse.Namespace) -> ModelFiles:
    """Find the model files in `--models`, or in the surrounding WebUI, and in other programs' folders."""
    from facesnap_ext.hosts.model_folders import shared_model_folders
    from facesnap_ext.weights.search import find_models, resolved

    root = Path(__file__).resolve().parents[2]
    if options.models is None and root.parent.name != "extensions":
        raise FaceSnapError("FaceSnap is not installed in a WebUI here; specify the model folder with --models.")
    folder = options.models or root.parents[1] / "models" / "facesnap"
    models = resolved(folder).parent
    shared = shared_model_folders(models, models.parent) if models.name == "models" else ()
    return find_models(folder, (*options.also_look_in, *shared))
