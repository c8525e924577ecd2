"""The interface of a rival, for the trainer, its sample images and the comparison."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from facesnap_ext.identity.clip import ImageEncoder
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.weights.facesnap_file import POINTS72, FaceSnapInfo, FaceSnapWeights
from facesnap_lab.rivals import files
from facesnap_lab.rivals.attention import Attended, Injection, injected

Features = tuple[Tensor, ...]
"""Features of R references for each of N people, each [N, R, …]. Zeros stand for no person."""


@dataclass(frozen=True, eq=False)
class References:
    """Reference photos of faces, one per row.

    embeddings: ArcFace embeddings [N,E], not normalised. clip_pixels: crops preprocessed for CLIP [N,3,S,S].
    images: [N,H,W,3] uint8 RGB. points: the 72 landmarks [N,72,2] in pixels of `images`.
    """

    embeddings: Tensor
    clip_pixels: Tensor
    images: Tensor
    points: Tensor


@dataclass(frozen=True, eq=False)
class Text:
    """Encoded texts. context: [N,T,C]. pooled: [N,P]. class_words: [N,T] bool, where the word for the person is; all
    False without such a word."""

    context: Tensor
    pooled: Tensor
    class_words: Tensor

    @property
    def without_class_words(self) -> Text:
        return replace(self, class_words=torch.zeros_like(self.class_words))

    def cpu(self) -> Text:
        """Return a copy on the CPU, in single precision."""
        return Text(self.context.float().cpu(), self.pooled.float().cpu(), self.class_words.cpu())


@dataclass(frozen=True, eq=False)
class UNetCall:
    """The inputs of a UNet call that a ControlNet needs too.

    x: scaled noisy latents [N,C,h,w]. timesteps: [N]. y: pooled text and sizes; see `FFRNet.forward`.
    landmark_images: [N,3,sh,sw] in 0…1.
    """

    x: Tensor
    timesteps: Tensor
    y: Tensor
    landmark_images: Tensor


class Rival(nn.Module, ABC):
    """A method that is trained and sampled in place of Mixer and FFRNet. Its parameters are what is trained and saved.

    Attributes:
        name: the method's name in `TrainConfig.method`.
        hint: the kind of landmark image that it is trained with.
        config: the sizes, a dataclass from which the class can be constructed; stored in the file's metadata.
        diffusion_loss: an additional loss of the diffusion branch, or None. Its arguments are what the
            cross-attentions computed, the 72 landmarks [N,72,2] of the noisy images in pixels, and their side.
        alignment_loss: an additional loss of each step of the lightning branch that is backpropagated through, or None.
            Its arguments are what the cross-attentions computed with the method and without it.
    """

    name: ClassVar[str]
    hint: ClassVar[str] = POINTS72
    config: Any
    diffusion_loss: ClassVar[Callable[[dict[int, Attended], Tensor, int], Tensor] | None] = None
    alignment_loss: ClassVar[Callable[[dict[int, Attended], dict[int, Attended]], Tensor] | None] = None

    @classmethod
    @abstractmethod
    def create(cls, start: FaceSnapWeights, unet: Any) -> Rival:
        """Return the untrained method for a base's UNet, with the random generator's current state.

        Args:
            start: the FaceSnap file made from the base; states the widths of embeddings and CLIP tokens.
        """

    @staticmethod
    @abstractmethod
    def features(clip: ImageEncoder, references: References) -> Features:
        """Extract what the method sees of N photos with the frozen networks, each [N, …]."""

    @abstractmethod
    def forward(self, features: Features, text: Text, call: UNetCall | None) -> Injection:
        """Compute the injection for N rows of a UNet call, which only methods with a ControlNet look at."""

    @staticmethod
    def class_words(tokenizer: Any, captions: Sequence[str | None], length: int) -> Tensor:
        """Return `Text.class_words` [N, length] of captions. Only PhotoMaker looks for them."""
        return torch.zeros(len(captions), length, dtype=torch.bool)

    @classmethod
    def load(cls, path: Path) -> Rival:
        """Load the method's file to the CPU; see `files.load`."""
        return files.load(path, cls)

    def save(self, path: Path, info: FaceSnapInfo) -> None:
        """Write the method's file; see `files.save`."""
        files.save(path, self, info)

    @contextmanager
    def applied(
        self, pipe: Any, features: Features, text: Text, null: Text, landmarks: Landmarks | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Apply the method to a diffusers pipeline inside the `with` block, for one image.

        Args:
            features: of one person [1, R, …]. text, null: of the prompt and the negative prompt, one row each. All have
                the device and type of this method's weights.
            landmarks: the face in the image that is generated. Only methods with a ControlNet use them.

        Yields:
            The embeddings of prompt and negative prompt to pass to the pipeline.
        """
        with torch.no_grad():
            conditional = self(features, text, None)
            unconditional = self(without_person(features), null.without_class_words, None)
        with injected(pipe, unconditional, conditional):
            yield conditional.context.to(pipe.unet.dtype), unconditional.context.to(pipe.unet.dtype)


def without_person(features: Features, rows: Tensor | None = None) -> Features:
    """Replace the features by zeros, in all rows or in those where `rows` [N] is True."""
    if rows is None:
        return tuple([torch.zeros_like(feature) for feature in features])
    return tuple([feature.masked_fill(rows.view(-1, *[1] * (feature.ndim - 1)), 0) for feature in features])
