"""`facesnap train`: train the Mixer and FFRNet."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from facesnap_lab.training.config import TrainConfig

HELP = "train the Mixer and FFRNet on photos of many people"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file; facesnap_lab/training/config.py lists its fields")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in the output folder")
    parser.add_argument(
        "--estimate", action="store_true", help="measure a few steps and print hours and GB instead of training"
    )
    parser.add_argument("--json", action="store_true", help="print the estimate as JSON")


def run(options: argparse.Namespace) -> None:
    from facesnap_lab.training.config import read_config

    config = read_config(options.config)
    if options.estimate:
        _print_estimate(config, options.json)
        return
    from facesnap_lab.training.trainer import train

    print(train(config, options.resume))


def _print_estimate(config: TrainConfig, as_json: bool) -> None:
    from accelerate import PartialState

    from facesnap_lab.training.estimate import as_text, estimate

    found = estimate(config)
    if PartialState().is_main_process:
        print(json.dumps(found, indent=2) if as_json else as_text(found))
