"""The ablation's images in the miniature world: the subjects, how each row generates them, and how they are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from facesnap_ext.conditioning import Conditioning
from facesnap_ext.engine import Engine
from facesnap_ext.identity import faces
from facesnap_ext.identity.faces import NoFaceError
from facesnap_ext.landmarks.points72 import Landmarks, crop_and_resize
from facesnap_ext.networks.mixer import average_references
from facesnap_ext.photos import Photo
from facesnap_ext.weights.facesnap_file import FaceSnapWeights
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_lab.ablation.rows import Row
from facesnap_lab.evaluation import metrics
from facesnap_lab.evaluation.draw import Base
from facesnap_lab.evaluation.judges import Judges, find_face, load_face_judge
from facesnap_lab.evaluation.miniature import miniature_judges
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.measure import photo, random_prompt
from facesnap_lab.miniature.render import face_shapes
from facesnap_lab.miniature.shipped import Sampler
from facesnap_lab.training.config import TrainConfig
from facesnap_lab.training.frozen import load_base
from facesnap_lab.training.lightning import load_few_step
from facesnap_lab.training.samples import apply_conditioning

REFERENCE_SHOTS = (0, *range(2, 9))
DRIVING_SHOT = 1
UNSEEN_SHOTS = (9, 10, 11)
METRICS = ("face_sim", "inner", "clip_face", "face_sim_unseen", "inner_unseen")


@dataclass(frozen=True, eq=False)
class Subject:
    """A held-out person and the inputs that all rows share. Images are [S,S,3] uint8.

    references: a row with one reference uses the first. unseen: further photos, which are not used as references.
    second: a further photo in the first reference's look, if looks change.
    """

    references: tuple[np.ndarray, ...]
    driving: np.ndarray  # a second person, whose face has a different shape
    unseen: tuple[np.ndarray, ...]
    prompt: str
    seed: int  # seed of the noise
    second: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Features:
    """Features that the frozen networks extract from a subject's photos.

    embeddings: [R,E] and clip_tokens: [R,T,C] of the references. predicted: the first reference's face in the driving
    photo's pose. driving: the driving photo's own landmarks. Both are estimated from the photos.
    """

    embeddings: Tensor
    clip_tokens: Tensor
    predicted: Landmarks
    driving: Landmarks

    def landmarks(self, row: Row) -> Landmarks | None:
        return {"predicted": self.predicted, "driving": self.driving, "none": None}[row.landmarks]


def assign_drivers(shapes: np.ndarray) -> np.ndarray:
    """For each person [P,72,2], choose a driver with a differently shaped face; each person drives exactly once.

    The assignment maximises the sum of the mean point distances (the linear assignment problem).

    Returns:
        [P] indices of the drivers, a permutation without fixed points.
    """

    from scipy.optimize import linear_sum_assignment

    distances = shape_distances(shapes)
    np.fill_diagonal(distances, -1e6)
    return linear_sum_assignment(-distances)[1]


def shape_distances(shapes: np.ndarray) -> np.ndarray:
    """[P,P] mean point distances between faces [P,72,2]."""
    return np.stack([np.linalg.norm(shapes - shape, axis=-1).mean(axis=-1) for shape in shapes])


def render_subject(index: int, driver: int, references: int) -> Subject:
    """Render a person from the test split, driven by another person's pose."""
    return Subject(
        references=tuple(photo("test", index, shot)[0] for shot in REFERENCE_SHOTS[:references]),
        driving=photo("test", driver, DRIVING_SHOT)[0],
        unseen=tuple(photo("test", index, shot)[0] for shot in UNSEEN_SHOTS),
        prompt=random_prompt(np.random.default_rng([0, index])),
        seed=index,
    )


