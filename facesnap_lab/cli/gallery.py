"""`facesnap gallery`: generate the images of docs/gallery.md with a running WebUI."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "generate the images of docs/gallery.md with a running WebUI"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", help="address of the WebUI, which was started with --api")
    parser.add_argument("--auth", default="", help="USER:PASSWORD of the WebUI's --api-auth")
    parser.add_argument("--device", default="", help="name of the GPU, which is shown on the page")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the documentation (default: docs)")


def run(options: argparse.Namespace) -> None:
    from facesnap_lab.gallery.client import Client
    from facesnap_lab.gallery.make import make, read_results
    from facesnap_lab.gallery.page import write_pages
    from facesnap_lab.gallery.plan import read_plan

    folder = options.docs / "gallery"
    plan = read_plan(folder / "plan.json")
    try:
        make(plan, Client(options.url.rstrip("/"), options.auth), folder, options.device)
    finally:  # whatever was finished is shown, even if the next image failed
        results = read_results(folder)
        write_pages(plan, results, options.docs)
    print(f"{options.docs / 'gallery.md'}: {len(results)} of {len(plan.pictures)} images")
