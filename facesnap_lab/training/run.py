"""The state of a training run in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from facesnap_ext.weights.facesnap_file import FaceSnapInfo
from facesnap_lab.training.config import TrainConfig
from facesnap_lab.training.data import TrainingImages
from facesnap_lab.training.frozen import Frozen
from facesnap_lab.training.objective import Objective


@dataclass(frozen=True, eq=False)
class Run:
    """A training run in one process; `prepare.prepare_run` creates it.

    info: metadata of the start file. file_dtype: dtype of the files that are written. networks and optimizer: wrapped
    by accelerate. build: creates networks of the same sizes, for the average. average: exponential moving average of
    the networks' parameters, in their order.
    """

    config: TrainConfig
    accelerator: Any
    info: FaceSnapInfo
    file_dtype: torch.dtype
    networks: nn.Module
    build: Callable[[], nn.Module]
    optimizer: Any
    average: list[Tensor]
    frozen: Frozen
    images: TrainingImages
    objective: Objective
