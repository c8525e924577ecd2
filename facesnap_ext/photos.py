"""Photos: upright 8-bit RGB pixels, with a name for messages. Read from files, bytes, base64 and Pillow images."""

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
"""Photos with more pixels are rejected before decoding."""

MAX_SIDE = 32_766
"""Photos that are wider or higher are rejected as well: OpenCV before 5 cannot crop them."""

# Pillow supports more formats, but some are unsafe for untrusted files: PostScript, for example, runs an interpreter.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
_load_lock = threading.Lock()
_DATA_URL = re.compile(r"data:image/[\w.+-]+(;[\w-]+=[^;,]*)*;base64,", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Photo:
    """A decoded photo.

    Attributes:
        pixels: [H, W, 3] uint8 RGB, upright; must not be modified.
        name: the photo's name in messages.
    """

    pixels: np.ndarray
    name: str

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        if self.pixels.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ValueError(f"a photo must be [H, W, 3] uint8, not {list(shape)} {self.pixels.dtype}")

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of shape and pixels. It depends neither on the name nor on the file format."""
        return hashlib.sha256(repr(self.pixels.shape).encode() + self.pixels.tobytes()).hexdigest()


def from_path(path: str | Path) -> Photo:
    """Read a photo from a file. Its name is the file name.

    Raises:
        FaceSnapError: the file cannot be opened, or `from_bytes` rejects its contents.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FaceSnapError(f"The photo {path} cannot be opened ({error.strerror}): check its path.") from error
    return from_bytes(data, Path(path).name)


def from_bytes(data: bytes, name: str) -> Photo:
    """Read a photo from the contents of an image file. Of an animation, the first frame is used. See `from_pil`.

    Raises:
        FaceSnapError: `data` is not an image file, is damaged or truncated, or exceeds `MAX_PIXELS` or `MAX_SIDE`.
    """
    Image.init()
    try:
        image = Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name) from error
    except Exception as error:  # Pillow's readers raise all kinds of errors on damaged headers
        raise FaceSnapError(f"{name} is not a readable image: use a photo in PNG, JPEG or WebP format.") from error
    return from_pil(image, name)


def from_base64(text: str, name: str) -> Photo:
    """Read a photo from base64, either plain or a `data:image/...;base64,` URL. Paths and web addresses are rejected.

    Raises:
        FaceSnapError: `text` is not base64, or `from_bytes` rejects the decoded data.
    """
    text = text.strip()
    header = _DATA_URL.match(text)
    try:
        data = base64.b64decode("".join(text[header.end() if header else 0 :].split()), validate=True)
    except ValueError as error:
        raise FaceSnapError(
            f"{name} is not base64: send the contents of an image file as base64 or as data:image/png;base64,..."
        ) from error
    return from_bytes(data, name)


def from_pil(image: Image.Image, name: str) -> Photo:
    """Convert a Pillow image of any mode to a photo, rotated upright according to its EXIF orientation.

    Transparent areas become white, as in the WebUI. Greyscale images with more than 8 bits are scaled to 8 bits. White
    is 65535 for mode I;16; for mode I, the smallest of 255, 65535 and 2^31 - 1 that no pixel exceeds; for mode F, the
    smallest of 1.0 and these three. Colour profiles are not applied.

    Raises:
        FaceSnapError: the image is damaged or truncated, or exceeds `MAX_PIXELS` or `MAX_SIDE`.
    """
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise _too_large(name)
    try:
        _load_strictly(image)
        if image.format != "TIFF":  # Pillow rotates TIFF files when loading them; some versions would rotate them twice
            image = ImageOps.exif_transpose(image)
        return Photo(_rgb(image), name)
    except Exception as error:  # Pillow's decoders raise all kinds of errors on damaged files
        raise FaceSnapError(
            f"{name} is damaged or in an unsupported format ({error}): save it again as PNG or JPEG."
        ) from error


def _load_strictly(image: Image.Image) -> None:
    """Decode the image, raising an error if it is truncated."""
    # Other code in the process may have made Pillow fill the missing part of truncated files with grey.
    with _load_lock:  # otherwise, a second thread could restore this thread's temporary setting for good
        tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            image.load()
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _rgb(image: Image.Image) -> np.ndarray:
    """Return the pixels [H, W, 3] uint8 of an image of any mode."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.repeat(_grey_to_8_bits(image)[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _grey_to_8_bits(image: Image.Image) -> np.ndarray:
    """Return the pixels [H, W] uint8 of a greyscale image with more than 8 bits per pixel."""
    values = np.asarray(image)
    whites = {"I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535, 2**31 - 1)}.get(image.mode, (65535,))
    white = next((white for white in whites if values.max() <= white), None)
    if white is None:
        raise ValueError(f"pixel values up to {values.max()}")
    scaled = np.empty(values.shape, np.uint8)
    for rows in range(0, len(values), 64):  # in blocks, because all pixels as float64 would take eight times the memory
        block = values[rows : rows + 64].astype(np.float64)
        scaled[rows : rows + 64] = np.rint(block.clip(min=0) * (255 / white))
    return scaled


def _too_large(name: str) -> FaceSnapError:
    return FaceSnapError(
        f"{name} has more than {MAX_PIXELS // 10**6} million pixels, or a side of more than {MAX_SIDE}: scale it down."
    )
