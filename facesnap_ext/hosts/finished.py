"""A job's finished images, and what the settings request to be done with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from facesnap_ext.weights.image_classifier import ImageClassifier

ABSENT = -2.0
"""The score of an image in which a person has no face, below every cosine."""


@dataclass
class FinishedImage:
    """One finished image.

    Attributes:
        batch, iteration, index: index of the prepared batch, of the iteration, and of the image in the iteration.
        prompt, seed: as the host uses them for the file's name.
        likenesses: by unit number; None for a person without a face. Empty if nothing was measured.
        rejected: label and probability if the image was blurred.
        image: as the host shows it; None until the host has finished it.
        checked: the image that the classifier accepted, or the blurred image.
        save: whether the host would have saved it.
    """

    batch: int
    iteration: int
    index: int
    prompt: str
    seed: Any
    likenesses: Mapping[int, float | None] = field(default_factory=dict)
    rejected: str = ""
    image: Image.Image | None = None
    checked: Image.Image | None = None
    save: bool = False

    @property
    def score(self) -> float:
        """The lowest likeness of all people, -1…1; `ABSENT` if a person has no face or nothing was measured."""
        values = [ABSENT if value is None else value for value in self.likenesses.values()]
        return min(values, default=ABSENT)

    @property
    def measured(self) -> bool:
        """Whether the likeness of any person is known."""
        return any(value is not None for value in self.likenesses.values())


@dataclass
class Plan:
    """What happens to a job's finished images.

    Attributes:
        measure: measure the likeness to each person.
        order: order the images of each prepared batch by their score, highest first.
        keep: number of images of each prepared batch to keep, those with the highest scores; 0 keeps all.
        strip: add an image that shows the reference photos beside the finished image.
        classifier: blurs the images that it rejects; None checks nothing.
        finished: the images so far, in the order in which they are made.
    """

    measure: bool = False
    order: bool = False
    keep: int = 0
    strip: bool = False
    classifier: ImageClassifier | None = None
    finished: list[FinishedImage] = field(default_factory=list)

    @property
    def arranges(self) -> bool:
        """Whether the list of images that the job returns changes."""
        return self.order or self.keep > 0 or self.strip
