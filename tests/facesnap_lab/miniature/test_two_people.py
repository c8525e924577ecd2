"""Two people whom nobody trained on in one picture of the miniature: each face is of its own reference, as a network
sees it that never conditions. The miniature's SDXL knows portraits of one person only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="the miniature is drawn with diffusers")
pytest.importorskip("onnxruntime", reason="the miniature's faces are found with onnxruntime")
pytest.importorskip("insightface", reason="the miniature's faces are found with insightface")

from facesnap_ext.engine import Engine
from facesnap_ext.hosts.diffusers import conditioned
from facesnap_ext.identity import faces
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.photos import Photo
from facesnap_ext.regions import around
from facesnap_ext.settings.unit import Unit
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.dataset import SIDE
from facesnap_lab.miniature.measure import Judge, photo, random_prompt

PAIRS = 6
MARGIN = 0.15  # of the judge's cosines, in which two photos of one person are 0.76 above those of two people


def beside(conditioning, left: int):
    """A portrait's guidance in a picture twice as wide, acting around its face alone."""
    landmarks = Landmarks(conditioning.landmarks.points + np.float32([left, 0]), 2 * SIDE, SIDE)
    return replace(conditioning, landmarks=landmarks, region=around(landmarks, Unit.grow))


@pytest.fixture(scope="module")
def likeness(tmp_path_factory):
    """For people with regions, the same after a second pass a quarter larger, and people without regions
    [PAIRS, 2, 2]: the face on each side to each side's reference."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    sampler, judge = shipped.few_step_sampler(), Judge()
    files = shipped.write_models(tmp_path_factory.mktemp("models"))
    engine = Engine(lambda: files)
    second = StableDiffusionXLImg2ImgPipeline(**sampler.pipe.components, add_watermarker=False)
    second.set_progress_bar_config(disable=True)
    alike = {"regions": [], "hires": [], "everywhere": []}

    def draw(pipe, pair, conditionings, **values):
        with conditioned(pipe, *conditionings):
            return pipe(
                random_prompt(np.random.default_rng([5, pair])),
                num_inference_steps=sampler.steps,
                guidance_scale=sampler.scale,
                generator=torch.Generator().manual_seed(pair),
                **values,
            ).images[0]

    for pair in range(PAIRS):
        references = [photo("test", 2 * pair + side, 0)[0] for side in (0, 1)]
        own = [judge.embedding(reference) for reference in references]
        people = []
        for side, reference in enumerate(references):
            driving = Photo(photo("test", 50 + 2 * pair + side, 1)[0], "Driving photo")
            unit = Unit(enabled=True, references=(Photo(reference, "Reference"),), driving=driving)
            people.append(beside(engine.prepare(unit, SIDE, SIDE).conditioning, side * SIDE))
        pictures = {"regions": draw(sampler.pipe, pair, people, width=2 * SIDE, height=SIDE)}
        larger = pictures["regions"].resize((5 * SIDE // 2, 5 * SIDE // 4), Image.Resampling.LANCZOS)
        pictures["hires"] = draw(second, pair, people, image=larger, strength=0.5)
        people = [replace(person, region=None) for person in people]
        pictures["everywhere"] = draw(sampler.pipe, pair, people, width=2 * SIDE, height=SIDE)
        for name, picture in pictures.items():
            alike[name].append([[seen @ one for one in own] for seen in by_side(judge, np.asarray(picture))])
    return {name: np.array(values) for name, values in alike.items()}


def by_side(judge: Judge, picture: np.ndarray) -> list[np.ndarray]:
    """The judge's embeddings of the largest face on the left and of that on the right."""
    sides = {}
    for face in faces.find_faces(judge.pack, Photo(picture, "Picture")):
        side = int(face.box[[0, 2]].mean() > picture.shape[1] / 2)
        sides.setdefault(side, face.embedding / np.linalg.norm(face.embedding))
    return [sides[0], sides[1]]  # KeyError: a side without a face


def margins(alike: np.ndarray) -> np.ndarray:
    """[PAIRS, 2]: by how much each face is more like its own reference than like the other person's."""
    own = np.diagonal(alike, axis1=1, axis2=2)
    return own - np.diagonal(alike[:, :, ::-1], axis1=1, axis2=2)


@pytest.mark.parametrize(("passes", "part"), [("regions", 0.75), ("hires", 0.6)])
def test_each_face_is_of_its_own_reference(likeness, passes, part):
    kept = margins(likeness[passes])
    assert kept.mean() > MARGIN
    assert (kept > 0).mean() >= part


def test_regions_keep_people_apart(likeness):
    """Without them both people act in all of the picture, half and half; only the landmarks tell them apart."""
    assert margins(likeness["regions"]).mean() > margins(likeness["everywhere"]).mean() + 0.05
