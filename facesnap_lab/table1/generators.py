"""The rows of Table 1: trained rivals, the base without a person, and photos that set the limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from facesnap_ext import photos
from facesnap_ext.identity.clip import ImageEncoder, load_image_encoder, preprocess
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.identity.faces import Face
from facesnap_ext.landmarks.points72 import Landmarks, crop_and_resize
from facesnap_lab.evaluation.draw import Base, check_faces, digest
from facesnap_lab.evaluation.protocol import Case
from facesnap_lab.rivals.method import Features, References, Rival, Text
from facesnap_lab.training.data import resized


@dataclass(frozen=True, eq=False)
class TrainedRival:
    """A rival's trained weights and a base model.

    path: the rival's file. clip: the image encoder; None until the rival is installed. encoded: the features of the
    people drawn so far.
    """

    base: Base
    rival: Rival
    path: Path
    encoders: Encoders
    clip: ImageEncoder | None = None
    encoded: dict[tuple[Path, ...], Features] = field(default_factory=dict)

    def check(self, cases: Sequence[Case]) -> None:
        """Detect the faces of all references and driving photos.

        Raises:
            FaceSnapError: a photo cannot be read or has no face.
        """
        check_faces(self.encoders, cases)

    @contextmanager
    def installed(self) -> Iterator[TrainedRival]:
        clip = load_image_encoder(self.encoders.files.require("clip"))
        self.rival.to(self.base.pipe.device)
        try:
            yield replace(self, clip=clip, encoded={})
        finally:
            self.rival.cpu()

    @torch.no_grad()
    def draw(self, case: Case) -> np.ndarray:
        """Generate a case's image, [height,width,3] uint8.

        Only InstantID follows the driving photo, through the photo's own landmarks, as in the published code.
        """
        pipe = self.base.pipe
        context, null, pooled, null_pooled = pipe.encode_prompt(case.prompt.text, do_classifier_free_guidance=True)
        words = [
            self.rival.class_words(pipe.tokenizer, [caption], context.shape[1]).to(context.device)
            for caption in (case.prompt.text, None)
        ]
        text, negative = Text(context, pooled, words[0]), Text(null, null_pooled, words[1])
        landmarks = self._landmarks(photos.from_path(case.pose.photo))
        with self.rival.applied(pipe, self._features(case), text, negative, landmarks) as (with_text, without):
            return self.base.draw(
                case.seed,
                prompt_embeds=with_text,
                negative_prompt_embeds=without,
                pooled_prompt_embeds=pooled,
                negative_pooled_prompt_embeds=null_pooled,
            )

    def recipe(self, case: Case) -> dict[str, Any]:
        """Return everything that determines a case's image, ready for JSON; see `EvaluationPipeline.recipe`."""
        own = {"method": [self.rival.name, digest(self.path)], "driving": digest(case.pose.photo)}
        return self.base.recipe(case) | own

    def _features(self, case: Case) -> Features:
        assert self.clip is not None, "the rival is installed first"
        key = case.identity.references
        if key not in self.encoded:
            faces = [self.encoders.face(photos.from_path(path)) for path in key]
            given = references(self.encoders, faces, self.clip.image_size, self.base.width)
            features = self.rival.features(self.clip, given)
            self.encoded[key] = tuple([feature[None].to(self.base.pipe.device) for feature in features])
        return self.encoded[key]

    def _landmarks(self, photo: photos.Photo) -> Landmarks:
        face = self.encoders.face(photo)
        return crop_and_resize(own_landmarks(self.encoders, face), self.base.width, self.base.height, face.box)


def own_landmarks(encoders: Encoders, face: Face) -> Landmarks:
    """Return a face's own 72 landmarks in its photo."""
    return encoders.landmarks(encoders.codes(face).shape, face)


def references(encoders: Encoders, faces: Sequence[Face], clip_side: int, side: int) -> References:
    """Return one person's references, one per row, as in training.

    Args:
        clip_side: side of CLIP's input. side: side of the images.
    """
    points = []
    for face in faces:
        landmarks = own_landmarks(encoders, face)
        points.append(landmarks.points * (side / landmarks.height))
    return References(
        torch.stack([torch.from_numpy(face.embedding) for face in faces]),
        preprocess([face.crop for face in faces], clip_side),
        torch.stack([torch.from_numpy(resized(face.photo.pixels, side)) for face in faces]),
        torch.from_numpy(np.stack(points)),
    )


@dataclass(frozen=True, eq=False)
class NoPerson:
    """The base alone, which only follows the prompt."""

    base: Base

    def check(self, cases: Sequence[Case]) -> None:
        """Any case can be generated."""

    @contextmanager
    def installed(self) -> Iterator[NoPerson]:
        yield self

    def draw(self, case: Case) -> np.ndarray:
        return self.base.draw(case.seed, prompt=case.prompt.text)

    def recipe(self, case: Case) -> dict[str, Any]:
        return self.base.recipe(case)


@dataclass(frozen=True, eq=False)
class Copies:
    """Photos in place of generated images."""

    choose: Callable[[Case], Path]

    def check(self, cases: Sequence[Case]) -> None:
        """Any photo can be copied."""

    @contextmanager
    def installed(self) -> Iterator[Copies]:
        yield self

    def draw(self, case: Case) -> np.ndarray:
        return photos.from_path(self.choose(case)).pixels

    def recipe(self, case: Case) -> dict[str, Any]:
        return {"copy of": digest(self.choose(case))}
