"""Photos as FaceSnap sees them: upright 8-bit RGB pixels with the name by which people call them."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from facesnap_ext.errors import FaceSnapError

MAX_PIXELS = 80_000_000
"""A photo with more pixels is refused before it is decoded."""

MAX_SIDE = 32_766
"""A photo that is wider or higher likewise: OpenCV before 5 cannot cut anything out of it."""

# Pillow reads more, but what it does for some (PostScript runs an interpreter) is not for files from strangers.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
_loading = threading.Lock()
_DATA_URL = re.compile(r"data:image/[\w.+-]+(;[\w-]+=[^;,]*)*;base64,", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Photo:
    """A decoded photo. `pixels` is [H, W, 3] uint8 RGB, upright, not to be changed; `name` is for messages."""

    pixels: np.ndarray
    name: str

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        if self.pixels.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ValueError(f"a photo is [H, W, 3] uint8, not {list(shape)} {self.pixels.dtype}")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of shape and pixels, hexadecimal: equal for equal pictures, whatever their names and files."""
        return hashlib.sha256(repr(self.pixels.shape).encode() + self.pixels.tobytes()).hexdigest()


def from_path(path: str | Path) -> Photo:
    """Read a photo from a file, named by its file name. Errors as `from_bytes`."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FaceSnapError(f"The photo {path} cannot be opened ({error.strerror}): check its path.") from error
    return from_bytes(data, Path(path).name)


def from_bytes(data: bytes, name: str) -> Photo:
    """Read a photo from the contents of a picture file; of an animated one the first frame. See `from_pil`.

    Raises:
        FaceSnapError: `data` is no picture file, is damaged or cut off, or has more than `MAX_PIXELS` pixels.
    """
    Image.init()
    try:
        image = Image.open(io.BytesIO(data), formats=[known for known in _FORMATS if known in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name) from error
    except Exception as error:  # Pillow's readers raise anything on damaged headers
        raise FaceSnapError(f"{name} is not a picture that can be read: give a photo as PNG, JPEG or WebP.") from error
    return from_pil(image, name)


def from_base64(text: str, name: str) -> Photo:
    """Read a photo from base64, plain or as a `data:image/...;base64,` URL. The text is never a path or an address.

    Raises:
        FaceSnapError: `text` is not base64, and as `from_bytes`.
    """
    text = text.strip()
    header = _DATA_URL.match(text)
    try:
        data = base64.b64decode("".join(text[header.end() if header else 0 :].split()), validate=True)
    except ValueError as error:
        raise FaceSnapError(
            f"{name} is not base64: send the picture file's contents, plain or as data:image/png;base64,..."
        ) from error
    return from_bytes(data, name)


def from_pil(image: Image.Image, name: str) -> Photo:
    """Take a photo from a Pillow image of any mode, turned upright by its EXIF orientation.

    What is transparent shows white, as the WebUI itself fills it. Grey values of more than 8 bits are scaled to 8: the
    white of mode I;16 is 65535; of mode I the smallest of 255, 65535 and 2^31 - 1 that no pixel exceeds; of mode F
    1.0 comes before these. Colour profiles are not applied.

    Raises:
        FaceSnapError: the image is damaged or cut off, or has more than `MAX_PIXELS` pixels.
    """
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise _too_large(name)
    try:
        _load_whole(image)
        if image.format != "TIFF":  # which Pillow turns by itself; some versions would turn it twice
            image = ImageOps.exif_transpose(image)
        return Photo(_rgb(image), name)
    except Exception as error:  # Pillow's decoders raise anything on damaged files
        raise FaceSnapError(
            f"{name} is damaged or of an unknown kind ({error}): save it anew as PNG or JPEG."
        ) from error


def _load_whole(image: Image.Image) -> None:
    # Other code of the same process may have told Pillow to fill what is missing of a cut-off file with grey.
    with _loading:  # or a second thread would take this one's setting for the process's
        tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            image.load()
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.repeat(_eight_bits(image)[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
    return np.array(image.convert("RGB"))


def _eight_bits(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    whites = {"I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535, 2**31 - 1)}.get(image.mode, (65535,))
    white = next((white for white in whites if values.max() <= white), None)
    if white is None:
        raise ValueError(f"brightness up to {values.max()}")
    scaled = np.empty(values.shape, np.uint8)
    for rows in range(0, len(values), 64):  # float64 of all pixels would take eight times the room
        block = values[rows : rows + 64].astype(np.float64)
        scaled[rows : rows + 64] = np.rint(block.clip(min=0) * (255 / white))
    return scaled


def _too_large(name: str) -> FaceSnapError:
    return FaceSnapError(
        f"{name} has more than {MAX_PIXELS // 10**6} million pixels, or more than {MAX_SIDE} in a row: make it smaller."
    )
