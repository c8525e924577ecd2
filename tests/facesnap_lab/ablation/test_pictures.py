"""The inputs of each ablation row: landmarks, tokens and text."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support import tiny
from tests.support.training_world import generate_with_tokens_in_text, sdxl

for package in ("cv2", "diffusers", "insightface", "scipy", "transformers"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from facesnap_ext.engine import Engine
from facesnap_ext.networks.mixer import FacialAttributeMixer, MixerConfig
from facesnap_ext.photos import Photo
from facesnap_ext.residuals import landmark_image
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights.facesnap_file import FaceSnapInfo, FaceSnapWeights
from facesnap_lab.ablation.pictures import (
    AblationSetup,
    Features,
    JudgeFeatures,
    RealPhotoFeatures,
    Subject,
    assign_drivers,
    compare,
    draw,
    extract_features,
    limits,
    shape_distances,
    tokens_of,
)
from facesnap_lab.ablation.rows import MIXER, TABLE_3, reference_rows
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.dataset import SIDE
from facesnap_lab.miniature.measure import photo
from facesnap_lab.miniature.render import face_shapes, render
from facesnap_lab.miniature.shipped import Sampler
from facesnap_lab.miniature.world import person, scene
from facesnap_lab.training.config import TrainConfig

NO_FFRNET, NO_LANDMARKS, DRIVING, _ = TABLE_3


def test_drivers_are_a_permutation_with_the_largest_shape_distance():
    shapes = np.random.default_rng(0).normal(0, 1, (5, 72, 2))
    distances = shape_distances(shapes)
    assert distances[1, 3] == pytest.approx(np.mean([np.hypot(*(a - b)) for a, b in zip(shapes[1], shapes[3])]))
    others = [order for order in itertools.permutations(range(5)) if all(i != j for i, j in enumerate(order))]
    found = assign_drivers(shapes)
    assert tuple(found) in others
    assert distances[range(5), found].sum() == pytest.approx(max(distances[range(5), list(o)].sum() for o in others))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    files = shipped.write_models(tmp_path_factory.mktemp("models"))
    return Engine(lambda: files), files


PAIRS = list(enumerate(assign_drivers(face_shapes(12))))[:4]


@pytest.fixture(scope="module")
def seen(engine):
    """Subjects of the miniature world with their features."""
    found = []
    for index, driver in PAIRS:
        subject = Subject(
            (photo("test", index, 0)[0], photo("test", index, 2)[0]), photo("test", driver, 1)[0], (), "", 0
        )
        found.append((subject, extract_features(*engine, subject)))
    return found


def test_features_equal_those_of_engine_prepare(engine, seen):
    subject, features = seen[0]
    unit = Unit(True, (Photo(subject.references[0], "a"),), driving=Photo(subject.driving, "b"))
    prepared = engine[0].prepare(unit, SIDE, SIDE)
    np.testing.assert_array_equal(features.predicted.points, prepared.conditioning.landmarks.points)
    np.testing.assert_array_equal(features.embeddings[0], prepared.references[0].embedding)
    its_own = engine[0].prepare(Unit(True, (Photo(subject.driving, "b"),)), SIDE, SIDE)
    np.testing.assert_array_equal(features.driving.points, its_own.conditioning.landmarks.points)
    assert features.embeddings.shape[0] == features.clip_tokens.shape[0] == 2


def test_predicted_landmarks_have_the_reference_shape_and_driving_ones_the_drivers(seen):
    """The landmarks are compared with the renderer's points, which no row receives."""
    errors = np.zeros((2, 2))
    for (index, driver), (_, features) in zip(PAIRS, seen):
        pose = scene(person("test", driver), 1)
        truth = [one.points for one in render([person("test", who) for who in (index, driver)], [pose] * 2, SIDE)]
        for i, landmarks in enumerate((features.predicted, features.driving)):
            for j, points in enumerate(truth):
                errors[i, j] += np.linalg.norm(landmarks.points - points, axis=1).mean() / len(PAIRS)
                assert not np.array_equal(landmarks.points, points)
    assert errors[0, 0] < 0.85 * errors[1, 0]  # errors relative to the reference's points
    assert errors[1, 1] < 0.85 * errors[0, 1]  # errors relative to the driver's points


def test_landmark_image_is_black_for_rows_without_landmarks(seen):
    for row in (NO_LANDMARKS, NO_FFRNET):
        for _, features in seen:
            assert not landmark_image(features.landmarks(row), 256, 256).any()
    _, features = seen[0]
    assert features.landmarks(DRIVING) is features.driving
    assert features.landmarks(MIXER) is features.predicted


CONFIG = MixerConfig(
    id_dim=12, clip_dim=10, dim=tiny.CONTEXT, id_tokens=5, queries=4, layers=1, feedforward=48, heads=4
)


