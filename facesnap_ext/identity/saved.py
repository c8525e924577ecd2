"""People who are saved as features, to be used again without photos; the file is `weights.identity_file`'s."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from facesnap_ext.cache import signature_of
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.photos import Photo
from facesnap_ext.weights import identity_file
from facesnap_ext.weights.identity_file import Identity
from facesnap_ext.weights.places import ModelFiles, choose_identity, identity_folder


def load_identity(
    encoders: Encoders, files: ModelFiles, name: str, progress: Callable[[str], None] = lambda message: None
) -> Identity:
    """A saved person.

    Raises:
        FaceSnapError: there is none of this name, the file is unfit, or the features are of other networks than
            those that are here. A network that is not here is not compared: its features are all that is needed.
    """
    path = choose_identity(files.folder, name)
    saved = encoders.cache.remember(("identity", signature_of(path)), lambda: identity_file.load(path))
    progress("comparing the networks of the saved identity")
    for part, theirs in saved.networks.items():
        if getattr(files, part) is not None and encoders.network(files, part) != theirs:
            what = identity_file.NETWORKS[part]
            raise FaceSnapError(
                f"The identity {name} was saved with another {what} than {getattr(files, part)}, which would make "
                f"it somebody else; use that {what} again, or save the identity anew from photos."
            )
    return saved


def save_identity(
    encoders: Encoders,
    files: ModelFiles,
    photos: Sequence[Photo],
    name: str,
    path: Path | None = None,
    *,
    which: int = 0,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> Path:
    """Save a person, to be used without photos.

    Args:
        photos: of one person. which: the face of each, by size from the largest.
        name: given by the user. path: of the file; by default that name in the model folder's `identities`.

    CLIP's features are left out where no CLIP is here and no file wants one (InstantID), the shape where DECA or FLAME
    is not here.

    Raises:
        FaceSnapError: a photo or a model file is missing or unfit, or the file is there and not to be overwritten.
    """
    if not photos:
        raise FaceSnapError("There is no photo to save an identity from; add one.")
    path = path or identity_folder(files.folder) / f"{identity_file.safe_name(name)}.safetensors"
    identity_file.check_place(path, overwrite)
    progress("looking for the face")
    references = [encoders.face(files, photo, which) for photo in photos]
    progress("encoding the face")
    shaped = files.deca is not None and files.flame is not None
    with_clip = files.clip is not None or "clip" in files.missing()
    networks = ["face_pack", *(["clip"] if with_clip else []), *(["deca"] if shaped else [])]
    identity = Identity(
        name=name,
        embeddings=torch.stack([torch.from_numpy(face.embedding) for face in references]),
        clip_tokens=torch.stack(encoders.clip_tokens(files, references)) if with_clip else None,
        shapes=torch.stack([encoders.codes(files, face).shape for face in references]) if shaped else None,
        photos=tuple(face.photo.digest[:10] for face in references),
        networks={part: encoders.network(files, part) for part in networks},
    )
    identity_file.save(path, identity, overwrite)
    return path
