"""`facesnap dataset`: turn photos into training shards, or estimate what that costs."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from facesnap_ext.cli.common import positive_int, print_result

if TYPE_CHECKING:
    from facesnap_lab.dataset.images import Settings
    from facesnap_lab.storage import Location

HELP = "build a training dataset"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    build = actions.add_parser(
        "build",
        help="turn folders of photos into shards",
        description="Turn folders of photos into shards. To resume after an interruption, run the command again.",
    )
    _add_settings(build)
    build.add_argument("--out", required=True, help="folder or URL for the shards")
    build.add_argument("--per-shard", type=positive_int, default=200, help="photos per shard (default: 200)")
    build.add_argument(
        "--manifest",
        metavar="FILE",
        help="CSV file with the columns path, source, license and consent, which are recorded with each image",
    )
    build.add_argument(
        "--exclude",
        metavar="FILE",
        help="text file with people and SHA-256 hashes of photos to leave out, one per line",
    )
    build.add_argument(
        "--scheduler",
        default="",
        metavar="ADDRESS",
        help="build on the workers of this dask scheduler, such as tcp://10.0.0.1:8786, instead of local processes",
    )
    build.add_argument("--json", action="store_true", help="print the counts as JSON")
    estimate = actions.add_parser(
        "estimate", help="build a sample of the photos, and print the hours and GB of all of them"
    )
    _add_settings(estimate)
    estimate.add_argument("--sample", type=positive_int, default=100, help="photos in the sample (default: 100)")
    estimate.add_argument("--json", action="store_true", help="print JSON")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add what determines a build's cost."""
    parser.add_argument(
        "folder", nargs="+", help="photos in the layout of VGGFace2, FFHQ or CelebA-HQ; a folder or a URL (s3://…)"
    )
    parser.add_argument(
        "--models", type=Path, required=True, help="folder with the face model pack (insightface), DECA and FLAME"
    )
    parser.add_argument("--resolution", type=positive_int, default=1024, help="width and height (default: 1024)")
    parser.add_argument(
        "--crops", type=positive_int, default=5, help="crops per photo, all but one augmented (default: 5)"
    )
    parser.add_argument("--min-face", type=positive_int, default=64, help="minimum face size in pixels (default: 64)")
    parser.add_argument("--min-score", type=float, default=0.5, help="minimum detector confidence (default: 0.5)")
    parser.add_argument(
        "--jpeg", type=int, choices=range(1, 101), metavar="QUALITY", help="store JPEG at this quality (default: PNG)"
    )
    parser.add_argument(
        "--layout",
        choices=("auto", "people", "singles"),
        default="auto",
        help="people: one folder per person; singles: one person per photo (default: auto)",
    )
    parser.add_argument(
        "--identities", metavar="FILE", help="identities of the photos in a flat folder, as lines NAME ID"
    )
    parser.add_argument(
        "--blip2", type=Path, metavar="FOLDER", help="folder with BLIP-2, which captions photos without a caption file"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="device for the detector, ArcFace and DECA (default: cpu)",
    )
    parser.add_argument(
        "--workers", type=positive_int, default=os.cpu_count(), help="worker processes (default: one per core)"
    )


def run(options: argparse.Namespace) -> None:
    from facesnap_lab.dataset.build import build
    from facesnap_lab.dataset.images import Settings
    from facesnap_lab.storage import location

    def optional(text: str | None) -> Location | None:
        return None if text is None else location(text)

    settings = Settings(
        resolution=options.resolution,
        crops=options.crops,
        min_face=options.min_face,
        min_score=options.min_score,
        jpeg=options.jpeg,
        device=options.device,
    )
    folders = [location(folder) for folder in options.folder]
    if options.action == "estimate":
        _print_estimate(options, folders, settings, optional(options.identities))
        return
    result = build(
        folders,
        location(options.out),
        options.models,
        settings,
        per_shard=options.per_shard,
        layout=options.layout,
        identities=optional(options.identities),
        manifest=optional(options.manifest),
        exclude=optional(options.exclude),
        blip2=options.blip2,
        workers=options.workers,
        scheduler=options.scheduler,
    )
    print_result(result, options.json)


def _print_estimate(
    options: argparse.Namespace, folders: list[Location], settings: Settings, identities: Location | None
) -> None:
    from facesnap_lab.dataset.estimate import as_text, estimate

    found = estimate(
        folders,
        options.models,
        settings,
        layout=options.layout,
        identities=identities,
        blip2=options.blip2,
        workers=options.workers,
        sample=options.sample,
    )
    print(json.dumps(found, indent=2) if options.json else as_text(found))
