"""Images for choosing a face: the photo with all faces framed, and thumbnails of single faces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from facesnap_ext.identity.faces import Face, longer_side
from facesnap_ext.photos import Photo

# RGB colours of the frames around the selected face and around the others
ACCENT, FAINT = (255, 176, 0), (150, 155, 165)


def annotate_faces(
    photo: Photo, faces: Sequence[Face], face_index: int | None = 0, side: int | None = None
) -> Image.Image:
    """Draw frames around the faces in a photo.

    The selected face gets a bright frame and its five keypoints, all others a faint frame. Several faces are numbered
    from 0.

    Args:
        photo: the photo.
        faces: all faces of the photo.
        face_index: index of the selected face; None for no selection.
        side: maximum width and height of the result in pixels; by default the photo keeps its size.
    """
    image = Image.fromarray(photo.pixels)
    scale = min(1.0, side / max(image.size)) if side else 1.0
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image)
    line = max(2, round(max(image.size) / 256))
    order = [i for i in range(len(faces)) if i != face_index] + ([] if face_index is None else [face_index])
    for i in order:  # the selected face is drawn last, on top of the others
        box, colour = faces[i].box * scale, ACCENT if i == face_index else FAINT
        draw.rectangle(tuple(map(float, box)), outline=colour, width=line)
        if i == face_index:
            for x, y in faces[i].keypoints * scale:
                draw.ellipse((x - line, y - line, x + line, y + line), fill=colour)
        if len(faces) > 1:
            font = label_font(max(11, 6 * line))
            x, y = (float(edge) + line for edge in np.maximum(box[:2], 0))
            draw.rectangle(draw.textbbox((x + line, y), str(i), font=font), fill=colour, outline=colour, width=line)
            draw.text((x + line, y), str(i), (0, 0, 0), font)
    return image


def face_thumbnail(face: Face, side: int) -> Image.Image:
    """Return an upright square image of a face with a margin, `side` pixels wide. Areas outside the photo are black."""
    left, top, right, bottom = map(float, face.box)
    half = 0.65 * longer_side(face.box)
    x, y = (left + right) / 2, (top + bottom) / 2
    square = (round(x - half), round(y - half), round(x + half), round(y + half))
    image = Image.fromarray(face.photo.pixels).crop(square).resize((side, side), Image.Resampling.LANCZOS)
    return image.rotate(face.turn) if face.turn else image


def label_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's default font, at this size if Pillow supports that."""
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has only one size
        return ImageFont.load_default()
