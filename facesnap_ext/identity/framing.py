"""Faces marked in their photo, and cut out of it, for people to choose from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from facesnap_ext.identity.faces import Face, longer_side
from facesnap_ext.photos import Photo

ACCENT, FAINT = (255, 176, 0), (150, 155, 165)


def framed(photo: Photo, faces: Sequence[Face], chosen: int | None = 0, side: int | None = None) -> Image.Image:
    """The photo with its faces framed: the chosen one bright and with its five points, the others faint; numbered
    from 0 where there are several.

    Args:
        side: the largest width and height of the result in pixels; by default the photo keeps its size.
    """
    picture = Image.fromarray(photo.pixels)
    scale = min(1.0, side / max(picture.size)) if side else 1.0
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(picture)
    line = max(2, round(max(picture.size) / 256))
    order = [i for i in range(len(faces)) if i != chosen] + ([] if chosen is None else [chosen])
    for i in order:  # the chosen one last, over the others
        box, colour = faces[i].box * scale, ACCENT if i == chosen else FAINT
        pen.rectangle(tuple(map(float, box)), outline=colour, width=line)
        if i == chosen:
            for x, y in faces[i].keypoints * scale:
                pen.ellipse((x - line, y - line, x + line, y + line), fill=colour)
        if len(faces) > 1:
            font = label_font(max(11, 6 * line))
            x, y = (float(edge) + line for edge in np.maximum(box[:2], 0))
            pen.rectangle(pen.textbbox((x + line, y), str(i), font=font), fill=colour, outline=colour, width=line)
            pen.text((x + line, y), str(i), (0, 0, 0), font)
    return picture


def close_up(face: Face, side: int) -> Image.Image:
    """A face with some room around it, a square of `side` pixels; black where the photo ends."""
    left, top, right, bottom = map(float, face.box)
    half = 0.65 * longer_side(face.box)
    x, y = (left + right) / 2, (top + bottom) / 2
    square = tuple(round(edge) for edge in (x - half, y - half, x + half, y + half))
    return Image.fromarray(face.photo.pixels).crop(square).resize((side, side), Image.Resampling.LANCZOS)


def label_font(size: int) -> ImageFont.ImageFont:
    """Pillow's own font at this size where it can."""
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size
        return ImageFont.load_default()
