"""The shards' contents, compared with independent measurements in the photos and the images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw

from facesnap_ext.identity import faces
from facesnap_ext.landmarks.points72 import Landmarks, five_points
from facesnap_ext.landmarks.predictor import LandmarkPredictor, load_predictor
from facesnap_ext.photos import Photo, from_path
from facesnap_ext.weights.search import find_models
from facesnap_lab.dataset import crops, masks
from facesnap_lab.miniature.render import render
from facesnap_lab.miniature.world import person, scene
from facesnap_lab.training.data import ImageSizes, TrainingImages
from facesnap_lab.training.shard_writer import write_shard
from facesnap_lab.training.shards import Sample, ShardIndex, read_sample, read_shard_index
from tests.support.dataset_photos import SETTINGS, SIDE


@pytest.fixture(scope="module")
def index(built: Path) -> ShardIndex:
    return read_shard_index(sorted(built.glob("*.tar")))


@pytest.fixture(scope="module")
def pack(models: Path) -> faces.FacePack:
    return faces.load_pack(find_models(models).require("face_pack"), threads=1)


@pytest.fixture(scope="module")
def predictor(models: Path) -> LandmarkPredictor:
    files = find_models(models)
    return load_predictor(files.require("deca"), files.require("flame"))


@pytest.fixture(scope="module")
def sources(built: Path, people: Path, index: ShardIndex) -> list[tuple[Photo, list[Sample]]]:
    """Some of the photos, each with its training images."""
    plan = [json.loads(line) for line in (built / "plan.jsonl").read_text().splitlines()[1:]]
    paths = [people / photo["path"] for line in plan for photo in line["photos"]]
    count = SETTINGS.crops
    assert len(index) == count * len(paths)
    return [
        (from_path(paths[i]), [read_sample(index, count * i + crop) for crop in range(count)])
        for i in range(0, len(paths), 4)
    ]


def fit_similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Fit a similarity transform [2,3] to pairs of points with scikit-image (Umeyama)."""
    from skimage.transform import SimilarityTransform

    return SimilarityTransform.from_estimate(source, target).params[:2]


def test_shards_are_readable_by_the_trainer(index, people):
    assert (len(index), index.people) == (6 * 3 * SETTINGS.crops, 6)
    item = TrainingImages(index, ImageSizes(64, 16, 64, 28), 0, "other", "drawn", 0.0)[0]
    assert item["images"].shape == (3, 64, 64)
    captions = {read_sample(index, i).caption for i in range(len(index))}
    assert captions == {path.read_text() for path in people.rglob("*.txt")}


def test_points_and_pixels_undergo_the_same_transform(sources, predictor, pack):
    """The transform is fitted to the points; Pillow then applies it to the photo."""
    for photo, samples in sources:
        face = faces.find_faces(pack, photo)[0]
        codes = predictor.encode(photo.pixels, face.box)
        points = predictor.predict(codes, codes).points
        for sample in samples:
            transform = fit_similarity(points, sample.points)
            np.testing.assert_allclose(points @ transform[:, :2].T + transform[:, 2], sample.points, atol=2e-3)
            # the transform is applied at four times the resolution, then averaged
            inverse = np.linalg.inv(np.vstack([4 * transform, (0, 0, 1)]))[:2]
            large = Image.fromarray(photo.pixels).transform(
                (4 * SIDE, 4 * SIDE), Image.Transform.AFFINE, inverse.ravel(), Image.Resampling.BICUBIC
            )
            expected = np.asarray(large.reduce(4), float)
            inside = sample.mask > 0
            error = np.abs(expected - sample.image)[inside].mean()
            shifted_error = np.abs(np.roll(expected, 1, axis=1) - sample.image)[inside].mean()
            assert error < 3
            assert error < 0.5 * shifted_error


def test_points_agree_with_the_predictor_run_on_the_image(sources, predictor):
    errors = []
    for _, samples in sources:
        for sample in samples:
            codes = predictor.encode(sample.image, sample.box)
            errors.append(np.linalg.norm(predictor.predict(codes, codes).points - sample.points, axis=1).mean())
    assert np.median(errors) < 0.02 * SIDE


def test_box_surrounds_the_points(sources):
    for _, samples in sources:
        for sample in samples:
            low, high = np.split(sample.box, 2)
            around = Landmarks(sample.points, SIDE, SIDE).box
            side = (high - low).max()
            assert np.abs((low + high) / 2 - (around[:2] + around[2:]) / 2).max() < 0.3 * side
            assert 0.6 < (around[2:] - around[:2]).max() / side < 1.6


