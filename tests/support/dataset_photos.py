"""Portraits of people of the miniature world, and files that contain them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from facesnap_lab.dataset.images import Settings
from facesnap_lab.miniature.render import render
from facesnap_lab.miniature.world import person, scene

SIDE = 96
SETTINGS = Settings(resolution=SIDE, crops=3, min_face=16)


def portraits(index: int, shots: int, side: int = SIDE) -> list[Image.Image]:
    """Portraits of one person from the test split."""
    who = person("test", index)
    renderings = render([who] * shots, [scene(who, shot) for shot in range(shots)], side)
    return [Image.fromarray(rendering.picture) for rendering in renderings]


def save(image: Image.Image, path: Path, caption: str = "a portrait", **options) -> Path:
    """Save an image with its caption next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path
