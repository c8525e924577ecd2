"""`facesnap ablation`: reproduce the paper's ablation tables in the miniature world."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "train and measure the paper's Tables 2 and 3 in the miniature world"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, help="training YAML file without 'out', plus 'seeds', 'people' and 'references'"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="output folder; results that are already in it are kept"
    )


def run(options: argparse.Namespace) -> None:
    from facesnap_lab.ablation.ablate import ablate, read_ablation

    print(ablate(read_ablation(options.config), options.out))
