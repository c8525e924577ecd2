"""Where the images in shards come from, and which of them to leave out."""

from __future__ import annotations

import numpy as np

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.sources import NOT_RECORDED, ImageSource, count_sources
from facesnap_lab.training.exclusions import Exclusions
from facesnap_lab.training.shards import ShardIndex, read_labels, select_images


def read_sources(index: ShardIndex) -> tuple[ImageSource, ...]:
    """Count the images in shards by source, licence and consent; empty if no shard was built with a manifest.

    Raises:
        FaceSnapError: a sample is damaged.
    """
    names = ("source", "license", "consent")
    sources = count_sources(
        tuple(provenance.get(name, NOT_RECORDED) for name in names) for _, provenance in read_labels(index)
    )
    return sources if any(source.source != NOT_RECORDED for source in sources) else ()


def leave_out(index: ShardIndex, exclusions: Exclusions) -> tuple[ShardIndex, str]:
    """Leave out people and photos.

    Returns:
        The index of the other images, and a message about what was left out.

    Raises:
        FaceSnapError: a sample is damaged or does not record the photo's hash although photos are listed, or no image
            is left.
    """
    kept = np.ones(len(index), bool)
    matched: set[str] = set()
    for number, (person, provenance) in enumerate(read_labels(index)):
        entries = exclusions.matches(person, provenance.get("photo", ""))
        kept[number] = not entries
        matched |= entries
        if exclusions.photos and not entries and not provenance:
            raise FaceSnapError(
                f"{exclusions.path} lists photos by hash, but {index.shards[index.shard[number]]} was built without a "
                "manifest and does not record these hashes; list the people in the photos instead, or build the shards "
                "again with --manifest."
            )
    if not kept.any():
        raise FaceSnapError(f"{exclusions.path} lists all people or photos in the shards; add other shards.")
    remaining = select_images(index, kept)
    message = (
        f"{len(index) - len(remaining)} of {len(index)} images and {index.people - remaining.people} of {index.people} "
        f"people are left out."
    )
    return remaining, f"{message} {exclusions.describe_unmatched(matched)}".rstrip()
