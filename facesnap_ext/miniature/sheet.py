"""Pictures side by side with captions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, CAPTION = 256, 20, 46
GROUND, INK, FAINT = (22, 24, 29), (236, 238, 242), (142, 148, 160)


@dataclass(frozen=True)
class Panel:
    """A picture, its title, and a line in smaller words."""

    title: str
    picture: Image.Image
    words: str


def sheet(title: str, rows: list[list[Panel]]) -> Image.Image:
    """Panels in rows under a title; pictures keep their proportions."""
    columns = max(map(len, rows))
    head = 64
    size = (GAP + columns * (SIDE + GAP), head + len(rows) * (SIDE + CAPTION + GAP))
    picture = Image.new("RGB", size, GROUND)
    canvas = ImageDraw.Draw(picture)
    canvas.text((GAP, 20), title, INK, _font(22))
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            x, y = GAP + j * (SIDE + GAP), head + i * (SIDE + CAPTION + GAP)
            scale = SIDE / max(panel.picture.size)
            fitted = [max(1, round(side * scale)) for side in panel.picture.size]
            kind = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
            corner = (x + (SIDE - fitted[0]) // 2, y + (SIDE - fitted[1]) // 2)
            picture.paste(panel.picture.convert("RGB").resize(fitted, kind), corner)
            canvas.text((x, y + SIDE + 6), panel.title, INK, _font(15))
            canvas.text((x, y + SIDE + 26), panel.words, FAINT, _font(12))
    return picture


def heatmap(values: np.ndarray) -> Image.Image:
    """A matrix as colours from blue over grey to orange, the middle at its median, stretched to a square."""
    values = np.asarray(values, np.float32)
    centred = values - np.median(values)
    spread = np.quantile(np.abs(centred), 0.99) or 1.0
    level = np.clip(centred / spread, -1, 1)[..., None]
    middle, cold, warm = (np.array(colour, np.float32) for colour in ((44, 47, 54), (72, 149, 239), (255, 158, 68)))
    colours = middle + np.maximum(level, 0) * (warm - middle) + np.maximum(-level, 0) * (cold - middle)
    image = Image.fromarray(colours.round().astype(np.uint8))
    return image.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def _font(size: int) -> ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size
        return ImageFont.load_default()
