"""The ablation's pictures in the miniature world: who is drawn, how each row draws them, and what the judges say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from facesnap_ext.conditioning import Conditioning
from facesnap_ext.engine import Engine
from facesnap_ext.identity import faces
from facesnap_ext.identity.faces import NoFaceError
from facesnap_ext.landmarks.flame import full_pose, posed_vertices
from facesnap_ext.landmarks.points72 import Landmarks, crop_and_resize, points_on
from facesnap_ext.networks.mixer import average_references
from facesnap_ext.photos import Photo
from facesnap_ext.weights.facesnap_file import FaceSnapWeights
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_lab.ablation.rows import Row
from facesnap_lab.evaluation import metrics
from facesnap_lab.evaluation.judges import Judges, find_face, load_face_judge
from facesnap_lab.evaluation.miniature import miniature_judges
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.measure import photo, random_prompt
from facesnap_lab.miniature.render import head
from facesnap_lab.miniature.shipped import Sampler
from facesnap_lab.miniature.world import EXPRESSION_CODES, person
from facesnap_lab.training.config import TrainConfig
from facesnap_lab.training.frozen import load_base
from facesnap_lab.training.lightning import load_few_step
from facesnap_lab.training.samples import steered

REFERENCE_SHOTS = (0, *range(2, 9))
DRIVING_SHOT = 1
UNSEEN_SHOTS = (9, 10, 11)
METRICS = ("face_sim", "inner", "clip_face", "face_sim_unseen", "inner_unseen")


@dataclass(frozen=True, eq=False)
class Sitter:
    """A held-out person and everything that all rows draw them with. Pictures are [S,S,3] uint8.

    references: the first is the one that counts where one is given. unseen: further photos, which nothing is given.
    """

    references: tuple[np.ndarray, ...]
    driving: np.ndarray  # somebody else, whose face has another shape
    unseen: tuple[np.ndarray, ...]
    prompt: str
    seed: int  # of the noise


@dataclass(frozen=True, eq=False)
class Features:
    """What the frozen networks see in a sitter's photos.

    embeddings: [R,E] and clip_tokens: [R,T,C] of the references. predicted: the first reference's face in the driving
    photo's pose. driving: the driving photo's own landmarks. All by the networks on the photos.
    """

    embeddings: Tensor
    clip_tokens: Tensor
    predicted: Landmarks
    driving: Landmarks

    def landmarks(self, row: Row) -> Landmarks | None:
        return {"predicted": self.predicted, "driving": self.driving, "none": None}[row.landmarks]


def face_shapes(people: int) -> np.ndarray:
    """[P,72,2] the points of the test split's people at rest, seen from the front, in metres; the world's truth, for
    pairing alone."""
    shape = torch.tensor(np.stack([person("test", index).shape for index in range(people)]), dtype=torch.float32)
    flame = head()
    rest = full_pose(flame, torch.zeros(people, 6))
    vertices = posed_vertices(flame, shape, torch.zeros(people, EXPRESSION_CODES), rest)
    return points_on(vertices, flame.faces)[..., :2].numpy()


def other_shapes(shapes: np.ndarray) -> np.ndarray:
    """For each person [P,72,2] the number of another whose face is shaped differently; everybody drives once.

    The pairs are those whose mean distance of points is largest in sum (the assignment problem).

    Returns:
        [P] a permutation that leaves nobody in place.
    """
    from scipy.optimize import linear_sum_assignment

    distances = shape_distances(shapes)
    np.fill_diagonal(distances, -1e6)
    return linear_sum_assignment(-distances)[1]


def shape_distances(shapes: np.ndarray) -> np.ndarray:
    """[P,P] mean distances of the points of faces [P,72,2]."""
    return np.stack([np.linalg.norm(shapes - shape, axis=-1).mean(axis=-1) for shape in shapes])


def sit(index: int, driver: int, references: int) -> Sitter:
    """A person of the test split, with another's pose."""
    return Sitter(
        references=tuple(photo("test", index, shot)[0] for shot in REFERENCE_SHOTS[:references]),
        driving=photo("test", driver, DRIVING_SHOT)[0],
        unseen=tuple(photo("test", index, shot)[0] for shot in UNSEEN_SHOTS),
        prompt=random_prompt(np.random.default_rng([0, index])),
        seed=index,
    )


def look_at(engine: Engine, files: ModelFiles, sitter: Sitter) -> Features:
    """Run the frozen networks on a sitter's photos.

    Raises:
        FaceSnapError: a photo has no face.
    """
    encoders = engine.encoders(files)
    references = [encoders.face(Photo(picture, "Reference")) for picture in sitter.references]
    driving = encoders.face(Photo(sitter.driving, "Driving photo"))
    height, width = sitter.driving.shape[:2]
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
    """Identity tokens [1,T,C] from as many references as the row is given."""
    given = (features.embeddings[None, : row.references], features.clip_tokens[None, : row.references])
    if row.average:
        given = average_references(*given)
    return weights.mixer.float()(*given)


def draw(sampler: Sampler, row: Row, weights: FaceSnapWeights, sitter: Sitter, features: Features) -> np.ndarray:
    """A row's picture of a sitter [S,S,3] uint8."""
    tokens = tokens_of(row, weights, features)
    pipe = sampler.pipe
    context, null, pooled, pooled_null = pipe.encode_prompt(sitter.prompt, do_classifier_free_guidance=True)
    conditioning = Conditioning(
        weights.ffrnet, tokens, features.landmarks(row), text_free=weights.info.text_free, name=weights.name
    )
    height, width = sitter.driving.shape[:2]
    with steered(pipe, conditioning, row.training.tokens, context, null) as (with_text, without):
        drawn = pipe(
            prompt_embeds=with_text,
            negative_prompt_embeds=without,
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=pooled_null,
            width=width,
            height=height,
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.scale,
            generator=torch.Generator().manual_seed(sitter.seed),
        )
    return np.asarray(drawn.images[0])


