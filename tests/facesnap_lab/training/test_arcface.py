"""The torch ArcFace compared with onnxruntime, and the alignment compared with insightface's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.training.arcface import ArcFace, align, load_arcface
from tests.support import real_models
from tests.support.stand_in_pack import stand_in_arcface

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def faces(count: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 112, 112, 3), dtype=np.uint8)


def run_insightface(path, images: np.ndarray) -> np.ndarray:
    """Run the model with insightface's own class, which takes BGR."""
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX

    model = ArcFaceONNX(str(path), onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]))
    return np.concatenate([model.get_feat(np.ascontiguousarray(face[..., ::-1])) for face in images])


def run_torch(path, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return load_arcface(path)(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).numpy()


def assert_equal(path, tolerance=1e-4):
    actual, expected = run_torch(path, faces()), run_insightface(path, faces())
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def test_equals_onnxruntime_on_the_stand_in(tmp_path):
    stand_in_arcface(tmp_path / "w600k.onnx", seed=3)
    assert_equal(tmp_path / "w600k.onnx")


def test_equals_onnxruntime_on_a_real_network():
    try:
        path = real_models.face_embedding()
    except real_models.Unavailable as reason:
        pytest.skip(f"no face embedding model: {reason}")
    assert_equal(path)


# every operation used by insightface's recognition models, in the forms of old and new ONNX versions
NETWORKS = {
    "mxnet": (
        "13",
        """
        _minus0 = Sub (x, mean)
        _mulscalar0 = Mul (_minus0, scale)
        c = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (_mulscalar0, conv)
        b = BatchNormalization <epsilon = 0.00002> (c, g, g, h, g)
        p = PRelu (b, slope)
        m = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [0, 0, 1, 1]> (p)
        d = Dropout (m)
        f = Flatten (d)
        y = Gemm <transB = 1> (f, fc, fcb)
        """,
    ),
    "mobile": (
        "13",
        """
        c = Conv <auto_pad = "SAME_UPPER", strides = [4, 4], group = 1> (x, conv)
        r = Relu (c)
        s = Sigmoid (r)
        hs = HardSigmoid (r)
        l = LeakyRelu <alpha = 0.2> (c)
        t = Mul (s, l)
        u = Add (t, hs)
        lo = Constant <value_float = -1.0> ()
        hi = Constant <value_float = 6.0> ()
        k = Clip (u, lo, hi)
        zeros = Constant <value_ints = [0, 0, 1, 0, 0, 0, 0, 1]> ()
        q = Pad (k, zeros)
        a = AveragePool <kernel_shape = [7, 7], strides = [7, 7], pads = [0, 0, 1, 1]> (q)
        gap = GlobalAveragePool (q)
        am = ReduceMean <axes = [2, 3], keepdims = 1> (a)
        w = Concat <axis = 1> (am, gap)
        tr = Transpose <perm = [0, 2, 3, 1]> (w)
        shape = Shape (tr)
        zero = Constant <value_ints = [0]> ()
        n = Gather <axis = 0> (shape, zero)
        minus = Constant <value_ints = [-1]> ()
        to = Concat <axis = 0> (n, minus)
        flat = Reshape (tr, to)
        two = Constant <value_ints = [2]> ()
        un = Unsqueeze (flat, two)
        sq = Squeeze (un, two)
        one = Constant <value_ints = [1]> ()
        five = Constant <value_ints = [5]> ()
        cut = Slice (sq, one, five, one)
        proj = MatMul (cut, small)
        norm = ReduceL2 <axes = [1], keepdims = 1> (proj)
        y = Div (proj, norm)
        """,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_onnxruntime_for_every_operation(name, tmp_path):
    import onnx.parser

    opset, body = NETWORKS[name]
    network = onnx.parser.parse_model(
        f'<ir_version: 7, opset_import: ["" : {opset}]> net (float[N, 3, 112, 112] x) => (float[N, E] y) {{ {body} }}'
    )
    if name == "mxnet":  # insightface checks the names of the nodes
        network.graph.node[0].name, network.graph.node[1].name = "_minus0", "_mulscalar0"
    rng = np.random.default_rng(0)
    numbers = {
        "mean": np.full((1,), 127.5),
        "scale": np.full((1,), 0.0078125),
        "conv": rng.standard_normal((4, 3, 3, 3)) / 50,
        "g": rng.uniform(0.5, 1, 4),
        "h": rng.standard_normal(4),
        "slope": rng.uniform(0, 1, (4, 1, 1)),
        "fc": rng.standard_normal((8, 4 * 28 * 28)) / 50,
        "fcb": rng.standard_normal(8),
        "small": rng.standard_normal((4, 8)),
    }
    used = {item for node in network.graph.node for item in node.input}
    for key, value in numbers.items():
        if key in used:
            network.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), key))
    path = tmp_path / f"{name}.onnx"
    onnx.save(network, str(path))
    assert_equal(path)


