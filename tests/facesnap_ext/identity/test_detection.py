"""Faces of any orientation and size are found, with the same embeddings."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from facesnap_ext.identity import detection
from facesnap_ext.identity.detection import detect_faces
from facesnap_ext.identity.faces import find_faces
from facesnap_ext.identity.framing import face_thumbnail
from facesnap_ext.photos import Photo
from facesnap_ext.turns import roll_of, turn_box, turn_points, turned

cv2 = pytest.importorskip("cv2")
TURNS = (90, 180, 270)


@pytest.fixture(autouse=True)
def _insightface():
    pytest.importorskip("insightface")


@pytest.fixture(scope="module")
def faces_of(face_pack):
    """A function that returns the faces of a photo, and searches each photo only once."""
    found = {}

    def faces(photo: Photo) -> list:
        key = photo.pixels.shape, photo.pixels.tobytes()
        if key not in found:
            found[key] = find_faces(face_pack, photo)
        return found[key]

    return faces


def cosine(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def turn(photo: Photo, degrees: int) -> Photo:
    """The photo rotated clockwise, as from a camera that does not write EXIF."""
    return Photo(np.ascontiguousarray(np.rot90(photo.pixels, -degrees // 90)), f"turned by {degrees}")


def tilt(photo: Photo, degrees: float) -> Photo:
    height, width = photo.pixels.shape[:2]
    side = int(1.5 * max(height, width))
    transform = cv2.getRotationMatrix2D((width / 2, height / 2), -degrees, 1)
    transform[:, 2] += side / 2 - np.array([width / 2, height / 2])
    pixels = cv2.warpAffine(photo.pixels, transform, (side, side), borderMode=cv2.BORDER_REPLICATE)
    return Photo(pixels, f"tilted by {degrees}")


@pytest.mark.parametrize("degrees", TURNS)
@pytest.mark.parametrize("name", ["astronaut", "grace_hopper", "group"])
def test_a_turned_photo_has_the_same_faces(face_pack, faces_of, request, name, degrees):
    photo = request.getfixturevalue(name)
    height, width = photo.pixels.shape[:2]
    upright = faces_of(photo)
    found = faces_of(turn(photo, degrees))
    assert len(found) == len(upright)
    for face in found:
        assert face.turn == degrees
        same = max(upright, key=lambda other: cosine(face.embedding, other.embedding))
        assert cosine(face.embedding, same.embedding) > 0.95
        np.testing.assert_allclose(face.turned_box, same.box, atol=0.1 * (same.box[3] - same.box[1]))
        back = turn_points(face.keypoints, degrees, *((height, width) if degrees % 180 else (width, height)))
        np.testing.assert_allclose(back, same.keypoints, atol=0.1 * (same.box[3] - same.box[1]))
        assert abs(roll_of(face.keypoints, face.turn)) < 45
        size = (64, 64)
        crops = [cv2.resize(one.crop, size, interpolation=cv2.INTER_AREA).astype(float) for one in (face, same)]
        assert np.abs(crops[0] - crops[1]).mean() < 12
        views = [np.asarray(face_thumbnail(one, 64), float) for one in (face, same)]
        assert np.abs(views[0] - views[1]).mean() < 20


@pytest.mark.parametrize("name", ["astronaut", "grace_hopper", "group"])
def test_an_upright_photos_faces_are_those_that_the_detector_finds_in_it(face_pack, faces_of, request, name):
    photo = request.getfixturevalue(name)
    boxes, keypoints = face_pack.detector.detect(photo.pixels[:, :, ::-1].copy(), input_size=(640, 640))
    found = faces_of(photo)
    assert {tuple(face.box) for face in found} == {tuple(box[:4].astype(np.float32)) for box in boxes}
    assert {face.turn for face in found} == {0}
    assert len(found) == len(keypoints)
    assert all(face.tilt == 0 for face in found)


def test_each_face_of_a_photo_has_its_own_turn(face_pack, faces_of, astronaut, grace_hopper):
    """An example is two people who lie side by side, head to foot."""
    pixels = np.zeros((600, 1024, 3), np.uint8)
    pixels[:512, :512] = astronaut.pixels
    pixels[:, 512:] = np.rot90(grace_hopper.pixels, 2)
    found = find_faces(face_pack, Photo(pixels, "both"))
    [first] = faces_of(astronaut)
    [second] = faces_of(grace_hopper)
    assert {
        face.turn: cosine(face.embedding, {0: first, 180: second}[face.turn].embedding) > 0.95 for face in found
    } == {
        0: True,
        180: True,
    }


@pytest.mark.parametrize(
    ("name", "degrees"),
    [("astronaut", 35), ("grace_hopper", 50), ("grace_hopper", -55), ("astronaut", 135), ("grace_hopper", 220)],
)
def test_a_tilted_face_is_levelled(face_pack, faces_of, request, name, degrees):
    photo = request.getfixturevalue(name)
    [upright] = faces_of(photo)
    face = find_faces(face_pack, tilt(photo, degrees))[0]
    assert cosine(face.embedding, upright.embedding) > 0.93
    crop = find_faces(face_pack, Photo(face.crop, "crop"))[0]
    assert crop.turn == 0
    assert abs(roll_of(crop.keypoints)) < detection.LEVEL_FROM


@pytest.mark.parametrize("pixels", [16, 28, 40])
@pytest.mark.parametrize("name", ["astronaut", "grace_hopper"])
def test_a_small_face_in_a_large_photo_is_looked_at_from_close_up(face_pack, faces_of, request, name, pixels):
    photo = request.getfixturevalue(name)
    [near] = faces_of(photo)
    side = int(640 / pixels * (near.box[3] - near.box[1]))
    large = np.full((side, side, 3), 90, np.uint8)
    height, width = photo.pixels.shape[:2]
    large[side // 3 : side // 3 + height, side // 4 : side // 4 + width] = photo.pixels
    face = find_faces(face_pack, Photo(large, "large"))[0]
    assert cosine(face.embedding, near.embedding) > 0.955
    np.testing.assert_allclose(face.box - [side // 4, side // 3] * 2, near.box, atol=30)


@pytest.mark.parametrize(("place", "degrees"), [(0.25, 90), (0.46, 0), (0.5, 0), (0.54, 90), (0.72, 0)])
def test_a_small_face_where_tiles_overlap_is_found(face_pack, faces_of, grace_hopper, degrees, place):
    """The face is 8 pixels high in the detector's input."""
    side = 2600
    large = with_small_face(turn(grace_hopper, degrees), faces_of, side, 8, place)
    face = find_faces(face_pack, large)[0]
    assert face.turn == degrees
    np.testing.assert_allclose((face.box[:2] + face.box[2:]) / 2, place * side, atol=0.01 * side)


