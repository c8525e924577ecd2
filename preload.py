"""Command-line options that FaceSnap adds to the WebUI. The WebUI reads this file before anything else."""

from argparse import ArgumentParser


def preload(parser: ArgumentParser) -> None:
    """Add FaceSnap's options."""
    parser.add_argument(
        "--facesnap-models-dir", metavar="DIR", help="FaceSnap's model folder (default: models/facesnap)"
    )
    parser.add_argument(
        "--facesnap-also-look-in",
        metavar="DIR",
        action="append",
        default=[],
        help="another program's model folder to search, such as ComfyUI's models; may be repeated",
    )
