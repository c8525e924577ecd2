"""Face detection, embeddings, crops and face model packs."""

from __future__ import annotations

import io
import shutil
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.detection import DETECTOR_SIZES
from facesnap_ext.identity.faces import FacePack, NoFaceError, find_faces, load_pack, select_face, square_crop
from facesnap_ext.photos import Photo, from_bytes
from tests.support.stand_in_pack import stand_in_arcface


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# Mock models: a face is a rectangle of one grey value, and its embedding is the mean colour of the photo.


@dataclass
class GreyDetector:
    """Detect the box of each grey value above 100, if it fills at most `max_fraction` of the photo's longer side."""

    max_fraction: float = 0.5
    calls: list = field(default_factory=list)

    def detect(self, bgr, input_size):
        self.calls.append((bgr.shape, input_size))
        boxes, points = [], []
        for value in range(101, int(bgr.max()) + 1):
            rows, columns = np.nonzero((bgr == value).all(2))
            if len(rows) and max(np.ptp(rows), np.ptp(columns)) + 1 <= self.max_fraction * max(bgr.shape):
                box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                boxes.append([*box, value / 255])
                points.append([[box[0], box[1]], [box[2], box[1]], [0, 0], [box[0], box[3]], [box[2], box[3]]])
        return np.array(boxes).reshape(-1, 5), np.array(points).reshape(-1, 5, 2)


class MeanColour:
    def get(self, bgr, face):
        return bgr.mean((0, 1))


def mock_pack(max_fraction: float = 0.5) -> FacePack:
    return FacePack("mock", GreyDetector(max_fraction), MeanColour())


