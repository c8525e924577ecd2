"""What the methods of Table 1 share: training data, base, people, poses, prompts and judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.faces import Face
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_lab.evaluation.draw import Base
from facesnap_lab.evaluation.judges import Clip, clip_extractor
from facesnap_lab.evaluation.judges import Judges as EvaluationJudges
from facesnap_lab.evaluation.miniature import posed_scenes, save_picture
from facesnap_lab.evaluation.protocol import Identity, Pose, Prompt, Protocol
from facesnap_lab.miniature.captions import scene_caption
from facesnap_lab.miniature.second import lightning
from facesnap_lab.miniature.second.details import token_ids
from facesnap_lab.miniature.second.judges import Judges, Seen
from facesnap_lab.miniature.second.measure import OTHER_LOOKS, REFERENCE, SECOND, photo, write_models
from facesnap_lab.miniature.second.render import SIDE, render
from facesnap_lab.miniature.second.world import person, scene, subject
from facesnap_lab.training.config import TrainConfig, read_config

DRIVER = 100_000  # number of the person in the driving photos, who is not among the people
PROMPTS = {  # expression, clothes, background, light
    "red-on-blue": ("smiling", "red", "blue", "front"),
    "white-on-green": ("neutral", "white", "green", "left"),
    "black-on-grey": ("neutral", "black", "grey", "above"),
    "yellow-on-purple": ("smiling", "yellow", "purple", "right"),
}
CLIP_TEXTS = {  # the same in the words that CLIP was trained with
    scene_caption(*words): "{} person {} shirt {} background {} light".format(*words) for words in PROMPTS.values()
}


@dataclass(frozen=True, eq=False)
class World:
    """What all methods share.

    protocol: with photos of the people in other looks than the reference's, for FaceSim and FID. same_look: the same
    people with a photo in the reference's look, for CLIP-face. train: how every method is trained; `method`, `seed`,
    `start` and `out` are set for each of them. files(file, folder): copies the engine's model files and this FaceSnap
    file into a folder, which must not contain any yet.
    """

    train: TrainConfig
    protocol: Protocol
    same_look: Protocol
    base: Base
    judges: EvaluationJudges
    files: Callable[[Path, Path], ModelFiles]


def second_edition(
    stages: Path, out: Path, people: int, per_person: int | None, steps: int | None, device: torch.device | str = "cpu"
) -> World:
    """Render people and poses of the second edition into `out`, and load its base and judges.

    Args:
        stages: folder of all stages, of which `inputs` has written `facesnap/train.yaml`.
        per_person: number of images of each person; by default, one for each pose and prompt.
        steps: training steps of each method; by default, those of `facesnap/train.yaml`.

    Raises:
        FaceSnapError: a stage is missing, or there are fewer combinations of pose and prompt than `per_person`.
    """
    train = read_config(stages / "facesnap" / "train.yaml")
    train = replace(train, steps=steps or train.steps, sample_every=0)
    driving = tuple(Pose(name, path) for name, path in _poses(out / "poses").items())
    texts = tuple(Prompt(name, scene_caption(*words)) for name, words in PROMPTS.items())
    combinations = len(driving) * len(texts)
    if per_person is not None and per_person > combinations:
        raise FaceSnapError(
            f"There are only {combinations} combinations of pose and prompt, but {per_person} images of each person "
            f"are asked for; choose at most {combinations}."
        )
    people_of = [_photos(out / f"test-{index:04d}", index) for index in range(people)]
    others, same = (
        Protocol(tuple(identities), driving, texts, per_person=per_person) for identities in zip(*people_of)
    )
    sampler = lightning.load_few_step(stages, device)
    base = Base(sampler.pipe, f"the few-step SDXL in {stages.resolve()}", SIDE, SIDE, sampler.steps, sampler.scale)
    return World(train, others, same, base, _judges(stages), lambda file, folder: write_models(stages, file, folder))


def _judges(stages: Path) -> EvaluationJudges:
    """Return the judges that condition nothing. CLIP, which does, measures CLIP-T and FID."""
    from transformers import CLIPModel

    judges = Judges(stages)

    def embed(name: str) -> Callable[[Face], np.ndarray]:
        def embed_face(face: Face) -> np.ndarray:
            embedding = judges.embed(name, Seen(face.photo.pixels, face.box, face.keypoints))
            assert embedding is not None, "the face has been found"
            return embedding

        return embed_face

    model = CLIPModel.from_pretrained(stages / "clip" / "model", local_files_only=True).float().eval()

    def tokens(texts: Sequence[str]) -> tuple[torch.Tensor, None]:
        return torch.tensor(token_ids([CLIP_TEXTS[text] for text in texts])), None

    clip = Clip(model, tokens, "the second edition's CLIP")
    return EvaluationJudges(
        clip,
        judges.pack,
        embed("judge"),
        "the second edition's judge, other looks",
        clip_extractor(clip),
        embed("details"),
        "the second edition's judge of details, same look",
    )


def _photos(folder: Path, index: int) -> tuple[Identity, Identity]:
    """Render a person of the test split. Both identities have the same reference."""
    paths = {shot: folder / f"{shot}.png" for shot in (REFERENCE, SECOND, *OTHER_LOOKS)}
    for shot, path in paths.items():
        if not path.exists():
            save_picture(path, photo(index, shot))
    reference = (paths[REFERENCE],)
    others = Identity(folder.name, reference, tuple(paths[shot] for shot in OTHER_LOOKS))
    return others, replace(others, photos=(paths[SECOND],))


def _poses(folder: Path) -> Mapping[str, Path]:
    """Render the driving photos: one person in the evaluation's poses, whose sizes are the paper's "head size"."""
    scenes = posed_scenes(scene(person("test", DRIVER), 1))
    paths = {name: folder / f"{name}.png" for name in scenes}
    for name, path in paths.items():
        if not path.exists():
            save_picture(path, render([subject("test", DRIVER, 0)], [scenes[name]], SIDE)[0].picture)
    return paths
