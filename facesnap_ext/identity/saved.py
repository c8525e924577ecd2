"""Saved identities: people stored as features, to be reused without photos. `weights.identity_file` defines the
file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from facesnap_ext.cache import signature_of
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.identity.faces import Face
from facesnap_ext.identity.framing import face_thumbnail
from facesnap_ext.identity.predictors import fit_shape
from facesnap_ext.photos import Photo
from facesnap_ext.weights import identity_file
from facesnap_ext.weights.identity_file import Identity
from facesnap_ext.weights.identity_folder import choose_identity, identity_folder
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.network_names import TITLES, parse_networks
from facesnap_ext.weights.networks import choose_fitting
from facesnap_ext.weights.source import WeightSource, networks_of, recognition_of
from facesnap_ext.weights.tensors import read_index


def choose_networks(files: ModelFiles, source: WeightSource, identity: str = "") -> None:
    """If there are several candidates for a network, use the one that a FaceSnap file was trained with, or else the one
    that computed a saved identity's features.

    Args:
        identity: the name of the saved identity; empty if there is none.
    """
    recognition, named = recognition_of(source), networks_of(source)
    files.match_pack(recognition)
    choose_fitting(files, named)
    if identity:
        try:
            path = choose_identity(files.folder, identity)
            saved = parse_networks(read_index(path).metadata.get("networks", "{}"))
        except (FaceSnapError, ValueError):  # a missing or damaged identity is reported when it is loaded
            return
        decided = {*named, *(["face_pack"] if recognition else [])}
        choose_fitting(files, {part: digest for part, digest in saved.items() if part not in decided})


def load_identity(encoders: Encoders, name: str, progress: Callable[[str], None] = lambda message: None) -> Identity:
    """Load a saved identity.

    Raises:
        FaceSnapError: it does not exist, its file is damaged, or its features come from networks other than the
            installed ones. A network that is not installed is not compared, because the saved features replace it.
    """
    files = encoders.files
    path = choose_identity(files.folder, name)
    saved = encoders.cache.get_or_compute(("identity", signature_of(path)), lambda: identity_file.load(path))
    progress("comparing the saved identity's networks")
    for part, expected in saved.networks.items():
        if getattr(files, part) is not None and encoders.network_hash(part) != expected:
            title = TITLES[part]
            raise FaceSnapError(
                f"The identity {name} was saved with a {title} other than {getattr(files, part)}, which would produce "
                f"a different person's face; use that {title} again, or save the identity again from photos."
            )
    return saved


def save_identity(
    encoders: Encoders,
    photos: Sequence[Photo],
    name: str,
    path: Path | None = None,
    *,
    face_index: int = 0,
    with_picture: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> Path:
    """Save a person, for use without photos.

    CLIP's features are omitted if CLIP is not installed and no FaceSnap file needs it (InstantID). DECA's shape of the
    face is omitted if DECA or FLAME is not installed, and the open face model's if no model for 68 landmarks is
    installed.

    Args:
        photos: photos of one person.
        name: the name that the user gives.
        path: the file; by default, a file of that name in the model folder's `identities`.
        face_index: the face to use in each photo, by size from the largest.
        with_picture: whether to add a small picture of the face in the first photo.

    Raises:
        FaceSnapError: a photo or a model file is missing or unusable, or the file exists and `overwrite` is off.
    """
    if not photos:
        raise FaceSnapError("There is no photo to save an identity from; add one.")
    files = encoders.files
    path = path or identity_folder(files.folder) / f"{identity_file.safe_name(name)}.safetensors"
    identity_file.check_target(path, overwrite)
    progress("detecting the face")
    references = [encoders.face(photo, face_index) for photo in photos]
    progress("encoding the face")
    with_shape = files.has_deca_and_flame
    with_clip = files.clip is not None or "clip" in files.missing()
    networks = ["face_pack", *(["clip"] if with_clip else []), *(["deca"] if with_shape else [])]
    identity = Identity(
        name=name,
        embeddings=torch.stack([torch.from_numpy(face.embedding) for face in references]),
        clip_tokens=torch.stack(encoders.clip_tokens(references)) if with_clip else None,
        shapes=torch.stack([encoders.codes(face).shape for face in references]) if with_shape else None,
        photos=tuple([face.photo.digest[:10] for face in references]),
        networks={part: encoders.network_hash(part) for part in networks},
        open_shape=fit_shape(encoders, references),
        picture=_picture(references[0]) if with_picture else None,
    )
    identity_file.save(path, identity, overwrite)
    return path


def _picture(face: Face) -> Tensor:
    return torch.from_numpy(np.array(face_thumbnail(face, identity_file.PICTURE_SIDE)))
