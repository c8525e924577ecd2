"""The measures of the paper's Table 1 on embeddings, whichever networks these come from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def clip_t(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """[N] cosines of CLIP's embeddings of pictures [N,D] and of their own prompts [N,D], −1…1.

    Their mean is CLIP-T, a hundredth of torchmetrics' `CLIPScore`.
    """
    return (_unit(pictures) * _unit(texts)).sum(axis=1)


def likeness(picture: np.ndarray | None, real: Sequence[np.ndarray]) -> float:
    """Mean cosine of a picture's embedding [D] to those of real photos of the person, −1…1; 0 for None, a picture
    without a face. With a face recognition network this is FaceSim, with CLIP on faces it is CLIP-face."""
    if picture is None:
        return 0.0
    return float(np.mean(_unit(np.stack(real)) @ _unit(picture)))


def fid(real: np.ndarray, generated: np.ndarray) -> float:
    """Fréchet distance of two sets of features [N,D] and [M,D], each taken for a Gaussian (N, M ≥ 2).

    Source: Heusel et al. (2017), eq. 6, computed by torchmetrics in double precision. With fewer pictures than
    features it is biased upwards, and comparable only between sets of one size.
    """
    import torch
    from torch import nn
    from torchmetrics.image.fid import FrechetInceptionDistance

    extracted = nn.Identity()  # features in place of pictures, from whichever network
    extracted.num_features = real.shape[1]
    # one process has all features; others do not measure, and must not be waited for
    distance = FrechetInceptionDistance(feature=extracted, sync_on_compute=False).set_dtype(torch.float64)
    distance.update(torch.from_numpy(real).double(), real=True)
    distance.update(torch.from_numpy(generated).double(), real=False)
    return max(0.0, float(distance.compute()))


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
