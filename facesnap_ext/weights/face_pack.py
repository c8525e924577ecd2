"""Face model packs as insightface publishes them: folders with a detector, a recognition model and other networks.

The role of each file follows from its graph, never from its name or its place in the folder:

| role | input | outputs |
|---|---|---|
| detector | N × 3 × any | nine (with five keypoints), six, ten or fifteen |
| recognition | square, 112 to 512, a multiple of 16 | one embedding; 512 numbers in all published packs |
| 68 landmarks (1k3d68) | 192 × 192 | 3309 |
| 106 landmarks (2d106det) | 192 × 192 | 212 |
| age and gender (genderage) | 96 × 96 | 3 |
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import State, sha256, state_of
from facesnap_ext.weights.onnx_graph import OnnxGraph, read_graph

DETECTOR_NAMES = ("scrfd", "det_")  # prefixes of insightface's detectors
MAX_FILES = 64  # maximum number of files examined per folder; the largest published pack has five
LANDMARKS68 = 3309  # number of outputs of 1k3d68
MIN_SIDE, MAX_SIDE = 112, 512  # range of the width of the crops that recognition models take, in pixels


@dataclass(frozen=True)
class PackFiles:
    """The files of a face model pack that FaceSnap uses; None for those that are missing.

    Args:
        embedding: length of the recognition model's embeddings; 0 if its graph does not state it.
        problems: the reasons why files could not be read, one clause each. They matter only if a file is missing.
    """

    folder: Path
    detector: Path | None = None
    recognition: Path | None = None
    landmarks68: Path | None = None
    embedding: int = 0
    problems: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether the pack has both a detector and a recognition model."""
        return self.detector is not None and self.recognition is not None


def onnx_files(folder: Path) -> list[Path]:
    """Return a folder's .onnx files, sorted by name, without the hidden files that macOS adds (`._glintr100.onnx`).

    Dangling links are left out, and so is everything beyond `MAX_FILES`.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(".onnx") and entry.name[0] != ".")
    except OSError:
        return []
    return [path for name in names[:MAX_FILES] if _is_file(path := folder / name)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a loop of links
        return False


def pack_files(folder: Path) -> PackFiles:
    """Recognise the files of a pack by their graphs. Files that cannot be read are skipped."""
    roles: dict[str, Path] = {}
    recognition: list[tuple[bool, Path, int]] = []  # unusual sizes last, then by name
    problems = []
    for path in onnx_files(folder):
        try:
            graph = read_graph(path)
        except FaceSnapError as error:
            problems.append(str(error).rstrip("."))
            continue
        role = role_of(graph)
        if role == "recognition":
            embedding = (*graph.outputs[0], 0, 0)[1]
            recognition.append(((graph.inputs[0][2], embedding) != (MIN_SIDE, 512), path, embedding))
        elif role:
            roles.setdefault(role, path)
    _, best, embedding = min(recognition, default=(False, None, 0))
    return PackFiles(folder, roles.get("detector"), best, roles.get("landmarks68"), embedding, problems=tuple(problems))


def role_of(graph: OnnxGraph) -> str:
    """Return "detector", "recognition", "landmarks68", or "" for a graph that FaceSnap does not use."""
    if len(graph.inputs) != 1 or len(graph.inputs[0]) != 4 or not graph.outputs:
        return ""
    if len(graph.outputs) >= 5:
        return "detector"
    height, width = graph.inputs[0][2:]
    if len(graph.outputs) > 1 or height != width:
        return ""
    if height == 192:  # insightface treats any network of this size as a landmark model
        return "landmarks68" if LANDMARKS68 in graph.outputs[0][-1:] else ""
    is_vector = all(size == 1 for size in graph.outputs[0][2:])  # networks that draw faces return images
    return "recognition" if MIN_SIDE <= height <= MAX_SIDE and height % 16 == 0 and is_vector else ""


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, which is cached until the file changes.

    Raises:
        FaceSnapError: the file cannot be read.
    """
    try:
        return _hash(path, state_of(path))
    except OSError as error:
        raise FaceSnapError(f"{path} cannot be read ({error.strerror or error}); check the file.") from error


@lru_cache(maxsize=256)
def _hash(path: Path, state: State) -> str:
    return sha256(path)


def has_insightface_names(folder: Path) -> bool:
    """Return whether the files include a detector with one of insightface's names, and at least one other network."""
    names = [path.name.lower() for path in onnx_files(folder)]
    return len(names) > 1 and any(name.startswith(DETECTOR_NAMES) for name in names)
