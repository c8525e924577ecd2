"""Where the training images of a FaceSnap file come from: counts by source, licence and consent in its metadata."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from typing import Any

MAX_SOURCES = 100  # number of entries in the metadata
NOT_RECORDED = "not recorded"
OTHERS = "others"


@dataclass(frozen=True)
class ImageSource:
    """The number of images with the same source, licence and consent."""

    source: str
    license: str
    consent: str
    images: int


def count_sources(origins: Iterable[tuple[str, str, str]]) -> tuple[ImageSource, ...]:
    """Count images by source, licence and consent, ordered by number of images; see `combine_sources`."""
    return _entries(Counter(origins))


def combine_sources(first: Iterable[ImageSource], second: Iterable[ImageSource]) -> tuple[ImageSource, ...]:
    """Combine the counts of two trainings. Where both used the same source, the larger number applies.

    Of more than `MAX_SOURCES` entries, the smaller ones are summed up as `OTHERS`: first by licence and consent, and if
    there are still too many, as one entry.
    """
    counts: Counter[tuple[str, str, str]] = Counter()
    for entry in (*first, *second):
        key = (entry.source, entry.license, entry.consent)
        counts[key] = max(counts[key], entry.images)
    return _entries(counts)


def _entries(counts: Counter[tuple[str, str, str]]) -> tuple[ImageSource, ...]:
    for merge_all in (False, True):
        if len(counts) <= MAX_SOURCES:
            break
        common = _ordered(counts)[: MAX_SOURCES // 2]
        reduced = Counter(dict(common))
        for key, images in counts.items():
            if key not in dict(common):
                reduced[(OTHERS, OTHERS, OTHERS) if merge_all else (OTHERS, *key[1:])] += images
        counts = reduced
    return tuple([ImageSource(*key, images) for key, images in _ordered(counts)])


def _ordered(counts: Counter[tuple[str, str, str]]) -> list[tuple[tuple[str, str, str], int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def to_json(sources: Iterable[ImageSource]) -> str:
    return json.dumps([asdict(source) for source in sources], ensure_ascii=False)


def parse_sources(text: str) -> tuple[ImageSource, ...]:
    """Parse the JSON that `to_json` returns.

    Raises:
        ValueError: it is not a list of sources.
    """
    try:
        entries: Any = json.loads(text)
    except RecursionError as error:
        raise ValueError("the sources are nested too deeply") from error
    if not isinstance(entries, list) or len(entries) > MAX_SOURCES:
        raise ValueError(f"the sources are not a list of at most {MAX_SOURCES} entries")
    try:
        sources = tuple([ImageSource(**entry) for entry in entries])
    except TypeError as error:
        raise ValueError("the fields of a source are not source, license, consent and images") from error
    for source in sources:
        *texts, images = astuple(source)
        if not all(isinstance(value, str) for value in texts) or type(images) is not int or images < 1:
            raise ValueError("the fields of a source are not three texts and a number of images")
    return sources
