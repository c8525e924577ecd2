"""Identify networks by content hashes, and choose the installed ones that a weight file was made for.

Training shards, trained FaceSnap files and saved identities identify the recognition model of a face model pack, CLIP's
image encoder, DECA and FLAME by hashes. If the features come from a different network than the one that
the weights were trained with, the image shows a different person.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import State, state_of
from facesnap_ext.weights.clip_file import encoder_hash, weight_file
from facesnap_ext.weights.face_pack import file_hash, pack_files
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.tensors import fingerprint


def network_hash(part: str, path: Path) -> str:
    """Return the content hash of a network; it is cached until its file changes.

    Args:
        part: a key of `network_names.TITLES`.
        path: its path in `ModelFiles`; for a face model pack, the path of the recognition model is accepted too.

    Raises:
        FaceSnapError: the file cannot be read, or the pack has no recognition model.
    """
    if part == "face_pack":
        recognition = path if path.is_file() else pack_files(path).recognition
        if recognition is None:
            raise FaceSnapError(f"{path} has no face recognition model; unpack an insightface model pack there.")
        return file_hash(recognition)
    path = weight_file(path) if part == "clip" else path
    try:
        return _tensor_hash(part, path, state_of(path))
    except OSError as error:
        raise FaceSnapError(f"{path} cannot be read ({error.strerror or error}); check the file.") from error


@lru_cache(maxsize=256)
def _tensor_hash(part: str, path: Path, state: State) -> str:
    return encoder_hash(path) if part == "clip" else fingerprint(path)


def choose_fitting(files: ModelFiles, networks: Mapping[str, str]) -> None:
    """Use the candidate of each part that has this hash. Parts without such a candidate do not change.

    Nothing is hashed if there is only one candidate, because it is checked when it is used.
    """
    for part, expected in networks.items():
        candidates = [model.path for model in files.usable(part) if part == "clip" or _is_loadable(model.path)]
        if len(candidates) > 1:
            for path in candidates:
                if _hash_or_none(part, path) == expected:
                    setattr(files, part, path)
                    break


def _is_loadable(path: Path) -> bool:
    """Return whether a candidate is a folder, or a file of DECA or FLAME that has been converted already."""
    return path.is_dir() or path.suffix == ".safetensors"


def _hash_or_none(part: str, path: Path) -> str | None:
    try:
        return network_hash(part, path)
    except FaceSnapError:  # a damaged candidate is reported if it is used
        return None
