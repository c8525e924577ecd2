"""`facesnap train`: train the Mixer and FFRNet."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "train the Mixer and FFRNet on photos of many people"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file; facesnap_lab/training/config.py lists its fields")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in the output folder")


def run(options: argparse.Namespace) -> None:
    from facesnap_lab.training.config import read_config
    from facesnap_lab.training.trainer import train

    print(train(read_config(options.config), options.resume))
