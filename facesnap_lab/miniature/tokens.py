"""Measure how much information about people a Mixer's tokens contain, without generating images.

    python -m facesnap_lab.miniature.tokens FILE.safetensors ... --people 600

prints JSON for each FaceSnap file. The people belong to the split that the miniature's FaceSnap is trained on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import facesnap_lab.ablated_mixers  # noqa: F401 (registers the Mixers of ablation files)
from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.photos import Photo
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.search import find_models
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.measure import photo

RIDGES = 10.0 ** np.arange(-7, 2)  # relative to the tokens' mean square


def token_similarity(tokens: Tensor) -> float:
    """Return the mean cosine between two tokens of a person, after subtracting the mean over all people.

    It is 1 if all tokens carry the same information.

    Args:
        tokens: [N, T, C], N people.
    """
    own = F.normalize(tokens - tokens.mean(dim=0), dim=-1)
    cosines, count = own @ own.mT, tokens.shape[1]
    return float((cosines.sum(dim=(1, 2)) - count).mean() / (count * (count - 1)))


def effective_rank(tokens: Tensor) -> float:
    """Return the number of directions in which people's tokens [N, T, C] differ, from 1 to N - 1.

    It is (sum of the covariance's eigenvalues)² / (sum of their squares).
    """
    flat = tokens.flatten(1)
    variances = torch.linalg.svdvals(flat - flat.mean(dim=0)) ** 2
    return float(variances.sum() ** 2 / (variances**2).sum())


def explained_variance(tokens: Tensor, features: Tensor) -> float:
    """Return the share of the features' variance that ridge regression predicts from the tokens.

    This is R² with leave-one-out over people and the best of `RIDGES`.

    Args:
        tokens: [N, T, C]. features: [N, E], such as ArcFace embeddings.
    """
    flat = tokens.flatten(1).double().numpy()
    flat = flat - flat.mean(axis=0)
    target = features.double().numpy()
    target = target - target.mean(axis=0)
    values, vectors = np.linalg.eigh(flat @ flat.T)
    best, count = -np.inf, len(flat)
    for ridge in RIDGES * values.sum() / count:
        shrinkage = values / (values + ridge)
        residuals = target - vectors @ (shrinkage[:, None] * (vectors.T @ target))
        leverage = vectors**2 @ shrinkage + 1 / count  # weight of a person's features in their own prediction
        error = ((residuals / (1 - leverage)[:, None]) ** 2).sum()
        best = max(best, 1 - error / ((target * count / (count - 1)) ** 2).sum())
    return float(best)


def people_features(people: int) -> tuple[Tensor, Tensor]:
    """Return ArcFace embeddings [N, E] of length 1 and CLIP tokens [N, T, C], each of one photo per person."""
    files = find_models(shipped.MODELS)
    encoders = Engine(lambda: files).encoders(files)
    faces = [encoders.face(Photo(photo("train", index, 0)[0], f"Person {index}")) for index in range(people)]
    embeddings = torch.stack([torch.from_numpy(face.embedding) for face in faces])
    return F.normalize(embeddings, dim=-1), torch.stack(encoders.clip_tokens(faces))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--people", type=int, default=600)
    options = parser.parse_args()
    try:
        mixers = {str(path): facesnap_file.load(path).mixer.float() for path in options.files}
    except FaceSnapError as error:
        parser.error(str(error))
    embeddings, clip_tokens = people_features(options.people)
    found = {}
    for path, mixer in mixers.items():
        with torch.no_grad():
            tokens = mixer(embeddings[:, None], clip_tokens[:, None])
        measured = {
            "token similarity": token_similarity(tokens),
            "effective rank": effective_rank(tokens),
            "explained variance": explained_variance(tokens, embeddings),
        }
        found[path] = {name: round(value, 3) for name, value in measured.items()}
    print(json.dumps({"people": options.people, **found}, indent=2))


if __name__ == "__main__":
    main()
