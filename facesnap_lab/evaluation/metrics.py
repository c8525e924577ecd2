"""The metrics of the paper's Table 1, computed from the embeddings of any network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def clip_t(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return [N] cosines, −1…1, between CLIP's embeddings of images [N,D] and of their prompts [N,D].

    Their mean is CLIP-T: torchmetrics' `CLIPScore` divided by 100.
    """
    return (_unit(images) * _unit(texts)).sum(axis=1)


def likeness(image: np.ndarray | None, real: Sequence[np.ndarray]) -> float:
    """Return the mean cosine, −1…1, between an image's embedding [D] and the embeddings of the person's real photos.

    An image without a face (None) scores 0. With a face recognition network this is FaceSim; with CLIP on face crops it
    is CLIP-face.
    """
    if image is None:
        return 0.0
    return float(np.mean(_unit(np.stack(real)) @ _unit(image)))


def fid(real: np.ndarray, generated: np.ndarray) -> float:
    """Return the Fréchet distance between Gaussians fitted to two feature sets [N,D] and [M,D] (N, M ≥ 2).

    Source: Heusel et al. (2017), eq. 6, computed by torchmetrics in double precision. With fewer images than features
    it is biased upwards, and comparable only between sets of equal size.
    """
    import torch
    from torch import nn
    from torchmetrics.image.fid import FrechetInceptionDistance

    extracted = nn.Identity()  # receives features instead of images, so any network may have computed them
    extracted.num_features = real.shape[1]
    # only one process has the features and measures, so it must not wait for the others
    distance = FrechetInceptionDistance(feature=extracted, sync_on_compute=False).set_dtype(torch.float64)
    distance.update(torch.from_numpy(real).double(), real=True)
    distance.update(torch.from_numpy(generated).double(), real=False)
    return max(0.0, float(distance.compute()))


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
