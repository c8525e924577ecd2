"""What the evaluation needs from published weights of a rival."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.identity.faces import Face
from facesnap_ext.weights.model_files import ModelFiles

T = TypeVar("T")

BUFFALO_L = "w600k_r50.onnx"  # the recognition model of insightface's pack buffalo_l


@dataclass(frozen=True)
class Sampling:
    """How an image is sampled. guided: whether classifier-free guidance is used."""

    steps: int
    guided: bool


Prepare = Callable[[Sequence[Face], str, Sampling], dict[str, Any]]
"""Encodes one person's references and a prompt, and returns the pipeline's arguments for them."""


@dataclass(frozen=True)
class PublishedMethod(ABC):
    """A recognised file of a rival.

    Attributes:
        path: the file. title: name of the method.
        recognition: file name of the recognition model whose embeddings the method was trained with; empty if it does
            not use embeddings.
        parts: what the method needs from the model folder, by names in `ModelFiles`.
    """

    path: Path
    title: str
    recognition: str
    parts: tuple[str, ...]

    @abstractmethod
    def installed(self, pipe: Any, files: ModelFiles) -> AbstractContextManager[Prepare]:
        """Load the weights into an SDXL pipeline inside the `with` block. Afterwards, the pipeline is as before.

        Raises:
            FaceSnapError: the file is damaged, or a network that the method needs is missing or different.
        """

    def check_prompt(self, pipe: Any, prompt: str) -> None:  # noqa: B027 (most methods can use any)
        """Raise `FaceSnapError` if the method cannot use a prompt."""

    def incomplete(self, reason: Exception | str) -> FaceSnapError:
        return FaceSnapError(
            f"{self.path.name} is incomplete or damaged ({reason_of(reason, 200)}); download it again."
        )


def below(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors, or whatever is stored by their names, whose names have a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def require_peft(path: Path) -> None:
    """Raise `FaceSnapError` if diffusers cannot load the LoRA in a file. It would leave out some LoRAs silently."""
    from diffusers import utils

    if not utils.USE_PEFT_BACKEND:
        raise FaceSnapError(f"{path.name} contains a LoRA, which diffusers loads with peft; run 'pip install -U peft'.")
