"""Guidance written to files, to look at what FaceSnap makes of a photo without any host."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from facesnap_ext import photos
from facesnap_ext.engine import Engine
from facesnap_ext.identity.faces import Face
from facesnap_ext.identity.framing import annotate_faces
from facesnap_ext.landmarks.hints import HINTS
from facesnap_ext.landmarks.points72 import Landmarks, draw
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights.search import find_models


def prepare(
    references: Sequence[Path],
    driving: Path | None,
    models: Path,
    out: Path,
    *,
    model: str = "",
    face: int = 0,
    reference_mode: str = "fused",
    width: int = 1024,
    height: int = 1024,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Prepare photos as a job does and write `tokens.safetensors`, `landmarks.json`, `landmarks.png`, and each photo
    with its face framed.

    Args:
        references: photos of one person. driving: whose pose and expression; by default the first reference's own.
        models: the folder with the model files. face: which face of each reference, by size from the largest.
        width, height: of the picture that the landmarks are for.

    Returns:
        What was found and written, ready for JSON.

    Raises:
        FaceSnapError: a photo or a model file is missing or unfit.
    """
    from safetensors.torch import save_file

    unit = Unit(
        enabled=True,
        references=tuple(map(photos.from_path, references)),
        driving=photos.from_path(driving) if driving else None,
        face=face,
        reference_mode=reference_mode,
        model=model,
    )
    prepared = Engine(lambda: find_models(models)).prepare(unit, width, height, progress=progress)
    conditioning = prepared.conditioning

    out.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": conditioning.tokens.contiguous()}, out / "tokens.safetensors")
    landmarks = conditioning.landmarks
    points = {"width": width, "height": height, "points": landmarks.points.round(2).tolist()}
    (out / "landmarks.json").write_text(json.dumps(points), encoding="utf-8")
    Image.fromarray(HINTS[conditioning.hint](landmarks, width, height)).save(out / "landmarks.png")
    written = ["tokens.safetensors", "landmarks.json", "landmarks.png"]
    for i, face in enumerate(prepared.references, 1):
        annotate_faces(face.photo, [face]).save(out / f"reference-{i}.png")
        written.append(f"reference-{i}.png")
    if unit.driving is not None:
        annotate_faces(prepared.driving.photo, [prepared.driving]).save(out / "driving.png")
        written.append("driving.png")
    return {
        "faces": [_describe(face) for face in prepared.references],
        "driving": _describe(prepared.driving),
        "tokens": list(conditioning.tokens.shape),
        "landmarks": len(landmarks.points),
        "notes": list(prepared.notes),
        "written": [str(out / name) for name in written],
    }


def overlay(face: Face, landmarks: Landmarks) -> Image.Image:
    """The photo, darkened, with landmarks in its own pixels drawn over it."""
    height, width = face.photo.pixels.shape[:2]
    drawing = draw(landmarks, width, height)
    pixels = face.photo.pixels // 2
    return Image.fromarray(pixels + drawing // 2)


def _describe(face: Face) -> dict[str, Any]:
    return {
        "photo": face.photo.name,
        "box": [round(float(value), 1) for value in face.box],
        "score": round(float(face.score), 3),
        "padded": face.padded,
        "detector_size": face.detector_size,
    }