def test_embeddings_equal_insightfaces(sources, pack):
    """Embeddings are computed in the photo with insightface's alignment, and in each image with the sample's points."""
    from insightface.app.common import Face
    from insightface.utils.face_align import norm_crop

    same_person, other_people = [], []
    for i, (photo, samples) in enumerate(sources):
        face = faces.find_faces(pack, photo)[0]
        aligned = norm_crop(photo.pixels[:, :, ::-1], face.keypoints, pack.recognition.input_size[0])
        expected = pack.recognition.get_feat(aligned).flatten()
        for sample in samples:
            np.testing.assert_allclose(sample.embedding, expected, atol=1e-4)
            keypoints = (five_points(sample.points) - 0.5).astype(np.float32)
            embedding = pack.recognition.get(sample.image[:, :, ::-1], Face(kps=keypoints))
            same_person.append(cosine(embedding, sample.embedding))
            other_people.append(cosine(embedding, sources[i - 1][1][0].embedding))
    assert np.median(same_person) > 0.8
    assert np.median(same_person) > np.max(other_people)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_masks_contain_the_points(sources):
    for _, samples in sources:
        for sample in samples:
            cells = np.floor(sample.points).astype(int)
            visible = ((cells >= 2) & (cells < SIDE - 2)).all(axis=1)
            content = sample.image.any(axis=2)  # padding is black
            visible &= content[tuple(cells.clip(0, SIDE - 1).T[::-1])]
            assert visible.sum() > 36
            assert (sample.mask[tuple(cells[visible].T[::-1])] == 255).all()
            assert set(np.unique(sample.mask)) <= {0, 255}
            assert sample.mask.any()


def test_mask_matches_the_rendered_head():
    """The true head, instead of DECA's, is compared with the renderer's mask, for people without hair."""
    import torch

    from facesnap_ext.landmarks.deca import project
    from facesnap_ext.landmarks.flame import full_pose, posed_vertices
    from facesnap_lab.miniature.render import head

    bald = [who for who in (person("test", i) for i in range(40)) if who.hair == "bald"][:3]
    scenes = [scene(who, 0) for who in bald]
    for who, setting, rendering in zip(bald, scenes, render(bald, scenes, SIDE)):
        codes = (
            torch.tensor(code[None], dtype=torch.float32)
            for code in (who.shape, setting.codes, setting.pose, setting.cam)
        )
        shape, expression, pose, cam = codes
        vertices = project(posed_vertices(head(), shape, expression, full_pose(head(), pose)), cam)[0].numpy()
        outlines = masks.silhouette((vertices + 1) * (SIDE / 2), head().faces.numpy(), 2 * SIDE)
        corners = np.array([[0, 0], [SIDE, 0], [SIDE, SIDE], [0, SIDE]])
        mask = masks.fill_mask(outlines, corners, SIDE) > 0
        truth = rendering.mask > 0
        assert (truth & mask).sum() / (truth | mask).sum() > 0.93
        assert (truth & ~mask).sum() <= 0.005 * truth.sum()  # the mask may be wider, but not narrower


@given(st.integers(0, 2**32 - 1), st.sampled_from([32, 64, 200]))
@example(3444062, 64)  # a sliver at the edge of the crop
@settings(max_examples=30, deadline=None)
def test_mask_contains_every_point_of_its_triangles(seed, resolution):
    random = np.random.default_rng(seed)
    vertices = random.uniform(-0.2, 1.2, (9, 2)) * resolution
    triangles = random.integers(0, 9, (5, 3))
    weights = random.dirichlet((0.3, 0.3, 0.3), 200)
    points = np.einsum("pk,pkc->pc", weights, vertices[triangles[random.integers(0, 5, 200)]])
    corners = resolution * np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    mask = masks.fill_mask(masks.silhouette(vertices, triangles, 2 * resolution), corners, resolution)
    cells = np.floor(points).astype(int)
    cells = cells[((cells >= 0) & (cells < resolution)).all(axis=1)]
    assert (mask[tuple(cells.T[::-1])] == 255).all()


def test_mask_ends_at_the_edge_of_the_photo():
    everywhere = np.array([[-50.0, -50], [150, -50], [150, 150], [-50, 150]])
    photo = np.array([[30.0, 10], [80, 40], [50, 90], [0, 60]])
    mask = masks.fill_mask([everywhere], photo, 100) > 0
    inside = Image.new("1", (100, 100))
    ImageDraw.Draw(inside).polygon([tuple(corner) for corner in photo], fill=1)
    assert (mask != np.asarray(inside)).sum() < 100  # along the edges
    assert abs(mask.sum() - 3400) < 200


boxes = arrays(np.float64, 2, elements=st.floats(-20, 220)).flatmap(
    lambda corner: arrays(np.float64, 2, elements=st.floats(20, 150)).map(lambda size: np.r_[corner, corner + size])
)


