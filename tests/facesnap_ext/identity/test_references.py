"""Checks of reference photos, on real photos with small real networks and on artificial similarities."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facesnap_ext.engine import Engine
from facesnap_ext.identity.blur import BLUR_THRESHOLD, blur
from facesnap_ext.identity.faces import Face, find_faces, longer_side
from facesnap_ext.identity.framing import ACCENT, annotate_faces
from facesnap_ext.identity.references import cosines, examine, find_outlier
from facesnap_ext.photos import Photo
from facesnap_ext.weights.search import find_models

cv2 = pytest.importorskip("cv2")

TEMPLATE = np.array(  # keypoints of ArcFace's aligned face of 112 pixels
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)


@pytest.fixture(scope="module")
def real_faces(face_pack, astronaut, grace_hopper, group):
    """Eight sharp faces, in photos cropped around them."""
    return [cropped(face) for photo in (astronaut, grace_hopper, group) for face in find_faces(face_pack, photo)]


def cropped(face: Face) -> Face:
    corner = np.maximum(face.box[:2] - 40, 0).astype(int)
    (left, top), (right, bottom) = corner, (face.box[2:] + 40).astype(int)
    photo = Photo(np.ascontiguousarray(face.photo.pixels[top:bottom, left:right]), face.photo.name)
    return replace(face, photo=photo, box=face.box - np.tile(corner, 2), keypoints=face.keypoints - corner)


def blurred(face: Face, sigma: float, noise: float = 0.0) -> Face:
    """Blur the photo by `sigma` pixels of the aligned face, and add camera-like noise."""
    from insightface.utils.face_align import estimate_norm

    scale = np.hypot(*estimate_norm(face.keypoints, 112)[0, :2])
    pixels = cv2.GaussianBlur(face.photo.pixels, (0, 0), sigma / scale).astype(np.float32)
    if noise:
        pixels += noise * np.random.default_rng(0).standard_normal(pixels.shape, np.float32)
    return replace(face, photo=Photo(np.clip(pixels.round(), 0, 255).astype(np.uint8), f"blurred {face.photo.name}"))


def warnings_for(face: Face, faces=None, face_index=0) -> str:
    return " ".join(examine([(face.photo, faces or [face])], face_index).references[0].warnings)


def test_only_blurred_photos_are_reported_as_blurred(real_faces):
    for face in real_faces:
        assert "blurred" not in warnings_for(face)
        assert "blurred" not in warnings_for(blurred(face, 0.7, noise=2))
        for strength in (2, 6):
            assert f"The face in blurred {face.photo.name} is blurred" in warnings_for(blurred(face, strength, noise=2))


def test_blur_threshold_is_where_the_embedding_starts_to_change(real_faces, face_pack):
    from facesnap_ext.identity.face_networks import embed

    for face in real_faces[:5]:
        similarity = {}
        for sigma in (1, 2):
            soft = blurred(face, sigma)
            embedding = embed(
                face_pack.recognition, np.ascontiguousarray(soft.photo.pixels[:, :, ::-1]), face.keypoints
            )
            similarity[sigma] = cosines([face.embedding, embedding])[0, 1]
        assert similarity[2] < 0.9 < similarity[1]
        assert blur(blurred(face, 1)) < BLUR_THRESHOLD < blur(blurred(face, 2))


@pytest.mark.parametrize("sigma", [1.5, 2.0, 3.0])
def test_blur_measures_the_gaussian_width_on_natural_spectra(sigma):
    """For a power spectrum of 1/k², mean squared gradient divided by mean squared Laplacian is the squared width."""
    frequency = np.hypot(np.fft.fftfreq(112)[:, None], np.fft.fftfreq(112)[None])
    frequency[0, 0] = np.inf
    measured = []
    for seed in range(6):
        noise = np.fft.fft2(np.random.default_rng(seed).standard_normal((112, 112)))
        image = np.fft.ifft2(noise / frequency * np.exp(-2 * (np.pi * frequency * sigma) ** 2)).real
        image = 128 + 40 * image / image.std()
        pixels = np.repeat(image.round().clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
        face = Face(Photo(pixels, "cloud"), np.zeros(4, np.float32), TEMPLATE, np.ones(2, np.float32), 1, False, 640)
        measured.append(blur(face))
        low_contrast = Photo((64 + pixels // 2).astype(np.uint8), "low contrast")
        assert blur(replace(face, photo=low_contrast)) == pytest.approx(measured[-1], rel=0.03)
    assert np.mean(measured) == pytest.approx(sigma, rel=0.12)


def test_small_faces_are_reported_as_small_but_not_as_blurred(face_pack, grace_hopper):
    small = Photo(cv2.resize(grace_hopper.pixels, None, fx=0.35, fy=0.35, interpolation=cv2.INTER_AREA), "small.png")
    face = find_faces(face_pack, small)[0]
    assert longer_side(face.box) < 112
    assert "small.png is small" in warnings_for(face)
    assert "blurred" not in warnings_for(face)
    assert "small" not in warnings_for(find_faces(face_pack, grace_hopper)[0])


def test_padded_several_and_missing_faces_are_reported(face_pack, astronaut, group):
    close_up = Photo(np.ascontiguousarray(astronaut.pixels[70:165, 178:273]), "close-up.png")
    assert "close-up.png fills the photo" in warnings_for(find_faces(face_pack, close_up)[0])
    several = find_faces(face_pack, group)
    assert "shows 6 faces: the largest one is used" in warnings_for(several[0], several)
    assert "shows 6 faces: face 2 is used" in warnings_for(several[0], several, face_index=2)
    report = examine([(group, several), (astronaut, []), (close_up, find_faces(face_pack, close_up))], face_index=1)
    assert [reference.face_index for reference in report.references] == [1, None, None]
    (warning,) = report.references[1].warnings
    assert warning.startswith(f"No face was found in {astronaut.name}")
    assert "close-up.png has no face 1" in report.references[2].warnings[0]
    assert np.isnan(report.cosines).sum() == 8
    assert "NaN" not in json.dumps(report.to_json())


def test_photo_of_another_person_is_the_outlier(face_pack, astronaut, grace_hopper):
    same_person = [
        astronaut,
        Photo(np.ascontiguousarray(astronaut.pixels[:, ::-1]), "mirrored"),
        Photo((astronaut.pixels * 0.6).astype(np.uint8), "dark"),
    ]
    photos_with_faces = [(photo, find_faces(face_pack, photo)) for photo in same_person]
    assert examine(photos_with_faces).outlier is None
    stranger = (grace_hopper, find_faces(face_pack, grace_hopper))
    for position in range(4):
        report = examine([*photos_with_faces[:position], stranger, *photos_with_faces[position:]])
        assert report.outlier == position
        (warned,) = (r for r in report.references if "does not resemble the others" in " ".join(r.warnings))
        assert warned.photo is grace_hopper
        assert warned.likeness < 0.2 < min(r.likeness for r in report.references if r is not warned)
    assert f"likeness to the others {warned.likeness:.2f}" in "\n".join(report.lines())


def test_batch_photos_are_checked_but_not_compared(face_pack, astronaut, grace_hopper):
    photos_with_faces = [(photo, find_faces(face_pack, photo)) for photo in (astronaut, grace_hopper, astronaut)]
    report = examine([*photos_with_faces, (grace_hopper, [])], batch=True)
    assert (report.outlier, report.notes) == (None, ())
    assert [reference.likeness for reference in report.references] == [None] * 4
    assert [reference.face_index for reference in report.references] == [0, 0, 0, None]
    assert "No face was found" in report.references[3].warnings[0]
    assert not any("resemble" in line for line in report.lines())


def test_neither_of_two_different_faces_is_the_outlier(face_pack, astronaut, grace_hopper):
    report = examine([(photo, find_faces(face_pack, photo)) for photo in (astronaut, grace_hopper)])
    assert report.outlier is None
    assert "hardly resemble" in report.notes[0]


@pytest.mark.parametrize(
    ("similarity", "similarity_to_last", "expected"),
    [(0.6, 0.05, 3), (0.6, 0.19, 3), (0.6, 0.25, None), (0.15, 0.0, None), (0.05, 0.05, None)],
)
def test_outlier_requires_that_the_others_agree(similarity, similarity_to_last, expected):
    matrix = np.full((4, 4), similarity, np.float32)
    matrix[3] = matrix[:, 3] = similarity_to_last
    np.fill_diagonal(matrix, 1)
    assert find_outlier(matrix) == expected
    with_gap = np.insert(np.insert(matrix, 1, np.nan, 0), 1, np.nan, 1)  # a photo without a face is in between
    assert find_outlier(with_gap) == (None if expected is None else expected + 1)


@given(st.integers(1, 5), st.integers(2, 16), st.integers(0, 2**32 - 1))
def test_cosines_are_independent_of_norms(count, size, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, size)).astype(np.float32)
    matrix = cosines(list(vectors * rng.uniform(0.1, 30, (count, 1)).astype(np.float32)))
    expected = [[np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)) for b in vectors] for a in vectors]
    np.testing.assert_allclose(matrix, expected, atol=1e-5)
    assert np.abs(matrix).max() <= 1


def test_all_faces_are_framed_and_the_selected_one_is_highlighted(face_pack, group):
    several = find_faces(face_pack, group)
    image = np.asarray(annotate_faces(group, several, 2, side=640))
    assert image.shape == (443, 640, 3)
    plain = np.asarray(annotate_faces(group, [], None, side=640))
    changed = (image != plain).any(axis=2)
    bright = (image == ACCENT).all(axis=2)
    for i, face in enumerate(several):
        left, _, right, bottom = (face.box / 2).round().astype(int)
        bottom_edge = (slice(bottom - 3, bottom + 3), slice(left + 8, right - 8))
        assert changed[bottom_edge].any(axis=0).mean() > 0.9
        assert bright[bottom_edge].any() == (i == 2)


def test_engine_detects_faces_once_per_photo(stand_ins, astronaut, group, monkeypatch):
    from facesnap_ext.identity import faces

    calls = []
    find_faces = faces.find_faces
    monkeypatch.setattr(faces, "find_faces", lambda *args: calls.append(args[1].name) or find_faces(*args))
    engine = Engine(lambda: find_models(stand_ins))
    grey = Photo(np.full((64, 64, 3), 128, np.uint8), "grey.png")
    report = engine.examine([astronaut, group, grey])
    assert [len(reference.faces) for reference in report.references] == [1, 6, 0]
    again = engine.examine([astronaut, group, grey], face_index=3)
    assert again.references[1].face_index == 3
    assert again.references[1].faces[3].photo is group
    assert calls == [astronaut.name, group.name, "grey.png"]
