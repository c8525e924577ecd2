from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.deca import crop_transform
from facesnap_ext.landmarks.flame import save_flame
from facesnap_ext.landmarks.points72 import POLYLINES
from facesnap_ext.landmarks.predictor import FaceCodes, LandmarkPredictor, load_predictor
from facesnap_lab.miniature.head import write_stand_in_flame

BROWS = [i for part in ("left_eyebrow", "right_eyebrow") for i in POLYLINES[part][0]]
LOWER_FACE = [71, 70, 8, 7, 16]


@pytest.fixture
def codes(predictor: LandmarkPredictor, photos: list[np.ndarray], boxes: list[np.ndarray]) -> list[FaceCodes]:
    return predictor.encode_batch(photos, boxes)


def test_each_photo_has_its_own_codes(codes: list[FaceCodes], boxes: list[np.ndarray]) -> None:
    first, second = codes
    assert (first.width, first.height) == (420, 300)
    np.testing.assert_allclose(second.transform, crop_transform(boxes[1]))
    assert [len(code) for code in (first.shape, first.expression, first.pose, first.cam)] == [100, 50, 6, 3]
    assert (first.shape - second.shape).abs().max() > 0.1, "different photos, different shapes"


def test_batch_matches_single_photos(
    predictor: LandmarkPredictor, codes: list[FaceCodes], photos: list[np.ndarray], boxes: list[np.ndarray]
) -> None:
    for batched, photo, box in zip(codes, photos, boxes):
        single = predictor.encode(photo, box)
        for name in ("shape", "expression", "pose", "cam"):
            torch.testing.assert_close(getattr(batched, name), getattr(single, name), atol=1e-5, rtol=1e-4)


def test_only_the_shape_is_taken_from_the_source(predictor: LandmarkPredictor, codes: list[FaceCodes]) -> None:
    source, driving = codes
    predicted = predictor.predict(source, driving)
    only_shape = replace(driving, shape=source.shape)
    np.testing.assert_array_equal(predicted.points, predictor.predict(only_shape, driving).points)
    np.testing.assert_array_equal(predicted.points, predictor.predict(source, only_shape).points)
    np.testing.assert_array_equal(predictor.predict(only_shape, only_shape).points, predicted.points)
    assert np.abs(predicted.points - predictor.predict(driving, driving).points).max() > 1, "the shape is visible"


@pytest.mark.parametrize("name", ["expression", "pose", "cam"])
def test_driving_expression_pose_and_camera_are_used(
    predictor: LandmarkPredictor, codes: list[FaceCodes], name: str
) -> None:
    source, driving = codes
    other = replace(driving, **{name: getattr(driving, name) * 1.3 + 0.05})
    assert np.abs(predictor.predict(source, driving).points - predictor.predict(source, other).points).max() > 0.5


def test_landmarks_have_the_size_of_the_driving_photo(predictor: LandmarkPredictor, codes: list[FaceCodes]) -> None:
    source, driving = codes
    predicted = predictor.predict(source, driving)
    assert (predicted.width, predicted.height) == (driving.width, driving.height)


def test_neutral_pose_projects_the_unposed_mesh(predictor: LandmarkPredictor, codes: list[FaceCodes]) -> None:
    """Compute all steps in float64 except skinning, which has its own tests."""
    source, driving = codes
    driving = replace(driving, pose=torch.zeros(6))
    flame = predictor.flame
    mesh = (
        flame.v_template.double().numpy()
        + flame.shapedirs.double().numpy() @ source.shape.double().numpy()
        + flame.expressiondirs.double().numpy() @ driving.expression.double().numpy()
    )
    from facesnap_ext.landmarks.points72 import POINT_TRIANGLES, POINT_WEIGHTS

    corners = mesh[flame.faces.numpy()[POINT_TRIANGLES]]
    points = (POINT_WEIGHTS[..., None] * corners).sum(1)
    scale, x, y = driving.cam.double().tolist()
    crop = 112 * (1 + scale * np.column_stack([points[:, 0] + x, -(points[:, 1] + y)]))
    photo = np.linalg.solve(driving.transform, np.column_stack([crop, np.ones(72)]).T).T[:, :2] + 0.5
    np.testing.assert_allclose(predictor.predict(source, driving).points, photo, atol=2e-3)


def test_roll_of_the_driving_head_rotates_the_points(predictor: LandmarkPredictor, codes: list[FaceCodes]) -> None:
    """Rolling the head in the image plane rotates the 2D points about the projected joint by the same angle."""
    without_posedirs = replace(predictor, flame=replace(predictor.flame, posedirs=predictor.flame.posedirs * 0))
    source, driving = codes
    unrotated = replace(driving, pose=torch.zeros(6))
    rolled = replace(driving, pose=torch.tensor([0, 0, 0.4, 0, 0, 0]))
    before, after = (without_posedirs.predict(source, pose).points for pose in (unrotated, rolled))
    rotation = Rotation.from_rotvec([0, 0, -0.4]).as_matrix()[:2, :2]  # y points down in the image
    np.testing.assert_allclose(after - after.mean(0), (before - before.mean(0)) @ rotation.T, atol=1e-2)


def test_driving_jaw_opens_the_sources_mouth(predictor: LandmarkPredictor, codes: list[FaceCodes]) -> None:
    source, driving = codes
    pose = driving.pose.clone()
    pose[3] += 0.3
    moved = predictor.predict(source, replace(driving, pose=pose)).points - predictor.predict(source, driving).points
    assert moved[LOWER_FACE, 1].min() > 3
    assert np.abs(moved[BROWS]).max() < 1


def test_padding_the_photo_shifts_the_points(
    predictor: LandmarkPredictor, photos: list[np.ndarray], boxes: list[np.ndarray]
) -> None:
    photo, box = photos[0], boxes[0]
    original = predictor.encode(photo, box)
    padded_photo = np.pad(photo, ((31, 0), (57, 10), (0, 0)))
    padded = predictor.encode(padded_photo, box + np.array([57, 31, 57, 31]))
    points = predictor.predict(original, original).points
    np.testing.assert_allclose(predictor.predict(padded, padded).points, points - [-57, -31], atol=0.05)
    box_centre = (box[:2] + box[2:]) / 2
    assert np.linalg.norm(points.mean(0) - box_centre) < 0.3 * np.ptp(box[::2]), (
        "the stand-in's face lies inside the box"
    )


def test_mismatched_files_are_reported(tmp_path: Path, stand_in_files: tuple[Path, Path]) -> None:
    deca, flame = stand_in_files
    write_stand_in_flame(tmp_path / "few.safetensors", shapes=20, expressions=50)
    with pytest.raises(FaceSnapError, match=r"few\.safetensors has 20 shape directions, but .* requires 100"):
        load_predictor(deca, tmp_path / "few.safetensors")
    tensors = dict(vars(load_predictor(deca, flame).flame))
    save_flame(tmp_path / "cut.safetensors", tensors | {"faces": tensors["faces"][:-1]}, "test")
    with pytest.raises(FaceSnapError, match=r"cut\.safetensors has 9975 triangles"):
        load_predictor(deca, tmp_path / "cut.safetensors")
    with pytest.raises(FaceSnapError, match=r"flame\.safetensors is a converted FLAME model, not"):
        load_predictor(flame, deca)
