"""The face mesh: what the network sees of a photo, and where its points lie in the photo."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

import onnx.numpy_helper
import onnx.parser

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.face_mesh import INDICES_68, load_face_mesh, mesh_points, mesh_points68
from facesnap_ext.identity.faces import Face
from facesnap_ext.landmarks.open_face import fit, load_basis
from facesnap_ext.landmarks.points72 import from_68
from facesnap_ext.photos import Photo
from tests.support.stand_in_pack import stand_in_face_mesh

HEADER = '<ir_version: 7, opset_import: ["" : 13]>\n'
# every point lies at the centre of the image's brightness
CENTROID = """mesh (float[1, 256, 256, 3] image) => (float[1, 1, 1, 1434] landmarks)
{
    all = ReduceSum (image)
    by_column = Mul (image, columns)
    by_row = Mul (image, rows)
    across = ReduceSum (by_column)
    down = ReduceSum (by_row)
    x = Div (across, all)
    y = Div (down, all)
    depth = Sub (x, x)
    point = Concat <axis = 3> (x, y, depth)
    landmarks = Tile (point, count)
}"""


def write(path, text, **constants):
    network = onnx.parser.parse_model(HEADER + text)
    for name, values in constants.items():
        network.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    onnx.save(network, str(path))
    return path


@pytest.fixture(scope="module")
def centroid(tmp_path_factory):
    return load_face_mesh(
        write(
            tmp_path_factory.mktemp("mesh") / "centroid.onnx",
            CENTROID,
            columns=(np.arange(256, dtype=np.float32) + 0.5)[:, None],
            rows=(np.arange(256, dtype=np.float32) + 0.5)[:, None, None],
            count=[1, 1, 1, 478],
        )
    )


def face_at(pixels, centre, side, angle):
    """A face whose box is centred, and whose eyes are on a line at this angle in degrees."""
    across = np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
    eyes = [centre - across * side / 4, centre + across * side / 4]
    box = np.array([*(centre - side / 2), *(centre + side / 2)], np.float32)
    keypoints = np.array([*eyes, centre, centre, centre], np.float32)
    return Face(Photo(pixels, "photo.png"), box, keypoints, np.ones(512, np.float32), 0.9, False, 640)


@given(
    st.floats(-180, 180),
    st.floats(100, 400),
    st.tuples(st.floats(-0.4, 0.4), st.floats(-0.4, 0.4)),  # so that the crop contains the whole spot at any angle
    st.tuples(st.floats(150, 350), st.floats(150, 350)),
)
def test_points_lie_in_the_photo_where_the_network_sees_them(centroid, angle, side, offset, centre):
    """A bright spot has the same centre in the photo and in the mapped points, for any box and rotation."""
    centre = np.array(centre)
    spot = centre + np.array(offset) * side
    y, x = np.mgrid[:500, :500] + 0.5
    brightness = 250 * np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / 2 / 6**2)
    assume(((spot > 30) & (spot < 470)).all())
    pixels = np.repeat(brightness[..., None], 3, axis=2).astype(np.uint8)
    points = mesh_points(centroid, face_at(pixels, centre, side, angle))
    assert points.shape == (478, 2)
    np.testing.assert_allclose(points, np.tile(spot, (478, 1)), atol=0.25)


def test_the_network_sees_an_upright_face_in_rgb(tmp_path):
    """The crop is a square of 1.5 times the box's side, with level eyes, in 0…1. The network returns its colours."""
    sample = "mesh (float[1, 256, 256, 3] image) => (float[1, 1, 1, 1434] landmarks) { "
    sample += "flat = Reshape (image, rows)\n picked = Gather (flat, pixels)\n landmarks = Reshape (picked, shape) }"
    positions = [(y, x) for y in (20, 230) for x in (20, 230)]
    chosen = [y * 256 + x for y, x in positions] + [0] * 474
    constants = {"rows": [65536, 3], "pixels": chosen, "shape": [1, 1, 1, 1434]}
    mesh = load_face_mesh(write(tmp_path / "sample.onnx", sample, **constants))
    pixels = np.zeros((600, 600, 3), np.uint8)
    pixels[:300, :300], pixels[:300, 300:], pixels[300:, :300] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    for angle, order in {0: (0, 1, 2, 3), 90: (1, 3, 0, 2), 180: (3, 2, 1, 0), -90: (2, 0, 3, 1)}.items():
        face = face_at(pixels, np.array([300.0, 300.0]), 200, angle)
        to_crop = (mesh_points(mesh, face) - 300) * 256 / 300  # undo the scale; the network's "points" are red, green
        turn = math.radians(-angle)
        back = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        red_green = (to_crop @ back.T + 128)[:4]
        colours = np.array([(1, 0), (0, 1), (0, 0), (0, 0)])[list(order)]
        np.testing.assert_allclose(red_green, colours, atol=1e-3)