class Studio:
    """The sitters, their features and what judges see in their photos: all in the miniature world, each computed when
    it is first wanted and then kept."""

    def __init__(self, train: TrainConfig, people: int, references: int, models: Path, device: torch.device | str):
        """
        Args:
            models: an empty folder, which stays while the studio is used.
        """
        self.train, self.people, self.references, self.models, self.device = train, people, references, models, device
        self._features: dict[int, Features] = {}
        self._known: dict[int, Known] = {}

    @cached_property
    def sampler(self) -> Sampler:
        """The few-step model that was trained with, as in the paper, or the base where there was none."""
        pipe = load_base(self.train.base, self.train.base_config, torch.float32).to(self.device)
        if self.train.lightning is None:
            return shipped.many_steps(pipe)
        few_step = load_few_step(pipe, self.train.lightning)
        if few_step.is_lora:
            few_step.unet.enable_adapters()
        pipe.unet = few_step.unet
        return shipped.few_steps(pipe)

    @cached_property
    def engine(self) -> tuple[Engine, ModelFiles]:
        """The networks that were trained with, and the miniature's Landmark Predictor."""
        files = shipped.write_models(self.models)
        files = replace(files, clip=self.train.clip, face_pack=self.train.face_pack or files.face_pack)
        return Engine(lambda: files), files

    @cached_property
    def jury(self) -> Jury:
        return load_jury()

    @cached_property
    def drivers(self) -> np.ndarray:
        """[P] whose photo drives each person."""
        return other_shapes(face_shapes(self.people))

    @property
    def distances(self) -> dict[str, float]:
        """How far the points of faces are apart in millimetres, on average over the pairs and over any two people."""
        apart = 1000 * shape_distances(face_shapes(self.people))
        any_two = apart[~np.eye(self.people, dtype=bool)]
        pairs = apart[np.arange(self.people), self.drivers]
        return {"shape distance": float(pairs.mean()), "any distance": float(any_two.mean())}

    def sitter(self, index: int) -> Sitter:
        return sit(index, int(self.drivers[index]), self.references)

    def features(self, index: int, sitter: Sitter) -> Features:
        if index not in self._features:
            self._features[index] = look_at(*self.engine, sitter)
        return self._features[index]

    def known(self, index: int) -> Known:
        if index not in self._known:
            self._known[index] = know(self.jury, self.sitter(index))
        return self._known[index]


@dataclass(frozen=True, eq=False)
class Seen:
    """What the judges see in a picture; None without a face. features: for FID [D]."""

    face: np.ndarray | None
    inner: np.ndarray | None
    clip_face: np.ndarray | None
    features: np.ndarray


@dataclass(frozen=True, eq=False)
class Jury:
    """Networks that measure. inner: a pack whose recognition sees neither hair nor outline."""

    judges: Judges
    inner: faces.FacePack

    def look(self, picture: np.ndarray) -> Seen:
        face = find_face(self.judges.pack, Photo(picture, "Picture"))
        inner = find_face(self.inner, Photo(picture, "Picture"))
        return Seen(
            face and self.judges.embed(face),
            inner and inner.embedding,
            face and self.judges.clip.of_pictures([face.crop])[0],
            self.judges.extractor.features([picture])[0],
        )


def load_jury() -> Jury:
    """The miniature's two judges and its CLIP."""
    judges = miniature_judges()
    return Jury(judges, load_face_judge(shipped.JUDGES / "judge_inner.onnx", judges.pack)[0])


@dataclass(frozen=True, eq=False)
class Known:
    """What the judges see in a sitter's real photos."""

    reference: Seen
    driving: Seen
    unseen: tuple[Seen, ...]


def know(jury: Jury, sitter: Sitter) -> Known:
    """Look at a sitter's real photos.

    Raises:
        FaceSnapError: one has no face.
    """
    known = Known(jury.look(sitter.references[0]), jury.look(sitter.driving), tuple(map(jury.look, sitter.unseen)))
    if any(one.face is None for one in (known.reference, known.driving, *known.unseen)):
        raise NoFaceError(f"The judge finds no face in a real photo of person {sitter.seed}; use fewer 'people'.")
    return known


def compare(seen: Seen, known: Known) -> dict[str, float]:
    """A picture's values of `METRICS`: cosines to the reference, and means of cosines to the unseen photos."""
    return {
        "face_sim": metrics.likeness(seen.face, [known.reference.face]),
        "inner": metrics.likeness(seen.inner, [known.reference.inner]),
        "clip_face": metrics.likeness(seen.clip_face, [known.reference.clip_face]),
        "face_sim_unseen": metrics.likeness(seen.face, [one.face for one in known.unseen]),
        "inner_unseen": metrics.likeness(seen.inner, [one.inner for one in known.unseen]),
    }


def limits(known: Sequence[Known]) -> dict[str, dict[str, np.ndarray]]:
    """What the metrics say of two photos of one person and of photos of two people, each [P]."""
    same = [[compare(one, person_known) for one in person_known.unseen] for person_known in known]
    different = [compare(person_known.driving, person_known) for person_known in known]
    names = ("face_sim", "inner", "clip_face")
    return {
        "two photos of one person": {n: np.array([np.mean([one[n] for one in row]) for row in same]) for n in names},
        "photos of two people": {n: np.array([row[n] for row in different]) for n in names},
    }