@pytest.fixture(scope="module")
def weights():
    mixer, ffrnet = tiny.randomise(FacialAttributeMixer(CONFIG), std=0.3), tiny.ffrnet(hint_widths=(16, 32, 96))
    return FaceSnapWeights(FaceSnapInfo(CONFIG, ffrnet.config), mixer, ffrnet, "tiny")


@pytest.fixture(scope="module")
def features():
    g = torch.Generator().manual_seed(0)
    embeddings, clip_tokens = torch.randn(4, 12, generator=g), torch.randn(4, 7, 10, generator=g)
    return Features(embeddings, clip_tokens, tiny.landmarks(0, 32, 32), tiny.landmarks(1, 32, 32))


def test_references_are_fused_or_averaged_as_the_row_specifies(weights, features):
    _, averaged, fused = reference_rows((1, 2))
    first = features.embeddings[None, :2], features.clip_tokens[None, :2]
    torch.testing.assert_close(tokens_of(fused, weights, features), weights.mixer(*first))
    unit = torch.nn.functional.normalize(first[0], dim=-1).mean(1, keepdim=True)
    torch.testing.assert_close(
        tokens_of(averaged, weights, features), weights.mixer(unit, first[1].mean(1, keepdim=True))
    )
    torch.testing.assert_close(tokens_of(MIXER, weights, features), weights.mixer(*(part[:, :1] for part in first)))


@pytest.fixture(scope="module")
def sampler():
    pipe = sdxl()
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.requires_grad_(False)
    return Sampler(pipe, steps=2, scale=2.0)


SUBJECT = Subject((), np.zeros((32, 32, 3), np.uint8), (), "a photo of a red person", 5)


@pytest.mark.parametrize(
    ("row", "reads"), [(MIXER, {"predicted"}), (DRIVING, {"driving"}), (NO_LANDMARKS, set()), (NO_FFRNET, set())]
)
def test_image_depends_only_on_the_landmarks_of_its_row(sampler, weights, features, row, reads):
    picture = draw(sampler, row, weights, SUBJECT, features)
    for which in ("predicted", "driving"):
        other = draw(sampler, row, weights, SUBJECT, replace(features, **{which: tiny.landmarks(9, 32, 32)}))
        assert np.array_equal(picture, other) == (which not in reads)
    other = draw(sampler, row, weights, SUBJECT, replace(features, embeddings=-features.embeddings))
    assert not np.array_equal(picture, other)


def test_without_ffrnet_the_tokens_are_appended_to_the_text(sampler, weights, features):
    tokens = weights.mixer(features.embeddings[None, :1], features.clip_tokens[None, :1])
    expected = generate_with_tokens_in_text(
        sampler.pipe,
        SUBJECT.prompt,
        tokens,
        32,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(5),
    )
    np.testing.assert_array_equal(draw(sampler, NO_FFRNET, weights, SUBJECT, features), np.asarray(expected))


@pytest.mark.parametrize(
    ("lightning", "expected"), [(shipped.LIGHTNING, shipped.few_step_sampler), (None, shipped.base_sampler)]
)
def test_sampler_is_the_model_used_in_training(tmp_path, lightning, expected):
    """A few-step LoRA kept separate from the weights equals diffusers' LoRA merged into them."""
    paths = {"base": shipped.SDXL, "start": tmp_path, "clip": tmp_path, "out": tmp_path, "lightning": lightning}
    train = TrainConfig(**paths, shards=(), lightning_scale=shipped.SCALE)
    actual, expected = AblationSetup(train, 2, 1, tmp_path, "cpu").sampler, expected()
    assert (actual.steps, actual.scale) == (expected.steps, expected.scale)
    np.testing.assert_allclose(*(pixels_of(sampler) for sampler in (actual, expected)), atol=1e-3)


def pixels_of(sampler: Sampler) -> np.ndarray:
    drawn = sampler.pipe(
        "photo of a person",
        width=64,
        height=64,
        num_inference_steps=sampler.steps,
        guidance_scale=sampler.scale,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    return drawn.images[0]


def test_images_are_compared_with_the_reference_and_with_unseen_photos():
    def at(degrees, without_face=False):
        turn = np.radians(degrees)
        face = None if without_face else np.array([np.cos(turn), np.sin(turn)])
        return JudgeFeatures(face, face, face, np.zeros(2))

    real = RealPhotoFeatures(at(0), at(90), (at(30), at(-30)))
    found = compare(at(60), real)
    assert (found["face_sim"], found["inner"], found["clip_face"]) == pytest.approx((0.5, 0.5, 0.5))
    assert (found["face_sim_unseen"], found["inner_unseen"]) == pytest.approx([np.cos(np.pi / 6) / 2] * 2)
    assert set(compare(at(0, without_face=True), real).values()) == {0.0}
    same, different = limits([real]).values()
    assert same["face_sim"] == pytest.approx([np.cos(np.pi / 6)])
    assert different["face_sim"] == pytest.approx([0], abs=1e-9)
