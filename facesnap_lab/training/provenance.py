"""Where the images in shards come from."""

from __future__ import annotations

from facesnap_ext.weights.sources import NOT_RECORDED, ImageSource, count_sources
from facesnap_lab.training.shards import ShardIndex, read_labels


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
