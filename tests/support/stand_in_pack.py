"""Small networks in the format of a face model pack: CenterFace as the detector, and a stand-in for ArcFace."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from facesnap_ext.identity.face_mesh import INDICES_68
from facesnap_ext.landmarks.open_face import Basis, OpenShape, face_points, load_basis
from facesnap_ext.landmarks.points72 import from_68
from facesnap_ext.landmarks.poses import rotation

# SCRFD's input is (pixel - 127.5) / 128; CenterFace's is the pixel value, 0…255. Both are RGB.
_PIXELS = """
<ir_version: 7, opset_import: ["" : 13]>
pixels (float[1, 3, height, width] image) => (float[1, 3, height, width] pixels)
{
    scale = Constant <value_float = 128.0> ()
    middle = Constant <value_float = 127.5> ()
    scaled = Mul (image, scale)
    pixels = Add (scaled, middle)
}
"""

# CenterFace predicts one face per 4x4 pixels: log height and log width in units of 4 px, the offset (y, x) of the
# centre from the cell, and five points (y, x) relative to the corner of the box, as fractions of its size. SCRFD
# predicts two faces per 8x8 pixels: distances from the corner of the cell to the four sides of the box, and five points
# (x, y) relative to that corner, in units of 8 px. The best two of each 2x2 block therefore become the two anchors of
# stride 8. Nothing is clipped to the image.
_DECODE = """
<ir_version: 7, opset_import: ["" : 13]>
decode (float[1, 1, h, w] heat, float[1, 2, h, w] size, float[1, 2, h, w] offset, float[1, 10, h, w] points)
    => (float[n8, 1] score_8, float[n16, 1] score_16, float[n32, 1] score_32,
        float[n8, 4] box_8, float[n16, 4] box_16, float[n32, 4] box_32,
        float[n8, 10] points_8, float[n16, 10] points_16, float[n32, 10] points_32)
{
    channels = Concat <axis = 1> (heat, size, offset, points)
    blocks = SpaceToDepth <blocksize = 2> (channels)
    block_shape = Constant <value_ints = [4, 15, -1]> ()
    block_rows = Reshape (blocks, block_shape)
    cells = Transpose <perm = [2, 0, 1]> (block_rows)
    parts = Constant <value_ints = [1, 2, 2, 10]> ()
    score, log_size, shift, fractions = Split <axis = 2> (cells, parts)

    half_unit = Constant <value_float = 0.5> ()
    size_units = Exp (log_size)
    full = Mul (size_units, half_unit)
    half = Mul (full, half_unit)
    cell_centres = Constant <value = float[1, 4, 2] {0.25, 0.25, 0.25, 0.75, 0.75, 0.25, 0.75, 0.75}> ()
    half_shift = Mul (shift, half_unit)
    centre = Add (half_shift, cell_centres)
    before = Sub (half, centre)
    after = Add (half, centre)
    sides = Concat <axis = 2> (before, after)
    to_ltrb = Constant <value_ints = [1, 0, 3, 2]> ()
    box = Gather <axis = 2> (sides, to_ltrb)

    pairs = Constant <value_ints = [0, 0, 5, 2]> ()
    point_axis = Constant <value_ints = [2]> ()
    fraction_pairs = Reshape (fractions, pairs)
    full_pairs = Unsqueeze (full, point_axis)
    before_pairs = Unsqueeze (before, point_axis)
    point_shift = Mul (fraction_pairs, full_pairs)
    points_yx = Sub (point_shift, before_pairs)
    to_xy = Constant <value_ints = [1, 0]> ()
    points_xy = Gather <axis = 3> (points_yx, to_xy)
    ten = Constant <value_ints = [0, 0, 10]> ()
    point_rows = Reshape (points_xy, ten)

    faces = Concat <axis = 2> (score, box, point_rows)
    two = Constant <value_ints = [2]> ()
    best_scores, best = TopK <axis = 1> (score, two)
    across = Constant <value_ints = [1, 1, 15]> ()
    best_across = Expand (best, across)
    best_faces = GatherElements <axis = 1> (faces, best_across)
    rows = Constant <value_ints = [-1, 15]> ()
    rows_8 = Reshape (best_faces, rows)

    zero = Constant <value_float = 0.0> ()
    quarter = Constant <value_ints = [-1, 4, 15]> ()
    first = Constant <value_int = 0> ()
    nothing_8 = Mul (rows_8, zero)
    nothing_8_by_4 = Reshape (nothing_8, quarter)
    rows_16 = Gather <axis = 1> (nothing_8_by_4, first)
    nothing_16_by_4 = Reshape (rows_16, quarter)
    rows_32 = Gather <axis = 1> (nothing_16_by_4, first)

    outputs = Constant <value_ints = [1, 4, 10]> ()
    score_8, box_8, points_8 = Split <axis = 1> (rows_8, outputs)
    score_16, box_16, points_16 = Split <axis = 1> (rows_16, outputs)
    score_32, box_32, points_32 = Split <axis = 1> (rows_32, outputs)
}
"""

_STAND_IN = """
<ir_version: 7, opset_import: ["" : 13]>
stand_in (float[N, 3, 112, 112] face) => (float[N, 512] embedding)
{
    blurred = AveragePool <kernel_shape = [16, 16], strides = [16, 16]> (face)
    flat = Flatten (blurred)
    embedding = MatMul (flat, projection)
}
"""

_STAND_IN_68 = """
<ir_version: 7, opset_import: ["" : 13]>
stand_in (float[N, 3, 192, 192] face) => (float[1, 3309] landmarks)
{
    mean = ReduceMean <keepdims = 0> (face)
    change = Mul (mean, variation)
    landmarks = Add (points, change)
}
"""


def scrfd_from_centerface(src: str | Path, dst: str | Path) -> None:
    """Convert CenterFace (https://github.com/Star-Clouds/CenterFace) to a detector that insightface runs as SCRFD.

    The converted network accepts any height and width that are multiples of 32.

    Args:
        src: `centerface.onnx`, with four outputs at stride 4: heat map, size, offset and five points.
        dst: file to write, with SCRFD's nine outputs: scores, boxes and five points at strides 8, 16 and 32. All scores
            at strides 16 and 32 are 0.
    """
    import onnx.compose
    import onnx.parser

    network = onnx.load(str(src))
    graph = network.graph
    network.ir_version = 7
    network.opset_import[0].version = 13  # CenterFace's operators are the same in its opset 9 and in this one
    initialisers = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in initialisers]
    del graph.input[:]
    graph.input.extend(inputs)
    _set_shape(graph.input[0], [1, 3, "height", "width"])
    for value, channels in zip(graph.output, (1, 2, 2, 10)):
        _set_shape(value, [1, channels, "h", "w"])

    names = [value.name for value in graph.output]
    network = onnx.compose.merge_models(
        onnx.parser.parse_model(_PIXELS), network, io_map=[("pixels", graph.input[0].name)]
    )
    network = onnx.compose.merge_models(
        network, onnx.parser.parse_model(_DECODE), io_map=list(zip(names, ("heat", "size", "offset", "points")))
    )
    onnx.save(network, str(dst))


def stand_in_arcface(dst: str | Path, seed: int) -> None:
    """Write a network with ArcFace's input and output, [N, 3, 112, 112] → [N, 512], for insightface.

    It computes a random projection, drawn from `seed`, of the face averaged to 7x7 pixels. Equal crops have equal
    embeddings and different crops have different ones, but two photos of one person need not have similar ones.
    """
    import onnx.numpy_helper
    import onnx.parser

    network = onnx.parser.parse_model(_STAND_IN)
    projection = np.random.default_rng(seed).standard_normal((3 * 7 * 7, 512), dtype=np.float32)
    network.graph.initializer.append(onnx.numpy_helper.from_array(projection, "projection"))
    onnx.save(network, str(dst))


def stand_in_landmarks68(dst: str | Path, points: np.ndarray, variation: np.ndarray | float = 0.0) -> None:
    """Write a network with the input and output of insightface's model for 68 landmarks, [N, 3, 192, 192] → [1, 3309].

    Args:
        dst: file to write.
        points: [68, 2] in -1…1 across the input square, whose side is 1.5 times the side of the face box.
        variation: [68, 2] what is added to the points per unit of the crop's mean brightness, which is in -1…1; with 0
            the landmarks of all faces are the same.
    """
    import onnx.numpy_helper
    import onnx.parser

    network = onnx.parser.parse_model(_STAND_IN_68)
    for name, values in (("points", points), ("variation", variation)):
        flat = np.zeros((1, 3309), np.float32)
        flat[0].reshape(-1, 3)[-68:, :2] = values
        network.graph.initializer.append(onnx.numpy_helper.from_array(flat, name))
    onnx.save(network, str(dst))


def stand_in_faces68(dst: str | Path) -> None:
    """Write `stand_in_landmarks68` whose landmarks form a face of the open face model: turned to the left in dark
    photos and to the right in bright ones, with a shape that depends on the brightness too."""
    dark, bright = (face * 1.2 for face in _two_faces(load_basis()))
    stand_in_landmarks68(dst, (dark + bright) / 2, (bright - dark) / 2)


def _two_faces(basis: Basis) -> tuple[np.ndarray, np.ndarray]:
    """iBUG's 68 points [68, 2] of two faces, half a unit high, centred, y down."""
    dark, bright = (
        face_points(basis, OpenShape(np.linspace(-side, side, basis.shape.shape[2]), np.zeros((72, 3))))
        @ rotation(25 * side, 5, 0).T
        for side in (-1, 1)
    )
    return to_68(dark[:, :2] * (0.5, -0.5)), to_68(bright[:, :2] * (0.5, -0.5))


_STAND_IN_MESH = """
<ir_version: 7, opset_import: ["" : 13]>
mesh (float[1, 256, 256, 3] image) => (float[1, 1, 1, 1434] landmarks, float[1, 1, 1, 1] presence)
{
    mean = ReduceMean <axes = [1, 2, 3], keepdims = 1> (image)
    change = Mul (mean, variation)
    landmarks = Add (points, change)
    presence = Identity (mean)
}
"""


def stand_in_face_mesh(dst: str | Path) -> None:
    """Write a network with the input and outputs of MediaPipe's converted landmark detector, [1, 256, 256, 3] in 0…1 →
    [1, 1, 1, 1434], whose landmarks form a face of the open face model with MediaPipe's mean, as `stand_in_faces68`."""
    import onnx.numpy_helper
    import onnx.parser

    dark, bright = (face * 160 + 128 for face in _two_faces(load_basis("mediapipe")))
    network = onnx.parser.parse_model(_STAND_IN_MESH)
    for name, values in (("points", dark), ("variation", bright - dark)):
        mesh = np.zeros((478, 3), np.float32)
        mesh[list(INDICES_68), :2] = values
        network.graph.initializer.append(onnx.numpy_helper.from_array(mesh.reshape(1, 1, 1, -1), name))
    onnx.save(network, str(dst))


def to_68(points: np.ndarray) -> np.ndarray:
    """Convert the 72 points [72,D] to iBUG's 68, so that `from_68` returns the 72."""
    linear = np.stack([from_68(one[:, None])[:, 0] for one in np.eye(68)], axis=1)  # [72,68]
    return np.linalg.lstsq(linear, points, rcond=None)[0]


def _set_shape(value, shape: list[int | str]) -> None:
    for dimension, size in zip(value.type.tensor_type.shape.dim, shape):
        if isinstance(size, str):
            dimension.dim_param = size
        else:
            dimension.dim_value = size
