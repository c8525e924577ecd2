"""Compute identity tokens from a person's features, and check that features and weights match."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from facesnap_ext.cache import signature_of
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.identity.faces import Face
from facesnap_ext.weights.facesnap_file import FaceSnapWeights
from facesnap_ext.weights.identity_file import Identity
from facesnap_ext.weights.source import WeightSource
from facesnap_ext.weights.tensors import is_finite


def token_signatures(encoders: Encoders, source: WeightSource) -> Hashable:
    """The state of all files that identity tokens are computed with.

    A job takes this state before it reads any file, and uses it as the key of cached results. If a file is replaced in
    the meantime, later jobs therefore never use these results.
    """
    parts = [part for part in ("face_pack", "clip") if getattr(encoders.files, part) is not None]
    return (signature_of(source), *(encoders.signature(part) for part in parts))


def mix(
    encoders: Encoders, weights: FaceSnapWeights, references: Sequence[Face], saved: Identity | None, average: bool
) -> Tensor:
    """Identity tokens [1, queries, dim] of one person's faces and saved identity.

    Args:
        average: whether to average the references' features instead of fusing them.

    Raises:
        FaceSnapError: the features do not fit the Mixer, or the tokens are not finite numbers.
    """
    embeddings, clip_tokens = embeddings_of(references, saved)[None], None
    if weights.info.mixer.clip_dim > 0:
        saved_tokens: list[Tensor] = []
        if saved is not None:
            if saved.clip_tokens is None:
                raise FaceSnapError(
                    f"The identity {saved.name} was saved without CLIP features, which {weights.name} needs; put "
                    "CLIP-ViT-H into the model folder and save it again from photos."
                )
            saved_tokens = [*saved.clip_tokens]
        clip_tokens = torch.stack([*encoders.clip_tokens(references), *saved_tokens])[None]
    if average:
        embeddings, clip_tokens = weights.mixer.average(embeddings, clip_tokens)
    check_features(embeddings, clip_tokens, weights)
    with torch.no_grad():
        tokens = weights.mixer.float()(embeddings, clip_tokens)
    if not is_finite(tokens):
        raise FaceSnapError(
            f"The Mixer of {weights.name} computes values that are not finite, so the file is damaged; download or "
            "create it again."
        )
    return tokens


def null_tokens(weights: FaceSnapWeights, noise: float = 0.0) -> Tensor:
    """Identity tokens [1, queries, dim] of no person, for weights that were trained with an all-zero embedding.

    Args:
        noise: upper end of the uniform noise from 0 in that embedding, the same in every job; as ComfyUI_InstantID has
            it, with 0.35 by default, against images that look burnt.
    """
    embedding = noise * torch.rand(1, 1, weights.info.mixer.id_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return weights.mixer.float()(embedding)


def embeddings_of(references: Sequence[Face], saved: Identity | None) -> Tensor:
    """ArcFace embeddings [R, E] of the references and then of the saved identity."""
    arcface = [torch.from_numpy(face.embedding) for face in references]
    return torch.stack(arcface + ([] if saved is None else [*saved.embeddings]))


def check_features(embeddings: Tensor, clip_tokens: Tensor | None, weights: FaceSnapWeights) -> None:
    """Check that features have the width that the Mixer expects.

    Args:
        clip_tokens: None for a Mixer without CLIP input.

    Raises:
        FaceSnapError: the widths differ.
    """
    mixer = weights.info.mixer
    for title, features, expected in (
        ("face model pack", embeddings, mixer.id_dim),
        ("CLIP image encoder", clip_tokens, mixer.clip_dim),
    ):
        if features is not None and features.shape[-1] != expected:
            raise FaceSnapError(
                f"{weights.name} expects {expected} values per feature from the {title}, but the installed one returns "
                f"{features.shape[-1]}; use the {title} that the author of {weights.name} names."
            )
