"""The identity file: a person as features in one `.safetensors`, to be used again without photos.

It holds what the networks saw in R reference photos, in single precision, so that the identity tokens are those of the
photos bit for bit; no pixels, and no pickle. A face's features are personal data as its photo is.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facesnap_ext import __version__
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import user_write
from facesnap_ext.weights.recognise import Kind, require
from facesnap_ext.weights.tensors import read_index, read_tensors

VERSION = 1
MAX_BYTES = 256 * 2**20
"""A larger file is refused before it is read; a reference takes 1.3 MB with CLIP-ViT-H."""

NETWORKS = {"face_pack": "face recognition model", "clip": "CLIP image encoder", "deca": "DECA encoder"}
"""Which networks the features are of, by `ModelFiles`' names, and what messages call them."""

_AXES = {"embeddings": 2, "clip_tokens": 3, "shapes": 2}
_FORBIDDEN = re.compile(r'[<>:"/\\|?*]')  # in a file's name, on Windows or elsewhere
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\.|$)", re.IGNORECASE)  # on Windows


@dataclass(frozen=True, eq=False)
class Identity:
    """One person by R references.

    embeddings: [R, E] float32, ArcFace's, not normalised.
    clip_tokens: [R, T, C] float32; None where the person was saved without CLIP, which InstantID does without.
    shapes: [R, S] float32, DECA's shape codes; None where the person was saved without DECA: no landmarks then.
    photos: the first ten digits of each photo's content hash.
    networks: the content hash of each network in `NETWORKS` that made the features, hexadecimal.
    """

    name: str
    embeddings: Tensor
    clip_tokens: Tensor | None
    shapes: Tensor | None
    photos: tuple[str, ...]
    networks: dict[str, str]


def safe_name(name: str) -> str:
    """A person's name as a file can have it everywhere: without path separators, Windows' forbidden characters and
    reserved names, control and invisible characters, dots at the ends, and at most 150 bytes long.

    Raises:
        FaceSnapError: nothing is left of it.
    """
    safe = _FORBIDDEN.sub("_", _printable(name)).strip(" .").encode()[:150].decode(errors="ignore").strip(" .")
    if not safe.strip("_"):
        raise FaceSnapError(f"An identity cannot be named {name!r}; give a name with letters or digits.")
    return f"_{safe[:100]}" if _RESERVED.match(safe) else safe


def save(path: Path, identity: Identity, overwrite: bool = False) -> None:
    """Write an identity file whole or not at all.

    Raises:
        FaceSnapError: there is such a file and `overwrite` is not asked for, or it is no identity file; or the file
            cannot be written.
    """
    from safetensors.torch import save_file

    check_place(path, overwrite)
    tensors = {key: tensor for key in _AXES if (tensor := getattr(identity, key)) is not None}
    metadata = {
        "format": "facesnap-identity",
        "version": str(VERSION),
        "name": identity.name,
        "photos": json.dumps(identity.photos),
        "networks": json.dumps(identity.networks),
        "facesnap": __version__,
    }
    with user_write(path) as part:
        save_file({key: tensor.float().contiguous() for key, tensor in tensors.items()}, part, metadata)


def check_place(path: Path, overwrite: bool) -> None:
    """Raise `FaceSnapError` where `save` would."""
    if path.exists():
        if not overwrite:
            raise FaceSnapError(f"There is already an identity {path.stem}; give another name, or overwrite it.")
        require(path, Kind.IDENTITY, "it is not overwritten: give another name.")


def load(path: Path) -> Identity:
    """Read an identity file from anybody: it is refused unless everything in it is as it must be.

    Raises:
        FaceSnapError: the file is missing, of another kind, of a newer version, too large, damaged or not whole.
    """
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise FaceSnapError(f"{path.name} is too large for an identity file: save the person again with fewer photos.")
    require(path, Kind.IDENTITY, "save one from photos.")
    index = read_index(path)
    try:
        if int(index.metadata.get("version", "")) > VERSION:
            raise FaceSnapError(f"{path.name} was written by a newer FaceSnap; update the extension.")
        photos, networks = _photos(index.metadata), _networks(index.metadata)
        _check_shapes(index.shapes, len(photos), networks)
        tensors = read_tensors(path)
        _check_numbers(tensors)
        name = _printable(index.metadata["name"])[:200]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FaceSnapError(f"{path.name} is damaged ({error}): save the person again from photos.") from error
    return Identity(name, tensors["embeddings"], tensors.get("clip_tokens"), tensors.get("shapes"), photos, networks)


def _photos(metadata: dict[str, str]) -> tuple[str, ...]:
    photos = json.loads(metadata["photos"])
    if not isinstance(photos, list) or not photos or not all(_is_hash(photo, 10) for photo in photos):
        raise ValueError("photos are not named by their hashes")
    return tuple(photos)


def _networks(metadata: dict[str, str]) -> dict[str, str]:
    networks: Any = json.loads(metadata["networks"])
    if not isinstance(networks, dict) or not all(_is_hash(value, 64) for value in networks.values()):
        raise ValueError("networks are not named by their hashes")
    return networks


def _check_shapes(shapes: dict[str, tuple[int, ...]], references: int, networks: dict[str, str]) -> None:
    parts = {"embeddings": "face_pack", "clip_tokens": "clip", "shapes": "deca"}
    if "embeddings" not in shapes or not set(shapes) <= set(parts):
        raise ValueError(f"it holds {', '.join(sorted(shapes))[:200]}")
    if set(networks) != {parts[key] for key in shapes}:
        raise ValueError("it does not say by which networks it was made")
    for key, shape in shapes.items():
        if len(shape) != _AXES[key] or shape[0] != references or 0 in shape:
            raise ValueError(f"{key} of {references} photos have shape {list(shape)}")


def _check_numbers(tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            raise ValueError(f"{key} are not finite numbers in single precision")
    if not bool((tensors["embeddings"].norm(dim=1) > 0).all()):
        raise ValueError("embeddings are zero")


def _is_hash(value: Any, digits: int) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is not None


def _printable(text: str) -> str:
    """On one line, composed, without control, invisible and direction characters."""
    visible = (letter for letter in " ".join(text.split()) if not unicodedata.category(letter).startswith("C"))
    return unicodedata.normalize("NFC", " ".join("".join(visible).split()))
