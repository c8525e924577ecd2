"""CenterFace converted to SCRFD's outputs produces CenterFace's detections."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.support.stand_in_pack import scrfd_from_centerface, stand_in_arcface


@pytest.fixture(scope="module")
def converted(centerface_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("scrfd") / "det.onnx"
    scrfd_from_centerface(centerface_file, path)
    return path


def centerface_faces(path, rgb: np.ndarray, threshold: float) -> np.ndarray:
    """Decode CenterFace's outputs, [N, 15]: score, box, points; the best two in each block of 8x8 pixels, not
    clipped."""
    import onnx
    import onnxruntime
    from onnx.tools.update_model_dims import update_inputs_outputs_dims

    network = onnx.load(path)
    names = [value.name for value in network.graph.output]
    inputs = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in network.graph.input
    }
    inputs["input.1"] = ["n", 3, "height", "width"]
    outputs = {name: ["n", channels, "h", "w"] for name, channels in zip(names, (1, 2, 2, 10))}
    network = update_inputs_outputs_dims(network, inputs, outputs)
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    heat, size, offset, points = session.run(names, {"input.1": rgb.transpose(2, 0, 1)[None].astype(np.float32)})
    rows = []
    for y, x in zip(*np.nonzero(heat[0, 0] >= threshold)):
        block = np.sort(heat[0, 0, y // 2 * 2 : y // 2 * 2 + 2, x // 2 * 2 : x // 2 * 2 + 2].ravel())
        if heat[0, 0, y, x] < block[-2]:
            continue
        height, width = np.exp(size[0, :, y, x]) * 4
        top, left = (np.array([y, x]) + offset[0, :, y, x] + 0.5) * 4 - np.array([height, width]) / 2
        marks = points[0, :, y, x].reshape(5, 2) * [height, width] + [top, left]
        rows.append([heat[0, 0, y, x], left, top, left + width, top + height, *marks[:, ::-1].ravel()])
    return np.array(rows)


def scrfd_faces(path, rgb: np.ndarray, threshold: float) -> np.ndarray:
    """Decode SCRFD's nine outputs at all three strides."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    blob = (rgb.transpose(2, 0, 1)[None] - np.float32(127.5)) / 128
    outputs = session.run(None, {session.get_inputs()[0].name: blob})
    rows = []
    for level, stride in enumerate((8, 16, 32)):
        scores, boxes, points = outputs[level], outputs[3 + level] * stride, outputs[6 + level] * stride
        cells = [(x * stride, y * stride) for y in range(len(rgb) // stride) for x in range(rgb.shape[1] // stride)]
        anchors = np.repeat(cells, 2, 0)
        assert scores.shape == (len(anchors), 1)
        boxes = np.concatenate([anchors - boxes[:, :2], anchors + boxes[:, 2:]], 1)
        points = (anchors[:, None] + points.reshape(-1, 5, 2)).reshape(-1, 10)
        rows.append(np.concatenate([scores, boxes, points], 1)[scores[:, 0] >= threshold])
    return np.concatenate(rows)


@pytest.mark.parametrize("size", [(320, 256), (640, 640)])
def test_scores_boxes_and_points_match_centerface(size, converted, centerface_file, group):
    rgb = np.asarray(Image.fromarray(group.pixels).resize(size))
    ours, theirs = scrfd_faces(converted, rgb, 0.2), centerface_faces(centerface_file, rgb, 0.2)
    assert len(theirs) >= 6
    assert ours.shape == theirs.shape
    ours, theirs = (faces[np.lexsort(faces.T[1::-1])] for faces in (ours, theirs))
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], atol=1e-4)
    np.testing.assert_allclose(ours[:, 1:], theirs[:, 1:], atol=0.05)


def test_stand_in_recognition_is_determined_by_its_seed(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    face = np.random.default_rng(0).standard_normal((2, 3, 112, 112), dtype=np.float32)

    def embed(seed: int) -> np.ndarray:
        stand_in_arcface(tmp_path / "arc.onnx", seed)
        session = onnxruntime.InferenceSession(str(tmp_path / "arc.onnx"), providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: face})[0]

    assert embed(0).shape == (2, 512)
    np.testing.assert_array_equal(embed(0), embed(0))
    assert not np.allclose(embed(0), embed(1))
    assert not np.allclose(embed(0)[0], embed(0)[1])
