"""What is said of reference photos: on real photos with small real networks, and on made-up likenesses."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facesnap_ext.engine import Engine
from facesnap_ext.identity import references
from facesnap_ext.identity.faces import Face, find_faces, longer_side
from facesnap_ext.identity.framing import framed
from facesnap_ext.identity.references import BLURRED, blur, cosines, examine, misfit
from facesnap_ext.photos import Photo
from facesnap_ext.weights.search import find_models

cv2 = pytest.importorskip("cv2")

TEMPLATE = np.array(  # where ArcFace's eyes, nose and mouth are in its 112 pixels
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)


@pytest.fixture(scope="module")
def real_faces(face_pack, astronaut, grace_hopper, group):
    """Eight sharp faces, in photos cut to what is around them."""
    return [close(face) for photo in (astronaut, grace_hopper, group) for face in find_faces(face_pack, photo)]


def close(face: Face) -> Face:
    corner = np.maximum(face.box[:2] - 40, 0).astype(int)
    (left, top), (right, bottom) = corner, (face.box[2:] + 40).astype(int)
    cut = Photo(np.ascontiguousarray(face.photo.pixels[top:bottom, left:right]), face.photo.name)
    return replace(face, photo=cut, box=face.box - np.tile(corner, 2), keypoints=face.keypoints - corner)


def softened(face: Face, sigma: float, noise: float = 0.0) -> Face:
    """The photo blurred by `sigma` pixels of the 112 that ArcFace sees, with a camera's noise."""
    from insightface.utils.face_align import estimate_norm

    scale = np.hypot(*estimate_norm(face.keypoints, 112)[0, :2])
    pixels = cv2.GaussianBlur(face.photo.pixels, (0, 0), sigma / scale).astype(np.float32)
    if noise:
        pixels += noise * np.random.default_rng(0).standard_normal(pixels.shape, np.float32)
    return replace(face, photo=Photo(np.clip(pixels.round(), 0, 255).astype(np.uint8), f"blurred {face.photo.name}"))


def said(face: Face, faces=None, which=0) -> str:
    return " ".join(examine([(face.photo, faces or [face])], which).references[0].warnings)


def test_a_blurred_copy_is_warned_about_and_the_sharp_photo_is_not(real_faces):
    for face in real_faces:
        assert "blurred" not in said(face)
        assert "blurred" not in said(softened(face, 0.7, noise=2))
        for strength in (2, 6):
            assert f"The face in blurred {face.photo.name} is blurred" in said(softened(face, strength, noise=2))


def test_what_is_called_blurred_is_what_costs_likeness(real_faces, face_pack):
    """The threshold lies where a real embedding begins to lose the person."""
    from facesnap_ext.identity.faces import _embedding

    for face in real_faces[:5]:
        kept = {}
        for sigma in (1, 2):
            soft = softened(face, sigma)
            embedding = _embedding(face_pack, np.ascontiguousarray(soft.photo.pixels[:, :, ::-1]), face.keypoints)
            kept[sigma] = cosines([face.embedding, embedding])[0, 1]
        assert kept[2] < 0.9 < kept[1]
        assert blur(softened(face, 1)) < BLURRED < blur(softened(face, 2))


