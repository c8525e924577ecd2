"""The identity file: a person's features in one `.safetensors`, to be reused without photos.

It holds the encoders' outputs for R reference photos in single precision, so its identity tokens are bit-identical to
those computed from the photos. It contains no pickle, and a digest of everything else in it. It contains a small
picture of the face only if the user wants one, and no other pixels. The person's name is the name of the file. The
features of a face are personal data, just like a photo of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facesnap_ext import __version__
from facesnap_ext.errors import FaceSnapError, one_line
from facesnap_ext.files import user_write
from facesnap_ext.weights.network_names import parse_networks
from facesnap_ext.weights.recognise import Kind, require
from facesnap_ext.weights.tensors import digest_of, read_index, read_tensors

VERSION = 3  # 1 had no shape of the open face model; 1 and 2 had a name, which is ignored, and no picture
MAX_BYTES = 256 * 2**20
"""Larger files are rejected before they are read; one reference takes 1.3 MB with CLIP-ViT-H."""

_AXES = {"embeddings": 2, "clip_tokens": 3, "shapes": 2}
_NETWORKS = {"embeddings": "face_pack", "clip_tokens": "clip", "shapes": "deca"}  # that compute each of the features
_OPEN_MODES, _OPEN_RESIDUAL, _PICTURE = "open_face.modes", "open_face.residual", "picture"
PICTURE_SIDE = 128  # pixels
MAX_MODES = 1024
MAX_SHAPE = 100.0  # standard deviations, or face heights
# characters and names that are not allowed as file names
_FORBIDDEN = re.compile(r'[<>:"/\\|?*]')  # for Windows and other systems
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\.|$)", re.IGNORECASE)  # for Windows


@dataclass(frozen=True, eq=False)
class SavedShape:
    """A person's shape in the open face model, fitted to all photos together.

    Args:
        modes: [K] float32 standard deviations.
        residual: [72,3] float32 face heights; see `open_face.OpenShape`.
        version: of the model's basis.
    """

    modes: Tensor
    residual: Tensor
    version: str


@dataclass(frozen=True, eq=False)
class Identity:
    """The features of one person in R reference photos.

    Args:
        name: the person's name, which is the name of the file without `.safetensors`.
        embeddings: [R, E] float32, from ArcFace, not normalised.
        clip_tokens: [R, T, C] float32; None if the person was saved without CLIP, which InstantID does not need.
        shapes: [R, S] float32, DECA's shape codes; None if the person was saved without DECA.
        open_shape: None if the person was saved by an earlier version, or with a face model pack without a model for 68
            landmarks.
        photos: the first ten digits of each photo's content hash.
        networks: the content hash of each network that computed the features, see `network_names`.
        picture: [128, 128, 3] uint8 RGB, a small picture of the face; None if the user did not want one.
    """

    name: str
    embeddings: Tensor
    clip_tokens: Tensor | None
    shapes: Tensor | None
    photos: tuple[str, ...]
    networks: dict[str, str]
    open_shape: SavedShape | None = None
    picture: Tensor | None = None


def safe_name(name: str, kind: str = "an identity") -> str:
    """Return the name of a person or another thing as a file name that is valid on every system.

    Path separators, characters and names reserved on Windows, control and invisible characters, and dots at either end
    are removed or replaced; the result has at most 150 bytes.

    Raises:
        FaceSnapError: no characters are left.
    """
    safe = _FORBIDDEN.sub("_", one_line(name)).strip(" .").encode()[:150].decode(errors="ignore").strip(" .")
    if not safe.strip("_"):
        raise FaceSnapError(f"{name!r} cannot be used as the name of {kind}; choose a name with letters or digits.")
    return f"_{safe[:100]}" if _RESERVED.match(safe) else safe


def save(path: Path, identity: Identity, overwrite: bool = False) -> None:
    """Write an identity file atomically.

    Raises:
        FaceSnapError: the file cannot be written, or it exists and `overwrite` is False or it is not an identity file.
    """
    from safetensors.torch import save_file

    check_target(path, overwrite)
    features = {key: tensor for key in _AXES if (tensor := getattr(identity, key)) is not None}
    if (shape := identity.open_shape) is not None:
        features |= {_OPEN_MODES: shape.modes, _OPEN_RESIDUAL: shape.residual}
    tensors = {key: tensor.float().contiguous() for key, tensor in features.items()}
    if identity.picture is not None:
        tensors[_PICTURE] = identity.picture.contiguous()
    metadata = {
        "format": "facesnap-identity",
        "version": str(VERSION),
        "photos": json.dumps(identity.photos),
        "networks": json.dumps(identity.networks),
        "facesnap": __version__,
    }
    if shape is not None:
        metadata["open_face"] = shape.version
    metadata["digest"] = _digest(tensors, metadata)
    with user_write(path, private=True) as part:
        save_file(tensors, part, metadata)


def check_target(path: Path, overwrite: bool) -> None:
    """Raise `FaceSnapError` if `save` would refuse to write this file."""
    if path.exists():
        if not overwrite:
            raise FaceSnapError(
                f"There is already an identity named {path.stem}; choose a different name, or delete {path} first."
            )
        require(path, Kind.IDENTITY, "it is not overwritten, so choose a different name.")


def load(path: Path) -> Identity:
    """Read an identity file, which may come from an untrusted source: its whole content is validated.

    Raises:
        FaceSnapError: the file is missing, of a different kind, of a newer version, too large, damaged or incomplete.
    """
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise FaceSnapError(f"{path.name} is too large for an identity file; save the person again with fewer photos.")
    require(path, Kind.IDENTITY, "save one from photos.")
    index = read_index(path)
    try:
        if int(index.metadata.get("version", "")) > VERSION:
            raise FaceSnapError(f"{path.name} was written by a newer FaceSnap; update the extension.")
        photos, networks = _photos(index.metadata), parse_networks(index.metadata["networks"])
        _check_shapes(index.shapes, len(photos), networks)
        tensors = read_tensors(path, check=False)
        _check_numbers(tensors)
        if _digest(tensors, index.metadata) != index.metadata["digest"]:
            raise ValueError("its contents have changed since they were saved")
        version = index.metadata["open_face"] if _OPEN_MODES in tensors else ""
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FaceSnapError(f"{path.name} is damaged ({error}); save the person again from photos.") from error
    shape = None
    if _OPEN_MODES in tensors:
        shape = SavedShape(tensors[_OPEN_MODES], tensors[_OPEN_RESIDUAL], version)
    clip_tokens, shapes = tensors.get("clip_tokens"), tensors.get("shapes")
    name = one_line(path.stem)
    return Identity(name, tensors["embeddings"], clip_tokens, shapes, photos, networks, shape, tensors.get(_PICTURE))


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Return the SHA-256, in hexadecimal, of all tensors and of all metadata except the digest itself."""
    text = json.dumps({key: value for key, value in metadata.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256((digest_of(sorted(tensors.items())) + text).encode()).hexdigest()


def _photos(metadata: dict[str, str]) -> tuple[str, ...]:
    photos = json.loads(metadata["photos"])
    if not isinstance(photos, list) or not photos or not all(_is_hash(photo, 10) for photo in photos):
        raise ValueError("its photos are not identified by hashes")
    return tuple(photos)


def _check_shapes(shapes: dict[str, tuple[int, ...]], references: int, networks: dict[str, str]) -> None:
    open_shape = {key: shape for key, shape in shapes.items() if key in (_OPEN_MODES, _OPEN_RESIDUAL)}
    features = {key: shape for key, shape in shapes.items() if key not in open_shape and key != _PICTURE}
    if "embeddings" not in features or not set(features) <= set(_NETWORKS):
        raise ValueError(f"it contains {', '.join(sorted(shapes))[:200] or 'no tensors'}")
    if set(networks) != {_NETWORKS[key] for key in features}:
        raise ValueError("it does not name the networks that computed its features")
    modes, residual = (open_shape.get(key, ()) for key in (_OPEN_MODES, _OPEN_RESIDUAL))
    if open_shape and (len(modes) != 1 or not 0 < modes[0] <= MAX_MODES or residual != (72, 3)):
        raise ValueError(f"the shape of the face has the sizes {list(modes)} and {list(residual)}")
    if shapes.get(_PICTURE, (PICTURE_SIDE, PICTURE_SIDE, 3)) != (PICTURE_SIDE, PICTURE_SIDE, 3):
        raise ValueError(f"the picture of the face has the shape {list(shapes[_PICTURE])}")
    for key, shape in features.items():
        if len(shape) != _AXES[key] or shape[0] != references or 0 in shape:
            raise ValueError(f"{key} of {references} photos have the shape {list(shape)}")


def _check_numbers(tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if key == _PICTURE:
            if tensor.dtype != torch.uint8:
                raise ValueError("the picture of the face does not consist of bytes")
        elif tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            raise ValueError(f"{key} are not finite single-precision values")
    if any(bool((tensors[key].abs() > MAX_SHAPE).any()) for key in (_OPEN_MODES, _OPEN_RESIDUAL) if key in tensors):
        raise ValueError("the face shape is implausible")
    if not bool((tensors["embeddings"].norm(dim=1) > 0).all()):
        raise ValueError("an embedding is zero")


def _is_hash(value: Any, digits: int) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is not None
