"""`facesnap study`: a blind preference study, as in the paper's Fig. 3."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from facesnap_ext.cli.common import positive_int

HELP = "make a blind preference study, or evaluate its answers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    make = actions.add_parser("make", help="write a page that participants open in their browser")
    make.add_argument("list", type=Path, help="YAML or JSON file, described in docs/evaluation.md")
    make.add_argument(
        "--pictures",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="images that a method generated from the list; repeat it for each method",
    )
    make.add_argument("--out", type=Path, required=True, help="folder for the page; the key is written beside it")
    make.add_argument("--items", type=positive_int, default=50, help="groups of images to show (default: 50)")
    make.add_argument("--seed", type=int, default=0, help="determines the choice and order of images (default: 0)")
    evaluate = actions.add_parser("evaluate", help="print shares and exact tests of the participants' choices")
    evaluate.add_argument("key", type=Path, help="the key that was written beside the page")
    evaluate.add_argument("answers", type=Path, nargs="+", help="files that the participants saved")
    evaluate.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    if options.action == "make":
        from facesnap_lab.evaluation.evaluate import named_folders
        from facesnap_lab.evaluation.protocol import read_protocol
        from facesnap_lab.study.make import key_file, make

        make(read_protocol(options.list), named_folders(options.pictures), options.out, options.items, options.seed)
        print(f"{options.out / 'index.html'}; keep {key_file(options.out)} to yourself")
        return
    from facesnap_lab.study.evaluate import as_text, evaluate, read_answers, read_key

    key = read_key(options.key)
    found = evaluate(key, read_answers(options.answers, key))
    print(json.dumps(found, indent=2) if options.json else as_text(found))
