"""Face model packs as insightface publishes them: folders with a detector, a recognition model and other networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DETECTOR_NAMES = ("scrfd", "det_")  # prefixes of insightface's detectors
OTHER_NAMES = ("1k3d68", "2d106det", "genderage")  # its networks that neither detect nor recognise faces


def onnx_names(folder: Path) -> list[str]:
    """Return the lower-case names of a folder's .onnx files, listed as insightface does."""
    return [path.name.lower() for path in folder.glob("*") if path.suffix == ".onnx"]


def has_insightface_names(names: Sequence[str]) -> bool:
    """Return whether the files include a detector of insightface's and at least one other network."""
    return len(names) > 1 and any(name.startswith(DETECTOR_NAMES) for name in names)


def may_be_complete(names: Sequence[str]) -> bool:
    """Return whether there may be both a detector and a recognition model.

    A file counts as a recognition model unless it has the name of one of insightface's other networks.
    """
    return len(names) > 1 and any(not name.startswith((*DETECTOR_NAMES, *OTHER_NAMES)) for name in names)
