"""Where the files of Table 1 are: each row's images and scores, and the trained weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from facesnap_lab.training.checkpoints import WEIGHTS, list_checkpoints

FACESNAP = "facesnap"
LIMITS = ("copy", "stranger", "no-person")  # rows that are not trained; the same for all seeds


@dataclass(frozen=True, eq=False)
class Measured:
    """A row's scores with one seed. by_person: [P] by metric of `measure.METRICS`."""

    by_person: dict[str, np.ndarray]
    fid: float | None
    faceless: int


def weights_of(folder: Path, method: str) -> Path:
    """Return a trained method's file."""
    name = WEIGHTS if method == FACESNAP else f"{method}.safetensors"
    return list_checkpoints(folder / method)[-1][1] / name


def pictures(out: Path, row: str, seed: int) -> Path:
    """Return the folder of a row's images."""
    return (out / "limits" if row in LIMITS else out / f"seed-{seed}") / "pictures" / row


def read_scores(out: Path, row: str, seed: int) -> Measured:
    folder = out / "limits" if row in LIMITS else out / f"seed-{seed}"
    found = json.loads((folder / "scores" / f"{row}.json").read_text(encoding="utf-8"))
    by_person = {metric: np.array(values) for metric, values in found["by_person"].items()}
    return Measured(by_person, found["fid"], found["faceless"])