def with_small_face(photo: Photo, faces_of, side: int, pixels: int, place: float) -> Photo:
    """A grey square photo with the face of another, at this fraction of width and height.

    Args:
        pixels: height of the face when the photo is shrunk to 640 pixels.
    """
    [face] = faces_of(photo)
    length = float((face.box[2:] - face.box[:2]).max())
    corner = ((face.box[:2] + face.box[2:]) / 2 - length).astype(int)
    (left, top), (right, bottom) = np.maximum(corner, 0), corner + int(2 * length)
    head = photo.pixels[top:bottom, left:right]
    shrink = pixels / 640 * side / length
    head = cv2.resize(head, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    large = np.full((side, side, 3), 90, np.uint8)
    left, top = (place * side + shrink * (np.minimum(corner, 0) * -1 - length)).astype(int)
    large[top : top + head.shape[0], left : left + head.shape[1]] = head
    return Photo(large, "large")


@pytest.mark.parametrize(("height", "width"), [(7000, 500), (500, 7000)])
def test_a_face_in_a_long_screenshot_is_found(face_pack, grace_hopper, height, width):
    small = cv2.resize(grace_hopper.pixels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    pixels = np.full((height, width, 3), 200, np.uint8)
    top, left = (0.55 * (np.array([height, width]) - small.shape[:2])).astype(int)
    pixels[top : top + small.shape[0], left : left + small.shape[1]] = small
    [near] = find_faces(face_pack, Photo(small, "small"))
    face = find_faces(face_pack, Photo(pixels, "screenshot"))[0]
    assert cosine(face.embedding, near.embedding) > 0.9
    np.testing.assert_allclose(face.box - [left, top] * 2, near.box, atol=10)


@dataclass
class Blind:
    calls: list = field(default_factory=list)

    def detect(self, bgr, input_size):
        self.calls.append(bgr.shape)
        return np.zeros((0, 5)), np.zeros((0, 5, 2))


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (2, 3000), (30000, 5), (1080, 12000), (12000, 1080), (4000, 6000), (8900, 8900), (900, 32000)],
)
def test_looking_for_a_face_that_is_not_there_ends_soon(height, width):
    detector = Blind()
    assert detect_faces(detector, np.zeros((height, width, 3), np.uint8)) == []
    assert len(detector.calls) < 170
    if height < 3 * width < 9 * height:
        assert len(detector.calls) < 90
    with_border = 3 * detection.DETECTOR_SIZES[0]
    large = [shape for shape in detector.calls if max(shape[:2]) > with_border]
    assert len(large) <= 1, "a large photo is shrunk for the detector in every orientation, border and tile"


@pytest.mark.parametrize("degrees", [0, *TURNS])
def test_points_and_boxes_turn_with_the_image(degrees):
    pixels = np.zeros((30, 50, 3), np.uint8)
    pixels[4:9, 20:32] = 255
    rows, columns = np.nonzero(turned(pixels, degrees)[:, :, 0])
    box = turn_box(np.array([20.0, 4, 32, 9]), degrees, 50, 30)
    assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    points = np.random.default_rng(0).uniform(0, 30, (7, 2))
    size = (30, 50) if degrees % 180 else (50, 30)
    np.testing.assert_allclose(turn_points(turn_points(points, degrees, 50, 30), -degrees, *size), points)
