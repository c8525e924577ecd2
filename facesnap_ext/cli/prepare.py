"""`facesnap prepare`: write the conditioning of a photo to files, to inspect it without a WebUI."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facesnap_ext.cli.common import print_progress, print_result

if TYPE_CHECKING:
    from facesnap_ext.identity.faces import Face

HELP = "write a photo's identity tokens, landmarks and landmark image"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photo", type=Path, nargs="+", help="reference photos of one person")
    parser.add_argument(
        "--drive",
        type=Path,
        metavar="PHOTO",
        help="driving photo: its pose and expression are used (default: those of the first reference photo)",
    )
    parser.add_argument("--models", type=Path, required=True, help="folder with the model files")
    parser.add_argument("--model", default="", help="name of the FaceSnap file, if the folder has more than one")
    parser.add_argument("--face-index", type=int, default=0, help="face to use in each photo (default: 0 = largest)")
    parser.add_argument(
        "--reference-mode",
        choices=("fused", "averaged"),
        default="fused",
        help="how several reference photos are combined (default: fused)",
    )
    parser.add_argument("--width", type=int, default=1024, help="image width in pixels (default: 1024)")
    parser.add_argument("--height", type=int, default=1024, help="image height in pixels (default: 1024)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> None:
    """Prepare photos as a job does. Write `tokens.safetensors`, `landmarks.json`, `landmarks.png`, and each photo with
    a frame around its face."""
    from PIL import Image
    from safetensors.torch import save_file

    from facesnap_ext import photos
    from facesnap_ext.engine import Engine
    from facesnap_ext.identity.framing import annotate_faces
    from facesnap_ext.landmarks.hints import HINTS
    from facesnap_ext.settings.unit import Unit
    from facesnap_ext.weights.search import find_models

    width, height, out = options.width, options.height, options.out
    unit = Unit(
        enabled=True,
        references=tuple([photos.from_path(path) for path in options.photo]),
        driving=photos.from_path(options.drive) if options.drive else None,
        face_index=options.face_index,
        reference_mode=options.reference_mode,
        model=options.model,
    )
    engine = Engine(lambda: find_models(options.models))
    prepared = engine.prepare(unit, width, height, progress=print_progress)
    conditioning, driving = prepared.conditioning, prepared.driving
    landmarks = conditioning.landmarks
    assert landmarks is not None
    assert driving is not None  # without a saved identity, the first reference drives

    out.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": conditioning.tokens.contiguous()}, out / "tokens.safetensors")
    points = {"width": width, "height": height, "points": landmarks.points.round(2).tolist()}
    (out / "landmarks.json").write_text(json.dumps(points), encoding="utf-8")
    Image.fromarray(HINTS[conditioning.hint](landmarks, width, height)).save(out / "landmarks.png")
    written = ["tokens.safetensors", "landmarks.json", "landmarks.png"]
    for i, face in enumerate(prepared.references, 1):
        annotate_faces(face.photo, [face]).save(out / f"reference-{i}.png")
        written.append(f"reference-{i}.png")
    if unit.driving is not None:
        annotate_faces(driving.photo, [driving]).save(out / "driving.png")
        written.append("driving.png")
    result = {
        "faces": [_describe(face) for face in prepared.references],
        "driving": _describe(driving),
        "tokens": list(conditioning.tokens.shape),
        "landmarks": len(landmarks.points),
        "predictor": prepared.predictor,
        "notes": list(prepared.notes),
        "written": [str(out / name) for name in written],
    }
    print_result(result, options.json)


def _describe(face: Face) -> dict[str, Any]:
    return {
        "photo": face.photo.name,
        "box": [round(float(value), 1) for value in face.box],
        "score": round(float(face.score), 3),
        "padded": face.padded,
        "turn": face.turn,
        "detector_size": face.detector_size,
    }