@pytest.mark.parametrize("sigma", [1.5, 2.0, 3.0])
def test_blur_is_the_width_of_the_gaussian_on_a_picture_with_natures_spectrum(sigma):
    """A closed form: for power 1/k², mean squared gradient over mean squared Laplacian is the squared width."""
    frequency = np.hypot(np.fft.fftfreq(112)[:, None], np.fft.fftfreq(112)[None])
    frequency[0, 0] = np.inf
    measured = []
    for seed in range(6):
        noise = np.fft.fft2(np.random.default_rng(seed).standard_normal((112, 112)))
        smooth = np.fft.ifft2(noise / frequency * np.exp(-2 * (np.pi * frequency * sigma) ** 2)).real
        smooth = 128 + 40 * smooth / smooth.std()
        pixels = np.repeat(smooth.round().clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
        face = Face(Photo(pixels, "cloud"), np.zeros(4, np.float32), TEMPLATE, np.ones(2, np.float32), 1, False, 640)
        measured.append(blur(face))
        paler = Photo((64 + pixels // 2).astype(np.uint8), "pale")
        assert blur(replace(face, photo=paler)) == pytest.approx(measured[-1], rel=0.03)
    assert np.mean(measured) == pytest.approx(sigma, rel=0.12)


def test_a_small_face_is_warned_about_and_no_second_time_for_being_magnified(face_pack, grace_hopper):
    small = Photo(cv2.resize(grace_hopper.pixels, None, fx=0.35, fy=0.35, interpolation=cv2.INTER_AREA), "small.png")
    face = find_faces(face_pack, small)[0]
    assert longer_side(face.box) < 112
    assert "small.png is small" in said(face)
    assert "blurred" not in said(face)
    assert "small" not in said(find_faces(face_pack, grace_hopper)[0])


def test_a_padded_face_several_faces_and_none_are_said(face_pack, astronaut, group):
    close_up = Photo(np.ascontiguousarray(astronaut.pixels[70:165, 178:273]), "close-up.png")
    assert "close-up.png fills the picture" in said(find_faces(face_pack, close_up)[0])
    several = find_faces(face_pack, group)
    assert "shows 6 faces: the largest is taken" in said(several[0], several)
    assert "shows 6 faces: number 2 is taken" in said(several[0], several, which=2)
    report = examine([(group, several), (astronaut, []), (close_up, find_faces(face_pack, close_up))], which=1)
    assert [reference.chosen for reference in report.references] == [1, None, None]
    (told,) = report.references[1].warnings
    assert told.startswith(f"No face was found in {astronaut.name}")
    assert "close-up.png has no face 1" in report.references[2].warnings[0]
    assert np.isnan(report.cosines).sum() == 8
    assert "NaN" not in json.dumps(report.to_json())


def test_the_photo_of_somebody_else_is_found_among_photos_of_one_person(face_pack, astronaut, grace_hopper):
    own = [
        astronaut,
        Photo(np.ascontiguousarray(astronaut.pixels[:, ::-1]), "mirrored"),
        Photo((astronaut.pixels * 0.6).astype(np.uint8), "dark"),
    ]
    found = [(photo, find_faces(face_pack, photo)) for photo in own]
    assert examine(found).misfit is None
    stranger = (grace_hopper, find_faces(face_pack, grace_hopper))
    for place in range(4):
        report = examine([*found[:place], stranger, *found[place:]])
        assert report.misfit == place
        (warned,) = (r for r in report.references if "not like the others" in " ".join(r.warnings))
        assert warned.photo is grace_hopper
        assert warned.likeness < 0.2 < min(r.likeness for r in report.references if r is not warned)
    assert f"likeness to the others {warned.likeness:.2f}" in "\n".join(report.lines())


def test_people_apart_are_not_compared_but_their_photos_are_looked_at(face_pack, astronaut, grace_hopper):
    found = [(photo, find_faces(face_pack, photo)) for photo in (astronaut, grace_hopper, astronaut)]
    report = examine([*found, (grace_hopper, [])], apart=True)
    assert (report.misfit, report.notes) == (None, ())
    assert [reference.likeness for reference in report.references] == [None] * 4
    assert [reference.chosen for reference in report.references] == [0, 0, 0, None]
    assert "No face was found" in report.references[3].warnings[0]
    assert not any("hardly alike" in line or "not like" in line for line in report.lines())


def test_of_two_unlike_photos_neither_is_blamed(face_pack, astronaut, grace_hopper):
    report = examine([(photo, find_faces(face_pack, photo)) for photo in (astronaut, grace_hopper)])
    assert report.misfit is None
    assert "hardly alike" in report.notes[0]


@pytest.mark.parametrize(
    ("among", "with_last", "expected"),
    [(0.6, 0.05, 3), (0.6, 0.19, 3), (0.6, 0.25, None), (0.15, 0.0, None), (0.05, 0.05, None)],
)
def test_one_photo_is_blamed_only_where_the_others_agree(among, with_last, expected):
    matrix = np.full((4, 4), among, np.float32)
    matrix[3] = matrix[:, 3] = with_last
    np.fill_diagonal(matrix, 1)
    assert misfit(matrix) == expected
    gap = np.insert(np.insert(matrix, 1, np.nan, 0), 1, np.nan, 1)  # a photo without a face between them
    assert misfit(gap) == (None if expected is None else expected + 1)


@given(st.integers(1, 5), st.integers(2, 16), st.integers(0, 2**32 - 1))
def test_cosines_are_those_of_directions(count, size, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, size)).astype(np.float32)
    matrix = cosines(list(vectors * rng.uniform(0.1, 30, (count, 1)).astype(np.float32)))
    expected = [[np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)) for b in vectors] for a in vectors]
    np.testing.assert_allclose(matrix, expected, atol=1e-5)
    assert np.abs(matrix).max() <= 1


def test_every_face_is_framed_and_the_chosen_one_stands_out(face_pack, group):
    several = find_faces(face_pack, group)
    picture = np.asarray(framed(group, several, 2, side=640))
    assert picture.shape == (443, 640, 3)
    plain = np.asarray(framed(group, [], None, side=640))
    changed = (picture != plain).any(axis=2)
    bright = (picture == references.ACCENT).all(axis=2)
    for i, face in enumerate(several):
        left, _, right, bottom = (face.box / 2).round().astype(int)
        bottom_edge = (slice(bottom - 3, bottom + 3), slice(left + 8, right - 8))
        assert changed[bottom_edge].any(axis=0).mean() > 0.9
        assert bright[bottom_edge].any() == (i == 2)


def test_the_engine_looks_at_a_photo_once(stand_ins, astronaut, group, monkeypatch):
    from facesnap_ext.identity import faces

    runs = []
    find = faces.find_faces
    monkeypatch.setattr(faces, "find_faces", lambda *args: runs.append(args[1].name) or find(*args))
    engine = Engine(lambda: find_models(stand_ins))
    grey = Photo(np.full((64, 64, 3), 128, np.uint8), "grey.png")
    report = engine.examine([astronaut, group, grey])
    assert [len(reference.faces) for reference in report.references] == [1, 6, 0]
    again = engine.examine([astronaut, group, grey], which=3)
    assert again.references[1].chosen == 3
    assert again.references[1].faces[3].photo is group
    assert runs == [astronaut.name, group.name, "grey.png"]