def photo_with_boxes(height: int, width: int, *boxes: tuple[int, int, int, int]) -> Photo:
    """Return a photo with boxes (left, top, right, bottom) of grey values 101, 102, … on black."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for value, (left, top, right, bottom) in enumerate(boxes, 101):
        pixels[top:bottom, left:right] = value
    return Photo(pixels, "photo.png")


@pytest.fixture(autouse=True)
def _insightface():
    pytest.importorskip("insightface")


def test_faces_are_sorted_largest_first():
    pack = mock_pack()
    found = find_faces(pack, photo_with_boxes(100, 200, (0, 0, 20, 20), (100, 10, 140, 40), (30, 0, 61, 30)))
    assert [face.box.tolist() for face in found] == [[100, 10, 140, 40], [30, 0, 61, 30], [0, 0, 20, 20]]
    assert [round(face.score * 255) for face in found] == [102, 103, 101]
    assert not any(face.padded for face in found)
    assert select_face(found) is select_face(found, 0) is found[0]
    assert select_face(found, 2) is found[2]
    for face_index in (3, -1):
        with pytest.raises(FaceSnapError, match=rf"photo\.png has no face {face_index}\b.* 3 faces"):
            select_face(found, face_index)


@pytest.mark.parametrize(("height", "width"), [(90, 60), (60, 90), (1501, 977)])
def test_close_up_is_detected_with_padding(height, width):
    """Coordinates are in pixels of the photo, regardless of border and scale."""
    box = (width // 30, height // 30, width - width // 30, height - height // 15)
    pack = mock_pack()
    [face] = find_faces(pack, photo_with_boxes(height, width, box))
    assert face.padded
    assert face.detector_size == 640
    pixel = max(1, max(height, width) / 640)
    np.testing.assert_allclose(face.box, box, atol=pixel)
    np.testing.assert_allclose(face.keypoints[[0, 4]].ravel(), box, atol=pixel)
    (plain, _), *turned, ((padded_height, padded_width, _), _) = pack.detector.calls[:5]
    assert plain == (height, width, 3)
    assert len(turned) == 3
    assert len(pack.detector.calls) == 8  # with and without a border, each in four orientations
    assert padded_height / padded_width == pytest.approx(height / width, rel=0.01)
    assert max(padded_height, padded_width) <= 3 * 640


def test_face_that_fills_the_photo_is_detected_again_with_padding():
    photo = photo_with_boxes(100, 100, (10, 10, 85, 85))
    [face] = find_faces(mock_pack(max_fraction=1), photo)
    assert face.padded
    [face] = find_faces(mock_pack(max_fraction=1), photo_with_boxes(100, 100, (10, 10, 79, 79)))
    assert not face.padded


def test_all_detector_sizes_are_tried():
    pack = mock_pack()
    with pytest.raises(NoFaceError, match=r"in photo\.png: use a photo"):
        find_faces(pack, photo_with_boxes(30, 40))
    sizes = [size for _, size in pack.detector.calls]
    upright, in_turns = [(size, size) for size in range(640, 191, -64)], [(640, 640)] * 3
    assert sizes == [(640, 640), *in_turns, *upright, *in_turns, *[(448, 448)] * 3, *[(256, 256)] * 3]


def test_detector_size_is_recorded():
    class SmallSizeDetector(GreyDetector):
        def detect(self, bgr, input_size):
            return super().detect(bgr if input_size[0] <= 320 else bgr * 0, input_size)

    pack = FacePack("mock", SmallSizeDetector(), MeanColour())
    assert find_faces(pack, photo_with_boxes(100, 100, (20, 20, 50, 50)))[0].detector_size == 320


def test_models_receive_bgr():
    colour = np.zeros((60, 80, 3), np.uint8)
    colour[:] = (10, 20, 40)
    colour[10:20, 10:20] = 200
    [face] = find_faces(mock_pack(), Photo(colour, "blue"))
    np.testing.assert_allclose(face.embedding, colour[:, :, ::-1].mean((0, 1)), rtol=1e-6)


@pytest.mark.parametrize("width", [300, 700])
def test_extremely_narrow_photo_has_no_face(face_pack, width):
    """The wider one would be shrunk to a height of 0 pixels."""
    with pytest.raises(NoFaceError):
        find_faces(face_pack, Photo(np.zeros((1, width, 3), np.uint8), "line"))


@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    left=st.floats(-80, 80),
    top=st.floats(-80, 80),
    box_width=st.floats(1, 90),
    box_height=st.floats(1, 90),
)
def test_crop_is_square_and_contains_the_visible_face(height, width, left, top, box_width, box_height):
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([y, x, np.zeros_like(x)], 2).astype(np.uint8)
    box = np.array([left, top, left + box_width, top + box_height])
    crop = square_crop(pixels, box)
    assert crop.shape[0] == crop.shape[1] >= 1
    assert len(crop) <= max(1.5 * max(box_width, box_height) + 1, 1)
    rows, columns = crop[:, 0, 0].astype(int), crop[0, :, 1].astype(int)
    assert set(np.diff(rows)) <= {0, 1}  # no row is skipped or out of order; edge rows may repeat
    if len(crop) <= min(height, width):
        assert set(np.diff(rows)) | set(np.diff(columns)) <= {1}
    # the crop contains the whole visible part of the face
    visible_rows = [row for row in range(height) if top + 1 <= row <= top + box_height - 2]
    visible_columns = [column for column in range(width) if left + 1 <= column <= left + box_width - 2]
    if visible_rows and visible_columns:
        assert set(visible_rows) <= set(rows)
        assert set(visible_columns) <= set(columns)


def test_crop_examples():
    pixels = np.arange(100 * 200 * 3).reshape(100, 200, 3) % 251
    pixels = pixels.astype(np.uint8)
    np.testing.assert_array_equal(square_crop(pixels, [100, 40, 120, 60]), pixels[35:65, 95:125])
    np.testing.assert_array_equal(square_crop(pixels, [100, 40, 110, 60]), pixels[35:65, 90:120])
    # the crop is moved inside the photo
    np.testing.assert_array_equal(square_crop(pixels, [0, 0, 20, 20]), pixels[:30, :30])
    np.testing.assert_array_equal(square_crop(pixels, [180, 85, 200, 105]), pixels[70:, 170:])
    np.testing.assert_array_equal(square_crop(pixels, [50, 0, 130, 100]), pixels[:, 40:140])  # shrunk
    narrow = square_crop(pixels[:, :40], [0, 10, 40, 90])  # the face itself is taller than the photo is wide
    np.testing.assert_array_equal(narrow[:, 20:60], pixels[10:90, :40])
    np.testing.assert_array_equal(narrow[:, :20], pixels[10:90, :1].repeat(20, 1))
    np.testing.assert_array_equal(narrow[:, 60:], pixels[10:90, 39:40].repeat(20, 1))


# Small real networks on real photos


def test_single_face(face_pack, astronaut):
    [face] = find_faces(face_pack, astronaut)
    np.testing.assert_allclose(face.box, [180, 62, 271, 178], atol=6)
    np.testing.assert_allclose(face.keypoints, [[204, 101], [248, 104], [224, 125], [203, 143], [242, 145]], atol=5)
    assert face.score > 0.8
    assert (face.padded, face.detector_size) == (False, 640)
    assert face.embedding.shape == (512,)
    assert face.embedding.dtype == np.float32
    assert face.photo is astronaut
    side = round(1.5 * (face.box[3] - face.box[1]))
    assert face.crop.shape == (side, side, 3)


def test_embedding_matches_insightface(face_pack_folder, face_pack, astronaut):
    from insightface.app import FaceAnalysis

    analysis = FaceAnalysis(str(face_pack_folder), providers=["CPUExecutionProvider"])
    analysis.prepare(0, det_size=(640, 640))
    [face] = find_faces(face_pack, astronaut)
    [expected] = analysis.get(np.ascontiguousarray(astronaut.pixels[:, :, ::-1]))
    np.testing.assert_allclose(face.embedding, expected.embedding, rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(face.embedding) > 1.5  # the embedding is not normalised
    [swapped] = analysis.get(astronaut.pixels)
    assert np.abs(face.embedding - swapped.embedding).max() > 0.01


def test_same_person_has_more_similar_embeddings(face_pack, astronaut, grace_hopper, group):
    def embedding(image: Image.Image) -> np.ndarray:
        return select_face(find_faces(face_pack, Photo(np.asarray(image), "image"))).embedding

    def jpeg(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=20)
        return Image.open(file)

    image = Image.fromarray(astronaut.pixels)
    original = select_face(find_faces(face_pack, astronaut)).embedding
    changed = [
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        image.point(lambda value: value // 2),
        image.resize((256, 256)),
        image.rotate(15),
        image.convert("L").convert("RGB"),
        jpeg(image),
    ]
    similarities = [cosine(original, embedding(other)) for other in changed]
    others = [*find_faces(face_pack, grace_hopper), *find_faces(face_pack, group)]
    others_similarities = [cosine(original, face.embedding) for face in others]
    assert len(others_similarities) == 7
    assert min(similarities) > 0.8 > 0.4 > max(others_similarities)


@pytest.mark.parametrize("fraction", [0.7, 0.6])
def test_real_close_up(fraction, face_pack, grace_hopper):
    """A crop that is so tight that the detector finds no face without padding."""
    [whole] = find_faces(face_pack, grace_hopper)
    left, top, right, bottom = whole.box
    middle, half = np.array([left + right, top + bottom]) / 2, fraction / 2 * np.array([right - left, bottom - top])
    (x0, y0), (x1, y1) = np.round(middle - half).astype(int), np.round(middle + half).astype(int)
    tight = Photo(np.ascontiguousarray(grace_hopper.pixels[y0:y1, x0:x1]), "tight.png")
    boxes, _ = face_pack.detector.detect(tight.pixels[:, :, ::-1].copy(), input_size=(640, 640))
    assert len(boxes) == 0
    face = select_face(find_faces(face_pack, tight))
    assert face.padded
    assert np.abs(face.keypoints + np.array([x0, y0]) - whole.keypoints).max() < 0.15 * (right - left)
    assert cosine(face.embedding, whole.embedding) > 0.45
    assert face.crop.shape[0] == face.crop.shape[1]


def test_exif_orientation_does_not_change_the_face(face_pack, astronaut):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(np.rot90(astronaut.pixels))).save(file, "PNG", exif=exif)
    turned = select_face(find_faces(face_pack, from_bytes(file.getvalue(), "turned")))
    upright = select_face(find_faces(face_pack, astronaut))
    np.testing.assert_array_equal(turned.box, upright.box)
    np.testing.assert_array_equal(turned.embedding, upright.embedding)


def test_group_photo(face_pack, group):
    found = find_faces(face_pack, group)
    areas = [(face.box[2] - face.box[0]) * (face.box[3] - face.box[1]) for face in found]
    assert len(found) == 6
    assert areas == sorted(areas, reverse=True)
    assert select_face(found) is found[int(np.argmax(areas))]
    centres = sorted((face.box[0] + face.box[2]) / 2 for face in found)
    np.testing.assert_allclose(centres, [114, 323, 518, 796, 956, 1180], atol=15)


# Face model packs


def test_pack_in_a_subfolder_loads(face_pack_folder, tmp_path, astronaut, face_pack):
    shutil.copytree(face_pack_folder, tmp_path / "antelopev2" / "antelopev2")
    pack = load_pack(tmp_path / "antelopev2")
    assert pack.folder == tmp_path / "antelopev2" / "antelopev2"
    [expected] = find_faces(face_pack, astronaut)
    np.testing.assert_array_equal(find_faces(pack, astronaut)[0].embedding, expected.embedding)


def test_missing_pack_is_reported_and_not_downloaded(tmp_path, monkeypatch):
    import insightface.utils.storage

    monkeypatch.setattr(insightface.utils.storage, "download_file", lambda *_, **__: pytest.fail("download"))
    for folder in (tmp_path / "antelopev2", tmp_path):
        with pytest.raises(FaceSnapError) as error:
            load_pack(folder)
        assert str(folder) in str(error.value)
        assert "glintr100.onnx" in str(error.value)


def test_two_packs_in_one_folder_are_reported(face_pack_folder, tmp_path):
    for name in ("antelopev2", "buffalo_l"):
        shutil.copytree(face_pack_folder, tmp_path / name)
    with pytest.raises(FaceSnapError, match=rf"{tmp_path} .*antelopev2 and buffalo_l"):
        load_pack(tmp_path)


def test_incomplete_packs_are_reported(face_pack_folder, tmp_path):
    detector_only, recognition_only, broken = (tmp_path / name for name in ("one", "two", "three"))
    shutil.copytree(face_pack_folder, detector_only, ignore=shutil.ignore_patterns("fr_*"))
    shutil.copytree(face_pack_folder, recognition_only, ignore=shutil.ignore_patterns("scrfd_*"))
    shutil.copytree(face_pack_folder, broken)
    (broken / "scrfd_centerface.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(FaceSnapError, match=rf"{detector_only} has no face recognition model"):
        load_pack(detector_only)
    with pytest.raises(FaceSnapError, match=rf"{recognition_only} has no face detector"):
        load_pack(recognition_only)
    with pytest.raises(FaceSnapError, match=rf"models in {broken} cannot be read"):
        load_pack(broken)


def test_missing_insightface_is_reported(face_pack_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(FaceSnapError, match="install insightface"):
        load_pack(face_pack_folder)


def test_pack_runs_on_the_cpu_unless_cuda_is_requested(face_pack, face_pack_folder, monkeypatch):
    from insightface import model_zoo

    requested, cpu, cuda = [], "CPUExecutionProvider", "CUDAExecutionProvider"
    real = model_zoo.get_model

    def get_model(*args, providers, **options):
        if "scrfd" in args[0]:
            requested.append(providers)
        return real(*args, providers=[cpu], **options)

    monkeypatch.setattr(model_zoo, "get_model", get_model)
    for device in ("cpu", "cuda"):
        assert load_pack(face_pack_folder, device).providers == [cpu]
    load_pack(face_pack_folder)
    assert requested == [[cpu], [cuda, cpu], [cpu]]


def test_stand_in_recognition_is_deterministic(face_pack_folder, tmp_path, astronaut, grace_hopper):
    shutil.copy(face_pack_folder / "scrfd_centerface.onnx", tmp_path)
    stand_in_arcface(tmp_path / "stand_in.onnx", seed=3)
    pack = load_pack(tmp_path)
    first, second, again = (select_face(find_faces(pack, photo)) for photo in (astronaut, grace_hopper, astronaut))
    np.testing.assert_array_equal(first.embedding, again.embedding)
    assert first.embedding.shape == (512,)
    assert cosine(first.embedding, second.embedding) < 0.99


def test_detector_sizes_are_descending_multiples_of_32():
    assert all(size % 32 == 0 for size in DETECTOR_SIZES)
    assert all(np.diff(DETECTOR_SIZES) < 0)