def test_the_68_points_form_a_face_of_mediapipes_mean(tmp_path, astronaut):
    stand_in_face_mesh(tmp_path / "mesh.onnx")
    face = face_at(astronaut.pixels, np.array([220.0, 120.0]), 100, 0)
    points = mesh_points68(load_face_mesh(tmp_path / "mesh.onnx"), face)
    assert points.shape == (68, 2)
    errors = {kind: fit(load_basis(kind), [from_68(points)])[1][0].error for kind in ("mediapipe", "1k3d68")}
    assert errors["mediapipe"] < errors["1k3d68"] / 2


def test_indices_are_distinct_points_of_the_face():
    assert len(set(INDICES_68)) == 68
    assert max(INDICES_68) < 468, "the irises have the indices from 468"


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_values_out_of_range_are_reported(tmp_path, value):
    text = "mesh (float[1, 256, 256, 3] image) => (float[1, 1, 1, 1434] landmarks) { landmarks = Identity (points) }"
    path = write(tmp_path / "mesh.onnx", text, points=np.full((1, 1, 1, 1434), value, np.float32))
    face = face_at(np.zeros((50, 50, 3), np.uint8), np.array([25.0, 25.0]), 20, 0)
    with pytest.raises(FaceSnapError, match=r"mesh\.onnx returns values that are not finite or out of range"):
        mesh_points(load_face_mesh(path), face)


LOOP = """mesh (float[1, 256, 256, 3] image) => (float[1, 1, 1, 1434] landmarks)
{
    go = Constant <value_ints = [1]> ()
    yes = Cast <to = 9> (go)
    landmarks = If (yes) <
        then_branch = one () => (float[1, 1, 1, 1434] a) { a = ConstantOfShape (shape) },
        else_branch = two () => (float[1, 1, 1, 1434] b) { b = ConstantOfShape (shape) }>
}"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LOOP, "uses the operation If"),
        ("other (float[1, 3, 192, 192] face) => (float[1, 3309] y) { y = Identity (points) }", "is not MediaPipe's"),
        ("mesh (float[1, 256, 256, 3] image) => (float[1, 1434] y) { y = Unknown (image) }", "cannot be loaded"),
    ],
)
def test_unusable_networks_are_reported(tmp_path, text, reason):
    path = write(tmp_path / "mesh.onnx", text, shape=[1, 1, 1, 1434])
    with pytest.raises(FaceSnapError, match=rf"mesh\.onnx .*{reason}|mesh\.onnx {reason}"):
        load_face_mesh(path)


def test_network_that_fails_on_a_photo_is_reported(tmp_path):
    text = "mesh (float[1, 256, 256, 3] image) => (float[1, 1434] y) { y = Reshape (image, shape) }"
    mesh = load_face_mesh(write(tmp_path / "mesh.onnx", text, shape=[1, 1434]))
    with pytest.raises(FaceSnapError, match=r"landmark detector .*mesh\.onnx cannot be used"):
        mesh_points(mesh, face_at(np.zeros((50, 50, 3), np.uint8), np.array([25.0, 25.0]), 20, 0))
