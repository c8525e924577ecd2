"""The weights that condition a job: a FaceSnap file, or the pair of files that InstantID publishes."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.networks.adapter import Adapter
from facesnap_ext.weights import facesnap_file, instantid
from facesnap_ext.weights.facesnap_file import FaceSnapWeights
from facesnap_ext.weights.network_names import parse_networks
from facesnap_ext.weights.tensors import read_index

WeightSource: TypeAlias = Path | tuple[Path, Path]
"""A FaceSnap file, or InstantID's ControlNet and `ip-adapter.bin`."""


def paths_of(source: WeightSource) -> tuple[Path, ...]:
    """Return the files that make up a source."""
    return source if isinstance(source, tuple) else (source,)


def load_any(source: WeightSource) -> FaceSnapWeights:
    """Load a source to the CPU; see `facesnap_file.load` and `instantid.load`."""
    return instantid.load(*source) if isinstance(source, tuple) else facesnap_file.load(source)


def load_any_adapter(source: WeightSource) -> Adapter:
    """Load the adapter of InstantID's pair, or of a FaceSnap file that has one, to the CPU."""
    return instantid.load_adapter(source[1]) if isinstance(source, tuple) else facesnap_file.load_adapter(source)


def takes_clip(source: WeightSource) -> bool:
    """Return whether the Mixer takes CLIP tokens in addition to embeddings; InstantID's does not."""
    return not isinstance(source, tuple) and facesnap_file.read_info(source).mixer.clip_dim > 0


def networks_of(source: WeightSource) -> dict[str, str]:
    """Return `FaceSnapInfo.networks` of a source; only the header is read."""
    if isinstance(source, tuple):
        return {}
    try:
        return parse_networks(read_index(source).metadata.get("networks", "{}"))
    except (FaceSnapError, ValueError):  # a damaged file is reported when a job loads it
        return {}


def recognition_of(source: WeightSource) -> str:
    """Return `FaceSnapInfo.recognition` of a source; only the header of a FaceSnap file is read."""
    if isinstance(source, tuple):
        return instantid.RECOGNITION
    try:
        return read_index(source).metadata.get("recognition", "")
    except FaceSnapError:  # a damaged file is reported when a job loads it
        return ""
