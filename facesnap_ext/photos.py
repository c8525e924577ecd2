"""Photos: upright 8-bit RGB pixels, with a name for messages. They are read from files, bytes, base64 and Pillow
images."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, wraps
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from PIL import Image, ImageFile

from facesnap_ext.errors import FaceSnapError, one_line

MAX_PIXELS = 80_000_000
"""Photos with more pixels are rejected before decoding."""

MAX_SIDE = 32_766
"""Photos that are wider or higher than this are also rejected, because OpenCV before 5 cannot crop them."""

MAX_BYTES = 256 * 2**20
"""Larger image files are rejected before they are read."""

MAX_PHOTOS = 100
"""If one job or request has more photos than this, all are rejected before any is decoded."""

MAX_TOTAL_PIXELS = 256_000_000
"""Maximum total number of pixels in the photos of one job or request, which stay decoded in memory."""

# Pillow supports more formats, but some are unsafe for untrusted files: PostScript, for example, runs an interpreter.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
_MAX_PATH = 4096  # maximum length of the end of a path that is searched for the file's name
_MAX_HEADER = 1000  # maximum length of the part of a data URL before the data
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_ESCAPED = {b"%2B": b"+", b"%2b": b"+", b"%2F": b"/", b"%2f": b"/", b"%3D": b"=", b"%3d": b"="}
_ORIENTATION = 0x0112  # EXIF tag
_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # views of an upright image as cameras store it, by EXIF tag
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}
MAX_NAME = 40
"""Longer file names of photos are shortened in messages."""

_ROWS = 256  # number of rows converted at a time
_BLOCK = 2**26  # bytes

one_request = threading.Lock()
"""Held while a request from the page or to the HTTP API has photos in memory, so that memory use does not add up."""

Function = TypeVar("Function", bound=Callable[..., Any])


def one_at_a_time(answer: Function) -> Function:
    """Make a function that answers requests of the page hold `one_request` while it runs."""

    @wraps(answer)
    def run(*args: Any, **values: Any) -> Any:
        with one_request:
            return answer(*args, **values)

    return cast(Function, run)


# One photo is decoded at a time, because decoding takes several times the memory of the result. The lock also prevents
# a second thread from permanently changing the setting that `_load_strictly` restores.
_decoding = threading.Lock()


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
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class NamedFile:
    """An image file under the name that its owner gave it.

    Attributes:
        content: the file, its contents in base64, or the reason why it cannot be used.
        name: from `file_title`; may be empty.
    """

    content: Path | str | FaceSnapError
    name: str = ""


def file_title(name: Any) -> str:
    """Return a file's name as it appears in messages; empty if it has no visible characters.

    Names come from untrusted clients. The result has no folders, line breaks or invisible characters, and at most
    `MAX_NAME` characters. Longer names are shortened in the middle, so that the suffix is kept.
    """
    if not isinstance(name, str):
        return ""
    title = one_line(re.split(r"[/\\]", name[-_MAX_PATH:])[-1])
    if len(title) > MAX_NAME:
        end = title[-(MAX_NAME // 3) :]
        title = f"{title[: MAX_NAME - len(end) - 1].rstrip()}…{end.lstrip()}"
    return title


def titles_of(values: Sequence[Any], title: str) -> list[str]:
    """Return the photos' names in messages: their own names if they are known, otherwise "Reference photo 1" and so on.

    If several photos have the same name, a number is added to all but the first.

    Args:
        values: the photos as the page or the API sends them.
        title: what they are called, such as "Reference photo".
    """
    titles: list[str] = []
    for number, value in enumerate(values, 1):
        own = value.name if isinstance(value, NamedFile) else ""
        candidates = (f"{own} ({i})" if i > 1 else own for i in count(1))
        titles.append(next(one for one in candidates if one not in titles) if own else f"{title} {number}")
    return titles


def from_path(path: str | Path) -> Photo:
    """Read a photo from a file. Its name is the file name.

    Raises:
        FaceSnapError: the file cannot be opened, or `from_bytes` rejects its contents.
    """
    return from_bytes(_read_file(Path(path), str(path)), Path(path).name)


def from_bytes(data: bytes, name: str) -> Photo:
    """Read a photo from the contents of an image file. For an animation, the first frame is used. See `from_pil`.

    Raises:
        FaceSnapError: `data` is not an image file, is damaged or truncated, or exceeds `MAX_PIXELS` or `MAX_SIDE`.
    """
    return from_pil(_open(data, name), name)


def from_base64(text: str, name: str) -> Photo:
    """Read a photo from base64, either plain or a data URL of any media type, such as `data:image/png;base64,...`.

    Both alphabets of base64 are accepted, with or without padding, line breaks and percent encoding. Paths and web
    addresses are rejected.

    Raises:
        FaceSnapError: `text` is not base64, or `from_bytes` rejects the decoded data.
    """
    return from_bytes(_decode_base64(text, name), name)


def from_pil(image: Image.Image, name: str) -> Photo:
    """Convert a Pillow image of any mode to a photo, rotated upright according to its EXIF orientation.

    As in the WebUI, transparent areas become white. Greyscale images with more than 8 bits are scaled to 8 bits. White
    is 65535 for mode I;16; for mode I, the smallest of 255, 65535 and 2^31 - 1 that no pixel exceeds; for mode F, the
    smallest of 1.0 and these three. Colour profiles are not applied.

    Raises:
        FaceSnapError: the image is damaged or truncated, or exceeds `MAX_PIXELS` or `MAX_SIDE`.
    """
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise _too_large(name)
    try:
        with _decoding, _large_blocks():
            _load_strictly(image)
            return Photo(_upright(image), name)
    except Exception as error:  # Pillow's decoders raise all kinds of errors on damaged files
        raise FaceSnapError(
            f"{name} is damaged or in an unsupported format ({error}): save it again as PNG or JPEG."
        ) from error


class PhotoReader:
    """Reads the photos of one job or request, and rejects them if there are too many or their total size is too
    large."""

    def __init__(self) -> None:
        self._number = self._pixels = 0

    def read(self, value: str | bytes | Path | Image.Image, name: str) -> Photo:
        """Read a photo from base64, an image file or its contents, or a Pillow image. Text is never used as a path.

        Raises:
            FaceSnapError: the value is rejected by this module's function for its type, or the photos exceed
                `MAX_PHOTOS` or `MAX_TOTAL_PIXELS`.
        """
        if isinstance(value, str):
            value = _decode_base64(value, name)
        elif isinstance(value, Path):
            value = _read_file(value, name)
        image = _open(value, name) if isinstance(value, bytes) else value
        check_number(self._number + 1)
        if self._pixels + image.width * image.height > MAX_TOTAL_PIXELS:
            raise TooManyPhotosError(
                f"The photos up to {name} have more than {MAX_TOTAL_PIXELS // 10**6} million pixels in total; use "
                "fewer photos, or scale them down."
            )
        photo = from_pil(image, name)
        self._number += 1
        self._pixels += image.width * image.height
        return photo


class TooManyPhotosError(FaceSnapError):
    """There are too many photos in one job or request, or their total size is too large."""


def check_number(number: int) -> None:
    """Raise `TooManyPhotosError` if this is more than one job or request may have."""
    if number > MAX_PHOTOS:
        raise TooManyPhotosError(f"There are more than {MAX_PHOTOS} photos; use fewer at once.")


def _read_file(path: Path, name: str) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FaceSnapError(f"{name} is larger than {MAX_BYTES // 2**20} MB; save it again as JPEG.")
        return path.read_bytes()
    except OSError as error:
        raise FaceSnapError(f"The photo {name} cannot be opened ({error.strerror}): check its path.") from error


def _open(data: bytes, name: str) -> Image.Image:
    """Read the header of an image file."""
    Image.init()
    try:
        return Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name) from error
    except Exception as error:  # Pillow's readers raise all kinds of errors on damaged headers
        raise FaceSnapError(f"{name} is not a readable image: use a photo in PNG, JPEG or WebP format.") from error


def _decode_base64(text: str, name: str) -> bytes:
    """Decode base64 or a data URL, in time proportional to its length."""
    text = text.lstrip()
    header, comma, _ = text[:_MAX_HEADER].partition(",")
    is_url = comma and header.lower().startswith("data:") and "".join(header.lower().split()).endswith(";base64")
    try:
        encoded = (text[len(header) + 1 :] if is_url else text).encode("ascii").translate(_URL_SAFE, b" \t\r\n\v\f")
        for escape, character in _ESCAPED.items():
            encoded = encoded.replace(escape, character)
        encoded = encoded.rstrip(b"=")
        encoded += b"=" * (-len(encoded) % 4)
        return base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise FaceSnapError(
            f"{name} is not base64: send the contents of an image file as base64 or as data:image/png;base64,..."
        ) from error


@contextmanager
def _large_blocks() -> Iterator[None]:
    """Make Pillow allocate large blocks for images, which the C library returns to the system when they are freed.

    The C library keeps Pillow's default blocks of 16 MB for the thread that used them, and a host has dozens of
    threads.
    """
    size = Image.core.get_block_size()
    Image.core.set_block_size(_BLOCK)
    try:
        yield
    finally:
        Image.core.set_block_size(size)


def _load_strictly(image: Image.Image) -> None:
    """Decode the image, raising an error if it is truncated."""
    # Other code in the process may have made Pillow fill the missing part of truncated files with grey.
    tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        image.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _upright(image: Image.Image) -> np.ndarray:
    """Return the pixels [H, W, 3] uint8 of a decoded image of any mode, rotated by its EXIF orientation."""
    # Pillow rotates TIFF files when loading them; some versions would rotate them twice
    orientation = 1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1)
    stored_as = _STORED.get(orientation, lambda upright: upright)
    turned = orientation in (5, 6, 7, 8)
    pixels = np.empty((image.width, image.height, 3) if turned else (image.height, image.width, 3), np.uint8)
    stored = stored_as(pixels)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        stored[:] = _grey_to_8_bits(image)[:, :, None]
        return pixels
    # convert strip by strip, because converting the whole image would take several times the memory of the result
    for top in range(0, image.height, _ROWS):
        bottom = min(top + _ROWS, image.height)
        stored[top:bottom] = np.asarray(_rgb(image.crop((0, top, image.width, bottom))))
    return pixels


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


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
