"""The ablation's subjects and judges in the second edition of the miniature, where people change their look."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from facesnap_ext.engine import Engine
from facesnap_ext.identity.clip import preprocess
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_lab.ablation.pictures import AblationSetup, JudgeFeatures, Subject
from facesnap_lab.miniature.measure import random_prompt
from facesnap_lab.miniature.render import points_at_rest
from facesnap_lab.miniature.second.judges import JUDGES, Judges
from facesnap_lab.miniature.second.measure import DRIVING, OTHER_LOOKS, REFERENCE, SECOND, photo, write_models
from facesnap_lab.miniature.second.render import head
from facesnap_lab.miniature.second.world import person
from facesnap_lab.training.config import TrainConfig

REFERENCES = 1  # further photos in the reference's look would be `SECOND` and `DRIVING`


class SecondJudges:
    """FaceSim is judged by `judge`, the inner face by `judge_inner`, and CLIP-face by `details`.

    Args:
        stages: folder of all stages.
    """

    def __init__(self, stages: Path) -> None:
        from transformers import CLIPModel

        self.judges = Judges(stages)
        self.clip: Any = CLIPModel.from_pretrained(stages / "clip" / "model", local_files_only=True)

    @torch.no_grad()
    def features_of(self, image: np.ndarray) -> JudgeFeatures:
        """Return the judges' features of an image [S,S,3] uint8, and CLIP's of the whole image for FID."""
        seen = self.judges.find(image)
        pixels = preprocess([image], self.clip.config.vision_config.image_size)
        whole = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)[0]
        faces = [self.judges.embed(name, seen) for name in JUDGES]
        return JudgeFeatures(*faces, whole.numpy())


class SecondSetup(AblationSetup):
    """`AblationSetup` for a folder of all stages of the second edition."""

    def __init__(self, train: TrainConfig, people: int, models: Path, device: torch.device | str, stages: Path):
        super().__init__(train, people, REFERENCES, models, device)
        self.stages = stages

    @cached_property
    def engine(self) -> tuple[Engine, ModelFiles]:
        files = write_models(self.stages, self.train.start, self.models)
        return Engine(lambda: files), files

    @cached_property
    def judges(self) -> SecondJudges:
        return SecondJudges(self.stages)

    @cached_property
    def shapes(self) -> np.ndarray:
        return points_at_rest(head(), np.stack([person("test", index).shape for index in range(self.people)]))

    def subject(self, index: int) -> Subject:
        """Render a person from the test split in one look, driven by another person; the unseen photos have others."""
        return Subject(
            references=(photo(index, REFERENCE),),
            driving=photo(int(self.drivers[index]), DRIVING),
            unseen=tuple(photo(index, shot) for shot in OTHER_LOOKS),
            prompt=random_prompt(np.random.default_rng([0, index])),
            seed=index,
            second=photo(index, SECOND),
        )