@given(boxes, st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_random_crops_contain_the_face_and_respect_their_limits(box, seed):
    random = np.random.default_rng(seed)
    transform = crops.random_transform(box, 100, random)
    scale = np.sqrt(np.linalg.det(transform[:, :2]))
    np.testing.assert_allclose(transform[:, :2] @ transform[:, :2].T, scale**2 * np.eye(2), atol=1e-9)
    face = (box[2:] - box[:2]).max()
    assert crops.SCALES[0] - 1e-6 <= 100 / scale / face <= crops.SCALES[1] + 1e-6
    assert abs(np.degrees(np.arctan2(transform[1, 0], transform[0, 0]))) <= crops.MAX_ROTATION
    low, high = np.split(crops.transform_box(transform, box), 2)
    assert (low >= -1e-6).all()
    assert (high <= 100 + 1e-6).all()
    centre = crops.transform_points(transform, (box[None, :2] + box[None, 2:]) / 2)[0]
    np.testing.assert_allclose((low + high) / 2, centre)


@given(boxes)
@settings(max_examples=60, deadline=None)
def test_plain_crop_is_upright_and_unpadded_if_the_face_is_in_the_photo(box):
    width, height = 240, 200
    transform = crops.plain_transform(box, width, height, 64)
    assert transform[0, 1] == transform[1, 0] == 0
    corners = crops.transform_points(transform, np.array([[0, 0], [width, height]]))
    visible = (np.clip(box[2:], 0, (width, height)) - np.clip(box[:2], 0, (width, height))).max()
    if visible <= height:
        assert (corners[0] <= 1e-6).all()
        assert (corners[1] >= 64 - 1e-6).all()


def test_crop_at_the_photos_scale_keeps_its_pixels(astronaut):
    transform = np.array([[1.0, 0, -100], [0, 1, -30]])
    np.testing.assert_array_equal(crops.warp(astronaut.pixels, transform, 128), astronaut.pixels[30:158, 100:228])


def test_crop_is_black_outside_the_photo():
    white = np.full((50, 80, 3), 255, np.uint8)
    crop = crops.warp(white, np.array([[1.0, 0, 10], [0, 1, 20]]), 100)
    expected = np.zeros((100, 100, 3), np.uint8)
    expected[20:70, 10:90] = 255
    np.testing.assert_array_equal(crop, expected)


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.8, 1.7])
def test_downscaling_averages_and_does_not_shift(scale):
    """A disc keeps its centre and area, and stripes finer than the new pixels become grey."""
    photo = Image.new("RGB", (400, 300))
    ImageDraw.Draw(photo).ellipse((110, 90, 210, 190), fill="white")
    side = 100
    transform = np.array([[scale, 0, side / 2 - scale * 160.5], [0, scale, side / 2 - scale * 140.5]])
    crop = crops.warp(np.asarray(photo), transform, side)[:, :, 0] / 255
    grid = np.arange(side) + 0.5
    centre = np.array([(crop.sum(0) * grid).sum(), (crop.sum(1) * grid).sum()]) / crop.sum()
    np.testing.assert_allclose(centre, side / 2, atol=0.1)
    if scale < 1:
        np.testing.assert_allclose(crop.sum(), np.pi * (50.5 * scale) ** 2, rtol=0.03)
    if scale <= 0.5:
        stripes = np.zeros((300, 400, 3), np.uint8)
        stripes[:, ::2] = 255
        unpadded = crops.warp(np.full_like(stripes, 255), transform, side)[:, :, 0] == 255
        inside = crops.warp(stripes, transform, side)[:, :, 0][unpadded]
        assert inside.std() < 25  # 127 in the stripes
        assert abs(inside.mean() - 127.5) < 5


def test_jpeg_images_are_similar_and_smaller(sources, tmp_path):
    samples = [sample for _, images in sources for sample in images]
    named = [Sample(**{**vars(sample), "key": f"{i:06d}-00"}) for i, sample in enumerate(samples)]
    for path, quality in ((tmp_path / "a.tar", None), (tmp_path / "b.tar", 95)):
        assert write_shard(path, iter(named), quality) == len(named)
    png, jpeg = (read_shard_index([tmp_path / name]) for name in ("a.tar", "b.tar"))
    for i, sample in enumerate(named):
        np.testing.assert_array_equal(read_sample(png, i).image, sample.image)
        assert np.abs(read_sample(jpeg, i).image.astype(int) - sample.image).mean() < 3
    assert (tmp_path / "b.tar").stat().st_size < (tmp_path / "a.tar").stat().st_size