def extract_features(engine: Engine, files: ModelFiles, subject: Subject) -> Features:
    """Run the frozen networks on a subject's photos.

    Raises:
        FaceSnapError: a photo has no face.
    """
    encoders = engine.encoders(files)
    references = [encoders.face(Photo(picture, "Reference")) for picture in subject.references]
    driving = encoders.face(Photo(subject.driving, "Driving photo"))
    height, width = subject.driving.shape[:2]
    predicted, own = (
        crop_and_resize(encoders.landmarks(encoders.codes(source).shape, driving), width, height, driving.box)
        for source in (references[0], driving)
    )
    return Features(
        torch.stack([torch.from_numpy(face.embedding) for face in references]),
        torch.stack(encoders.clip_tokens(references)),
        predicted,
        own,
    )


@torch.no_grad()
def tokens_of(row: Row, weights: FaceSnapWeights, features: Features) -> Tensor:
    """Return identity tokens [1,T,C], computed from as many references as the row uses."""
    given = (features.embeddings[None, : row.references], features.clip_tokens[None, : row.references])
    if row.average:
        given = average_references(*given)
    return weights.mixer.float()(*given)


def draw(sampler: Sampler, row: Row, weights: FaceSnapWeights, subject: Subject, features: Features) -> np.ndarray:
    """Generate a row's image of a subject [S,S,3] uint8."""
    tokens = tokens_of(row, weights, features)
    pipe = sampler.pipe
    context, null, pooled, pooled_null = pipe.encode_prompt(subject.prompt, do_classifier_free_guidance=True)
    conditioning = Conditioning(
        weights.ffrnet, tokens, features.landmarks(row), text_free=weights.info.text_free, name=weights.name
    )
    height, width = subject.driving.shape[:2]
    with apply_conditioning(pipe, conditioning, row.training.tokens, context, null) as (with_text, without):
        return Base(pipe, "", width, height, sampler.steps, sampler.scale).draw(
            subject.seed,
            prompt_embeds=with_text,
            negative_prompt_embeds=without,
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=pooled_null,
        )


class AblationSetup:
    """Everything an ablation generates and judges with: subjects, sampler, features and judges of the miniature world.

    Each part is computed at first use and cached.
    """

    def __init__(self, train: TrainConfig, people: int, references: int, models: Path, device: torch.device | str):
        """
        Args:
            models: an empty folder, which must not be removed while this object is in use.
        """
        self.train, self.people, self.references, self.models, self.device = train, people, references, models, device
        self._features: dict[int, Features] = {}
        self._real_photos: dict[int, RealPhotoFeatures] = {}

    @cached_property
    def sampler(self) -> Sampler:
        """The few-step model used in training, as in the paper; the base model if training used none."""
        pipe = load_base(self.train.base, self.train.base_config, torch.float32).to(self.device)
        if self.train.lightning is None:
            return shipped.with_base_scheduler(pipe)
        few_step = load_few_step(pipe, self.train.lightning)
        if few_step.is_lora:
            few_step.unet.enable_adapters()
        pipe.unet = few_step.unet
        return shipped.with_few_step_scheduler(pipe, self.train.lightning_scale)

    @cached_property
    def engine(self) -> tuple[Engine, ModelFiles]:
        """The engine with the CLIP and the face model pack used in training, and the miniature's Landmark Predictor."""
        files = shipped.write_models(self.models)
        files = replace(files, clip=self.train.clip, face_pack=self.train.face_pack or files.face_pack)
        return Engine(lambda: files), files

    @cached_property
    def judges(self) -> ImageJudges:
        return load_judges()

    @cached_property
    def drivers(self) -> np.ndarray:
        """[P] the index of each person's driver."""
        return assign_drivers(self.shapes)

    @cached_property
    def shapes(self) -> np.ndarray:
        """[P,72,2] the faces of the people at rest, in metres."""
        return face_shapes(self.people)

    @property
    def distances(self) -> dict[str, float]:
        """Mean point distances of faces in mm: between person and driver, and between any two people."""
        distances = 1000 * shape_distances(self.shapes)
        any_two = distances[~np.eye(self.people, dtype=bool)]
        pairs = distances[np.arange(self.people), self.drivers]
        return {"pair_distance_mm": float(pairs.mean()), "mean_distance_mm": float(any_two.mean())}

    def subject(self, index: int) -> Subject:
        return render_subject(index, int(self.drivers[index]), self.references)

    def features(self, index: int, subject: Subject) -> Features:
        if index not in self._features:
            self._features[index] = extract_features(*self.engine, subject)
        return self._features[index]

    def real_photos(self, index: int) -> RealPhotoFeatures:
        if index not in self._real_photos:
            self._real_photos[index] = judge_real_photos(self.judges, self.subject(index))
        return self._real_photos[index]


