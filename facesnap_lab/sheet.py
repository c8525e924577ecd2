"""Contact sheets: captioned images side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from facesnap_ext.identity.framing import label_font

SIDE, GAP, CAPTION = 256, 20, 46
BACKGROUND, TEXT, FAINT_TEXT = (22, 24, 29), (236, 238, 242), (142, 148, 160)


@dataclass(frozen=True)
class Panel:
    """An image with a title and a caption in smaller letters."""

    title: str
    picture: Image.Image
    caption: str


def sheet(title: str, rows: list[list[Panel]]) -> Image.Image:
    """Arrange panels in rows under a title. Images keep their proportions; a row is as high as its tallest image."""
    columns = max(map(len, rows))
    fitted = [[_fitted(panel.picture) for panel in row] for row in rows]
    heights = [max(picture.height for picture in row) for row in fitted]
    head = 64
    size = (GAP + columns * (SIDE + GAP), head + sum(heights) + len(rows) * (CAPTION + GAP))
    canvas = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    pen.text((GAP, 20), title, TEXT, label_font(22))
    y = head
    for row, pictures, height in zip(rows, fitted, heights):
        for j, (panel, picture) in enumerate(zip(row, pictures)):
            x = GAP + j * (SIDE + GAP)
            canvas.paste(picture, (x + (SIDE - picture.width) // 2, y + (height - picture.height) // 2))
            pen.text((x, y + height + 6), panel.title, TEXT, label_font(15))
            pen.text((x, y + height + 26), panel.caption, FAINT_TEXT, label_font(12))
        y += height + CAPTION + GAP
    return canvas


def _fitted(picture: Image.Image) -> Image.Image:
    """Scale an image so that its longer side is SIDE."""
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def heatmap(values: np.ndarray) -> Image.Image:
    """Render a matrix as colours from blue (low) through grey (the median) to orange (high), stretched to a square."""
    values = np.asarray(values, np.float32)
    centred = values - np.median(values)
    spread = np.quantile(np.abs(centred), 0.99) or 1.0
    level = np.clip(centred / spread, -1, 1)[..., None]
    middle, cold, warm = (np.array(colour, np.float32) for colour in ((44, 47, 54), (72, 149, 239), (255, 158, 68)))
    colours = middle + np.maximum(level, 0) * (warm - middle) + np.maximum(-level, 0) * (cold - middle)
    image = Image.fromarray(colours.round().astype(np.uint8))
    return image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
