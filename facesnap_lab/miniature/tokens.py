"""How much a Mixer's tokens say of people, without drawing anything.

    python -m facesnap_ext.miniature.tokens FILE.safetensors ... --people 600

prints JSON for each FaceSnap file, of photos of people whom the miniature's FaceSnap is trained on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.photos import Photo
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.search import find_models
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.measure import photo

RIDGES = 10.0 ** np.arange(-7, 2)  # parts of the tokens' mean square


def alike(tokens: Tensor) -> float:
    """The mean cosine between two tokens of a person, in what sets that person apart from the mean of all: 1 where the
    tokens say one thing as many times as there are tokens.

    Args:
        tokens: [N, T, C] of N people.
    """
    own = F.normalize(tokens - tokens.mean(dim=0), dim=-1)
    cosines, count = own @ own.mT, tokens.shape[1]
    return float((cosines.sum(dim=(1, 2)) - count).mean() / (count * (count - 1)))


def effective_rank(tokens: Tensor) -> float:
    """In how many directions people's tokens [N, T, C] differ: (sum of the covariance's eigenvalues)² / sum of their
    squares, from 1 to N - 1."""
    flat = tokens.flatten(1)
    variances = torch.linalg.svdvals(flat - flat.mean(dim=0)) ** 2
    return float(variances.sum() ** 2 / (variances**2).sum())


def kept(tokens: Tensor, features: Tensor) -> float:
    """The part of the features' variance that can be told from the tokens by ridge regression: R² of people left out
    one at a time, with the best of `RIDGES`.

    Args:
        tokens: [N, T, C]. features: [N, E], ArcFace's embeddings for example.
    """
    flat = tokens.flatten(1).double().numpy()
    flat = flat - flat.mean(axis=0)
    wanted = features.double().numpy()
    wanted = wanted - wanted.mean(axis=0)
    values, vectors = np.linalg.eigh(flat @ flat.T)
    best, count = -np.inf, len(flat)
    for ridge in RIDGES * values.sum() / count:
        shares = values / (values + ridge)
        residuals = wanted - vectors @ (shares[:, None] * (vectors.T @ wanted))
        own = vectors**2 @ shares + 1 / count  # of a person's features in the prediction of the same
        error = ((residuals / (1 - own)[:, None]) ** 2).sum()
        best = max(best, 1 - error / ((wanted * count / (count - 1)) ** 2).sum())
    return float(best)


def people_features(people: int) -> tuple[Tensor, Tensor]:
    """ArcFace's embeddings [N, E], of length 1, and CLIP's tokens [N, T, C] of a photo of each."""
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
        measured = {"alike": alike(tokens), "effective rank": effective_rank(tokens), "kept": kept(tokens, embeddings)}
        found[path] = {name: round(value, 3) for name, value in measured.items()}
    print(json.dumps({"people": options.people, **found}, indent=2))


if __name__ == "__main__":
    main()
