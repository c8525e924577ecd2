"""The first look at every photo: can it be read, and is it there already?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.photos import Photo, from_bytes

HASH_SIDE = 16
NEAR = 16
"""Bits of 256 in which two photos of a person may differ to be one and the same. Of 14,000 pairs of pictures of one
person in the miniature none differs in fewer than 25; a picture and its JPEG of quality 80 differ in 6 to 16."""


@dataclass(frozen=True)
class Look:
    """What the first look at a photo found.

    content: SHA-256 of the file. problem: why it cannot be read, or "". pixels: `Photo.digest`. area: in pixels.
    likeness: `difference_hash` as hexadecimal digits.
    """

    content: str
    problem: str = ""
    pixels: str = ""
    area: int = 0
    likeness: str = ""


def look(path: Path) -> Look:
    """Read a photo for the first time.

    Raises:
        FaceSnapError: it is not there.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FaceSnapError(f"{path} has gone since the build was begun; put it back.") from None
    except OSError as error:
        return Look("", f"{path.name} cannot be opened ({error.strerror}).")
    content = hashlib.sha256(data).hexdigest()
    try:
        photo = from_bytes(data, path.name)
    except FaceSnapError as error:
        return Look(content, str(error))
    height, width = photo.pixels.shape[:2]
    return Look(content, "", photo.digest, width * height, f"{difference_hash(photo.pixels):0{HASH_SIDE**2 // 4}x}")


def read_again(path: Path, seen: Look) -> Photo:
    """A photo that was looked at before.

    Raises:
        FaceSnapError: it is another one by now.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FaceSnapError(f"{path} cannot be opened any more ({error.strerror}); put it back.") from error
    if hashlib.sha256(data).hexdigest() != seen.content:
        raise FaceSnapError(f"{path} has changed since the build was begun; put it back, or build into another folder.")
    return from_bytes(data, path.name)


def difference_hash(pixels: np.ndarray) -> int:
    """A hash that little changes of a picture [H,W,3] change little: where it brightens from left to right in a grid.

    Source: N. Krawetz, "Kind of Like That" (dHash), 2013; here of 16 × 16 bits.
    """
    grey = Image.fromarray(pixels).convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.LANCZOS)
    values = np.asarray(grey, np.int16)
    return int.from_bytes(np.packbits(values[:, 1:] > values[:, :-1]).tobytes(), "big")


@dataclass(frozen=True)
class Drop:
    """Why a photo gives no picture."""

    reason: str
    message: str


def find_duplicates(photos: Iterable[tuple[int, Path, Look]]) -> dict[Path, Drop]:
    """The photos that are there already.

    Of photos with equal pixels, whoever is said to be in them, the first stays. Of near-duplicates of one person the
    largest stays, and of equally large ones the first.

    Args:
        photos: the number of the person, the path and what was seen, of all photos in the plan's order.
    """
    drops: dict[Path, Drop] = {}
    firsts: dict[str, tuple[Path, Look]] = {}
    people: dict[int, list[tuple[Path, Look]]] = {}
    for person, path, seen in photos:
        if seen.problem:
            continue
        first, what = firsts.setdefault(seen.pixels, (path, seen))
        if first == path:
            people.setdefault(person, []).append((path, seen))
        else:
            same = "file" if what.content == seen.content else "pixels"
            drops[path] = Drop("duplicate", f"It is the same {same} as {first}.")
    for own in people.values():
        kept: list[tuple[Path, int]] = []
        for path, seen in sorted(own, key=lambda photo: -photo[1].area):
            bits = int(seen.likeness, 16)
            twin = next((other for other, known in kept if (known ^ bits).bit_count() <= NEAR), None)
            if twin is None:
                kept.append((path, bits))
            else:
                drops[path] = Drop("near-duplicate", f"It looks like {twin}, of the same person.")
    return drops
