"""The command-line options that FaceSnap adds to the WebUI's, which reads this file before anything else."""


def preload(parser):
    parser.add_argument(
        "--facesnap-models-dir", metavar="DIR", help="FaceSnap's model folder (default: models/facesnap)"
    )
    parser.add_argument(
        "--facesnap-also-look-in",
        metavar="DIR",
        action="append",
        default=[],
        help="a folder of another program with models that FaceSnap can use, such as ComfyUI's models; may be repeated",
    )
