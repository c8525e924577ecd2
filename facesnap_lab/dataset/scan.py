"""The first scan of every photo: whether it can be read, and whether it is a duplicate."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.photos import Photo, from_bytes
from facesnap_lab.storage import Location

LEFT_OUT = "left out"  # the reason in the report
HASH_SIDE = 16
MAX_BITS = 16
"""Photos of a person are near-duplicates if their hashes differ in at most this many of 256 bits. Of 14,000 pairs of
images of one person in the miniature, none differs in fewer than 25 bits; an image and its JPEG of quality 80 differ in
6 to 16."""


@dataclass(frozen=True)
class PhotoScan:
    """The result of a photo's first scan.

    content: SHA-256 of the file. problem: why the photo cannot be read, or "". pixels: `Photo.digest`. area: in pixels.
    difference_hash: see `difference_hash`, in hexadecimal.
    """

    content: str
    problem: str = ""
    pixels: str = ""
    area: int = 0
    difference_hash: str = ""


def scan_photo(path: Location) -> PhotoScan:
    """Read a photo for the first time.

    Raises:
        FaceSnapError: the file does not exist, or its object store fails.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FaceSnapError(f"{path} has been removed since the build was started; put it back.") from None
    except OSError as error:
        return PhotoScan("", f"{path.name} cannot be opened ({error.strerror}).")
    content = hashlib.sha256(data).hexdigest()
    try:
        photo = from_bytes(data, path.name)
    except FaceSnapError as error:
        return PhotoScan(content, str(error))
    height, width = photo.pixels.shape[:2]
    return PhotoScan(
        content, "", photo.digest, width * height, f"{difference_hash(photo.pixels):0{HASH_SIDE**2 // 4}x}"
    )


def reread(path: Location, scan: PhotoScan) -> Photo:
    """Read a photo that was scanned before.

    Raises:
        FaceSnapError: the file has changed or cannot be opened.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FaceSnapError(f"{path} can no longer be opened ({error.strerror}); put it back.") from error
    if hashlib.sha256(data).hexdigest() != scan.content:
        raise FaceSnapError(
            f"{path} has changed since the build was started; restore it, or build into another folder."
        )
    return from_bytes(data, path.name)


def difference_hash(pixels: np.ndarray) -> int:
    """Return a perceptual hash of an image [H,W,3]: the signs of the horizontal gradients of a 16 × 16 grid.

    Small changes to the image change few bits.

    Source: N. Krawetz, "Kind of Like That" (dHash), 2013; here with 16 × 16 bits.
    """
    grey = Image.fromarray(pixels).convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.LANCZOS)
    values = np.asarray(grey, np.int16)
    return int.from_bytes(np.packbits(values[:, 1:] > values[:, :-1]).tobytes(), "big")


@dataclass(frozen=True)
class SkippedPhoto:
    """Why no training images are made from a photo."""

    reason: str
    message: str


@dataclass(frozen=True)
class ScannedPhoto:
    """A photo that has been scanned, the number of its person in the plan, and its source, or "" without a manifest."""

    person: int
    path: Location
    scan: PhotoScan
    source: str = ""


def find_duplicates(
    photos: Iterable[ScannedPhoto], left_out: Mapping[Location, SkippedPhoto]
) -> dict[Location, SkippedPhoto]:
    """Find the photos to skip as duplicates, or because they or a duplicate must be left out.

    Of photos with identical pixels, regardless of the person, the first is kept. Of near-duplicates of one person, the
    largest is kept; if several are equally large, the first. If one of them must be left out, none is kept.

    Args:
        photos: all photos, in the plan's order.
        left_out: the photos to leave out, with reasons.

    Returns:
        The photos to skip, including those in `left_out`.
    """
    skipped = dict(left_out)
    firsts: dict[str, ScannedPhoto] = {}
    people: dict[int, list[ScannedPhoto]] = {}
    for photo in sorted(photos, key=lambda photo: photo.path not in left_out):
        if photo.scan.problem:
            continue
        first = firsts.setdefault(photo.scan.pixels, photo)
        if first is photo or photo.path in left_out:
            people.setdefault(photo.person, []).append(photo)
        else:
            skipped[photo.path] = _skip_duplicate(photo, first, first.path in left_out)
    for own in people.values():
        kept: list[tuple[Location, int]] = []
        for photo in sorted(own, key=lambda photo: (photo.path not in left_out, -photo.scan.area)):
            bits = int(photo.scan.difference_hash, 16)
            twin = next((other for other, known in kept if (known ^ bits).bit_count() <= MAX_BITS), None)
            if twin is None or photo.path in left_out:
                kept.append((photo.path, bits))
            else:
                skipped[photo.path] = _skip(
                    "near-duplicate",
                    f"It is nearly identical to {twin}",
                    ", which shows the same person",
                    twin in left_out,
                )
    return skipped


def _skip_duplicate(photo: ScannedPhoto, first: ScannedPhoto, left_out: bool) -> SkippedPhoto:
    relation = "is the same file as" if first.scan.content == photo.scan.content else "has the same pixels as"
    reason, remark = "duplicate", ""
    if first.source != photo.source:
        reason, remark = "duplicate across sources", f", whose source is {first.source} and not {photo.source}"
    return _skip(reason, f"It {relation} {first.path}", remark, left_out)


def _skip(reason: str, relation: str, remark: str, left_out: bool) -> SkippedPhoto:
    if left_out:
        return SkippedPhoto(LEFT_OUT, f"{relation}, which is left out.")
    return SkippedPhoto(reason, f"{relation}{remark}.")