@dataclass(frozen=True, eq=False)
class JudgeFeatures:
    """The judges' features of an image; None if it has no face. features: for FID [D]."""

    face: np.ndarray | None
    inner: np.ndarray | None
    clip_face: np.ndarray | None
    features: np.ndarray


class ImageJudges(Protocol):
    """The judges of either edition."""

    def features_of(self, image: np.ndarray) -> JudgeFeatures: ...


@dataclass(frozen=True, eq=False)
class AblationJudges:
    """The networks used for measuring. inner: a pack whose recognition model sees neither hair nor outline."""

    judges: Judges
    inner: faces.FacePack

    def features_of(self, image: np.ndarray) -> JudgeFeatures:
        face = find_face(self.judges.pack, Photo(image, "Image"))
        inner = find_face(self.inner, Photo(image, "Image"))
        return JudgeFeatures(
            face and self.judges.embed(face),
            inner and inner.embedding,
            face and self.judges.clip.embed_images([face.crop])[0],
            self.judges.extractor.features([image])[0],
        )


def load_judges() -> AblationJudges:
    """Load the miniature's two judges and its CLIP."""
    judges = miniature_judges()
    return AblationJudges(judges, load_face_judge(shipped.JUDGES / "judge_inner.onnx", judges.pack)[0])


@dataclass(frozen=True, eq=False)
class RealPhotoFeatures:
    """The judges' features of a subject's real photos."""

    reference: JudgeFeatures
    driving: JudgeFeatures
    unseen: tuple[JudgeFeatures, ...]
    second: JudgeFeatures | None = None


def judge_real_photos(judges: ImageJudges, subject: Subject) -> RealPhotoFeatures:
    """Extract the judges' features of a subject's real photos.

    Raises:
        FaceSnapError: a photo has no face.
    """
    real = RealPhotoFeatures(
        judges.features_of(subject.references[0]),
        judges.features_of(subject.driving),
        tuple(map(judges.features_of, subject.unseen)),
        None if subject.second is None else judges.features_of(subject.second),
    )
    shown = (real.reference, real.driving, *real.unseen, *([real.second] if real.second else []))
    if any(one.face is None for one in shown):
        raise NoFaceError(
            f"The judge found no face in a real photo of person {subject.seed}; set 'people' to a smaller number."
        )
    return real


def compare(image: JudgeFeatures, real: RealPhotoFeatures) -> dict[str, float]:
    """Return an image's `METRICS`: cosines to the reference, and mean cosines to the unseen photos."""
    return {
        "face_sim": metrics.likeness(image.face, [real.reference.face]),
        "inner": metrics.likeness(image.inner, [real.reference.inner]),
        "clip_face": metrics.likeness(image.clip_face, [real.reference.clip_face]),
        "face_sim_unseen": metrics.likeness(image.face, [one.face for one in real.unseen]),
        "inner_unseen": metrics.likeness(image.inner, [one.inner for one in real.unseen]),
    }


def limits(people: Sequence[RealPhotoFeatures]) -> dict[str, dict[str, np.ndarray]]:
    """Return the metrics' upper and lower limits [P]: two photos of one person, and photos of two people.

    If looks change, the two photos have the same look.
    """
    same = [[compare(one, real) for one in ([real.second] if real.second else real.unseen)] for real in people]
    different = [compare(real.driving, real) for real in people]
    names = METRICS if all(real.second for real in people) else ("face_sim", "inner", "clip_face")
    return {
        "two photos of one person": {n: np.array([np.mean([one[n] for one in row]) for row in same]) for n in names},
        "photos of two people": {n: np.array([row[n] for row in different]) for n in names},
    }
