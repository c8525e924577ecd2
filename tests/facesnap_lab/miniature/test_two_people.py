"""Two people in one image of the miniature: each face must resemble its own reference.

The people belong to the test split, and an independent judge compares them. The miniature's SDXL was trained on
portraits of one person only.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="the miniature's images are generated with diffusers")
pytest.importorskip("onnxruntime", reason="the miniature's faces are detected with onnxruntime")
pytest.importorskip("insightface", reason="the miniature's faces are detected with insightface")

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

PAIRS = 4
MARGIN = 0.15  # cosine of the judge; two photos of one person are 0.76 above photos of two people


def beside(conditioning, left: int):
    """Move a portrait's conditioning into an image twice as wide, with a region around its face."""
    landmarks = Landmarks(conditioning.landmarks.points + np.float32([left, 0]), 2 * SIDE, SIDE)
    return replace(conditioning, landmarks=landmarks, region=around(landmarks, Unit.region_scale))


@pytest.fixture(scope="module")
def likeness(tmp_path_factory):
    """[PAIRS, 2, 2] by method: the face on each side compared with each side's reference.

    The methods are people with regions, the same after a hires pass, and people without regions.
    """
    from diffusers import StableDiffusionXLImg2ImgPipeline

    sampler, judge = shipped.few_step_sampler(), Judge()
    files = shipped.write_models(tmp_path_factory.mktemp("models"))
    engine = Engine(lambda: files)
    second = StableDiffusionXLImg2ImgPipeline(**sampler.pipe.components, add_watermarker=False)
    second.set_progress_bar_config(disable=True)
    similarities = {"regions": [], "hires": [], "no regions": []}

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
        pictures["no regions"] = draw(sampler.pipe, pair, people, width=2 * SIDE, height=SIDE)
        for name, picture in pictures.items():
            similarities[name].append([[seen @ one for one in own] for seen in by_side(judge, np.asarray(picture))])
    return {name: np.array(values) for name, values in similarities.items()}


def by_side(judge: Judge, picture: np.ndarray) -> list[np.ndarray]:
    """Return the judge's embeddings of the largest face on the left and on the right."""
    sides = {}
    for face in faces.find_faces(judge.pack, Photo(picture, "Picture")):
        side = int(face.box[[0, 2]].mean() > picture.shape[1] / 2)
        sides.setdefault(side, face.embedding / np.linalg.norm(face.embedding))
    return [sides[0], sides[1]]  # raises KeyError if a side has no face


def margins(similarities: np.ndarray) -> np.ndarray:
    """Return how much each face resembles its own reference more than the other person's, [PAIRS, 2]."""
    own = np.diagonal(similarities, axis1=1, axis2=2)
    return own - np.diagonal(similarities[:, :, ::-1], axis1=1, axis2=2)


@pytest.mark.parametrize(("passes", "part"), [("regions", 0.75), ("hires", 0.6)])
def test_each_face_resembles_its_own_reference(likeness, passes, part):
    kept = margins(likeness[passes])
    assert kept.mean() > MARGIN
    assert (kept > 0).mean() >= part


def test_regions_separate_people(likeness):
    """Without regions both people affect the whole image equally, and only the landmarks separate them."""
    assert margins(likeness["regions"]).mean() > margins(likeness["no regions"]).mean() + 0.05
