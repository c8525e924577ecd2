"""`facesnap plan`: write an evaluation list."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write an evaluation list from folders of photos"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("list", type=Path, help="YAML file to write")
    parser.add_argument(
        "--identities", type=Path, required=True, help="folder with one photo, or one subfolder, per person"
    )
    parser.add_argument("--poses", type=Path, required=True, help="folder with driving photos")
    parser.add_argument("--prompts", type=Path, required=True, help="text file with one prompt per line")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images (default: 0)")


def run(options: argparse.Namespace) -> None:
    from facesnap_lab.evaluation.protocol import plan

    planned = plan(options.identities, options.poses, options.prompts, options.list, options.seed)
    print(f"{options.list}: {len(planned.cases())} images")