def test_model_with_fixed_batch_size_one_accepts_larger_batches(tmp_path):
    stand_in_arcface(tmp_path / "many.onnx", seed=3)
    network = onnx.load(str(tmp_path / "many.onnx"))
    network.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(network, str(tmp_path / "one.onnx"))
    one, many = (run_torch(tmp_path / f"{name}.onnx", faces()) for name in ("one", "many"))
    np.testing.assert_allclose(one, many, atol=1e-5)  # some processors multiply smaller matrices in another order


def test_error_names_the_unsupported_operation_and_the_file(tmp_path):
    import onnx.parser

    text = '<ir_version: 7, opset_import: ["" : 13]> net (float[N, 3, 112, 112] x) => (float[N, E] y) { y = Erf (x) }'
    onnx.save(onnx.parser.parse_model(text), str(tmp_path / "odd.onnx"))
    with pytest.raises(FaceSnapError, match=r"odd\.onnx uses the operation Erf"):
        load_arcface(tmp_path)


def test_folder_without_recognition_model_is_rejected(tmp_path):
    with pytest.raises(FaceSnapError, match="no face recognition model"):
        load_arcface(tmp_path)
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(FaceSnapError, match=r"broken\.onnx is not a valid ONNX file"):
        load_arcface(tmp_path)


def test_arcface_is_frozen_but_passes_gradients_to_its_input(tmp_path):
    stand_in_arcface(tmp_path / "net.onnx", seed=0)
    network = ArcFace(tmp_path / "net.onnx")
    assert not list(network.parameters())
    image = torch.rand(1, 3, 112, 112, requires_grad=True)
    network(image).sum().backward()
    assert (image.grad != 0).all()


@given(
    seed=st.integers(0, 1000), angle=st.floats(-60, 60), scale=st.floats(0.4, 3), size=st.sampled_from([112, 128, 224])
)
@settings(max_examples=20, deadline=None)
def test_align_equals_norm_crop(seed, angle, scale, size):
    face_align = pytest.importorskip("insightface.utils.face_align")
    rng = np.random.default_rng(seed)
    small = torch.from_numpy(rng.uniform(0, 255, (1, 3, 12, 12)).astype(np.float32))
    image = torch.nn.functional.interpolate(small, (150, 190), mode="bicubic").clamp(0, 255).round()
    radians = np.deg2rad(angle)
    matrix = scale * np.array([[np.cos(radians), np.sin(radians)], [-np.sin(radians), np.cos(radians)]])
    points = (face_align.arcface_dst - 56) @ matrix + rng.uniform(60, 110, 2) + rng.normal(0, 3, (5, 2))
    expected = face_align.norm_crop(image[0].permute(1, 2, 0).numpy().astype(np.uint8), points.astype(np.float32), size)
    actual = align(image, torch.from_numpy(points[None]), size)[0].permute(1, 2, 0).numpy()
    difference = np.abs(actual - expected)
    assert np.median(difference) < 1  # insightface rounds pixel values to integers, and positions to 1/32 pixel
    assert np.quantile(difference, 0.98) < 4
