"""TensorFlow Lite files: the converted graph computes what numpy does, and damaged files are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("flatbuffers", reason="onnxruntime installs it")

import contextlib

from facesnap_ext.weights.tflite import read_tflite
from facesnap_ext.weights.tflite_onnx import to_onnx
from tests.support.tflite_files import SAME, VALID, TfliteFile, tiny_landmark_detector


def run(file: TfliteFile | bytes, *images: np.ndarray) -> list[np.ndarray]:
    content = file if isinstance(file, bytes) else file.content()
    network = to_onnx(read_tflite(content)).SerializeToString()
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    return session.run(None, {one.name: image for one, image in zip(session.get_inputs(), images)})


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one_operation(
    name: str, image: np.ndarray, others: list[Callable[[TfliteFile], int]], shape: tuple[int, ...], **options: int
) -> np.ndarray:
    file = TfliteFile()
    source = file.input(image.shape)
    file.outputs = [file.add(name, [source, *(other(file) for other in others)], shape, **options)]
    return run(file, image)[0]


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    """Height and width of an image, and a window on it that fits."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    least = [(side - 1) * spread + 1 for side, spread in zip(kernel, dilation)]
    return {
        "size": tuple(draw(st.integers(side, side + 6)) for side in least),
        "kernel": kernel,
        "dilation": dilation,
        "stride": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "padding": draw(st.sampled_from([SAME, VALID])),
    }


def views(image: np.ndarray, window: dict[str, Any], outside: float) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the pixels in every position of a window, [kernel height, kernel width, H, W, C], by the definition in
    TensorFlow's documentation."""
    pads, sizes = [], []
    for length, side, stride, spread in zip(window["size"], window["kernel"], window["stride"], window["dilation"]):
        reach = (side - 1) * spread + 1
        if window["padding"] == SAME:
            rest = length % stride or stride
            padding = max(reach - rest, 0)
        else:
            padding = 0
        pads.append((padding // 2, padding - padding // 2))
        sizes.append((length + padding - reach) // stride + 1)
    padded = np.pad(image[0], (*pads, (0, 0)), constant_values=outside)
    (down, across), (tall, wide) = window["stride"], sizes
    result = [
        [
            padded[y * window["dilation"][0] :, x * window["dilation"][1] :][::down, ::across][:tall, :wide]
            for x in range(window["kernel"][1])
        ]
        for y in range(window["kernel"][0])
    ]
    return np.array(result), (tall, wide)


def options_of(window: dict[str, Any], dilated: bool = True) -> dict[str, int]:
    options = {"padding": window["padding"], "stride_h": window["stride"][0], "stride_w": window["stride"][1]}
    if dilated:
        options |= {"dilation_h": window["dilation"][0], "dilation_w": window["dilation"][1]}
    return options


@given(windows(), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.sampled_from([0, 1, 3]))
def test_convolution(window, channels, filters, half, activation):
    image = normal((1, *window["size"], channels))
    weights = normal((filters, *window["kernel"], channels), 1).astype(np.float16).astype(np.float32)
    bias = normal((filters,), 2)
    seen, size = views(image, window, 0)
    expected = np.einsum("ykhwc,fykc->hwf", seen, weights) + bias
    expected = {0: expected, 1: np.maximum(expected, 0), 3: np.clip(expected, 0, 6)}[activation]
    store = (lambda file: file.half(weights)) if half else (lambda file: file.constant(weights))
    shape, options = (1, *size, filters), options_of(window)
    result = one_operation(
        "CONV_2D", image, [store, lambda file: file.constant(bias)], shape, activation=activation, **options
    )
    np.testing.assert_allclose(result[0], expected, atol=1e-4)


@given(windows(), st.integers(1, 3), st.integers(1, 2))
def test_depthwise_convolution(window, channels, multiplier):
    image = normal((1, *window["size"], channels))
    weights = normal((1, *window["kernel"], channels * multiplier), 1)
    seen, size = views(image, window, 0)
    expected = np.einsum("ykhwc,ykcm->hwcm", seen, weights[0].reshape(*window["kernel"], channels, multiplier))
    result = one_operation(
        "DEPTHWISE_CONV_2D",
        image,
        [lambda file: file.constant(weights)],
        (1, *size, channels * multiplier),
        multiplier=multiplier,
        **options_of(window),
    )
    np.testing.assert_allclose(result[0], expected.reshape(*size, -1), atol=1e-4)


@given(windows(), st.integers(1, 3))
def test_max_pool(window, channels):
    window["dilation"] = (1, 1)
    image = normal((1, *window["size"], channels)) - 5  # padding must not count
    seen, size = views(image, window, -np.inf)
    options = {"filter_h": window["kernel"][0], "filter_w": window["kernel"][1], **options_of(window, dilated=False)}
    result = one_operation("MAX_POOL_2D", image, [], (1, *size, channels), **options)
    np.testing.assert_allclose(result[0], seen.max((0, 1)))


sizes = st.tuples(st.just(1), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@given(sizes)
def test_prelu_has_a_slope_per_channel(shape):
    image, slope = normal(shape), normal((1, 1, shape[3]), 1)
    result = one_operation("PRELU", image, [lambda file: file.constant(slope)], shape)
    np.testing.assert_allclose(result, np.where(image < 0, image * slope, image), atol=1e-6)


@given(sizes, st.integers(1, 4))
def test_addition_of_a_constant_counts_dimensions_from_the_last(shape, rank):
    image, other = normal(shape), normal(shape[4 - rank :], 1)
    result = one_operation("ADD", image, [lambda file: file.constant(other)], shape)
    np.testing.assert_allclose(result, image + other, atol=1e-6)


@given(sizes, st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=4, max_size=4))
def test_padding_with_zeros(shape, amounts):
    image, pads = normal(shape), np.array(amounts, np.int32)
    expected = np.pad(image, pads)
    result = one_operation("PAD", image, [lambda file: file.constant(pads)], expected.shape)
    np.testing.assert_array_equal(result, expected)


@given(sizes, st.data())
def test_reshaping_keeps_the_order_of_the_values(shape, data):
    count = int(np.prod(shape))
    target = data.draw(st.sampled_from([(count,), (1, count), (1, shape[2], shape[1], shape[3]), (1, 1, count, 1)]))
    image = normal(shape)
    wanted = np.array(target, np.int32)
    result = one_operation("RESHAPE", image, [lambda file: file.constant(wanted)], target)
    np.testing.assert_array_equal(result, image.reshape(target))


def test_a_branching_graph_with_two_outputs():
    file = TfliteFile()
    image = file.input((1, 4, 6, 2))
    half = file.add("LOGISTIC", [image], (1, 4, 6, 2))
    both = file.add("ADD", [image, half], (1, 4, 6, 2))
    flat = file.add("RESHAPE", [both], (1, 48))
    file.outputs = [flat, half]
    pixels = normal((1, 4, 6, 2))
    sigmoid = 1 / (1 + np.exp(-pixels))
    results = run(file, pixels)
    np.testing.assert_allclose(results[0], (pixels + sigmoid).reshape(1, 48), atol=1e-6)
    np.testing.assert_allclose(results[1], sigmoid, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "reported"),
    [("TANH", "TANH"), ("CUSTOM", "Landmarks2TransformMatrix"), ("GELU", "number 150")],
)
def test_other_operations_are_refused_by_name(name, reported):
    file = TfliteFile()
    file.outputs = [file.add(name, [file.input((1, 4))], (1, 4))]
    with pytest.raises(ValueError, match=f"it uses the operation {reported}, which FaceSnap cannot convert"):
        run(file)


def damaged_graphs() -> dict[str, TfliteFile]:
    """Graphs that are well-formed files, but inconsistent."""
    window = {"padding": VALID, "stride_w": 1, "stride_h": 1}
    files = {
        name: TfliteFile() for name in ("shape", "early", "twice", "kernel", "stride", "activation", "size", "int8")
    }
    images = {name: file.input((1, 4, 4, 2)) for name, file in files.items()}
    kernel = normal((3, 2, 2, 2))
    file = files["shape"]
    file.outputs = [file.add("LOGISTIC", [images["shape"]], (1, 4, 4, 3))]
    file = files["early"]
    file.outputs = [file.add("LOGISTIC", [file.tensor((1, 4))], (1, 4))]
    file = files["twice"]
    file.outputs = [file.add("LOGISTIC", [images["twice"]], (1, 4, 4, 2))]
    file.operations *= 2
    for name, changed in {
        "kernel": (normal((3, 2, 2, 5)), window),
        "stride": (kernel, {**window, "stride_w": -1}),
        "activation": (kernel, {**window, "activation": 4}),
        "size": (normal((3, 9, 2, 2)), window),
    }.items():
        file, (weights, options) = files[name], changed
        file.outputs = [file.add("CONV_2D", [images[name], file.constant(weights)], (1, 3, 3, 3), **options)]
    file = files["int8"]
    weights = file.add("DEQUANTIZE", [file.tensor((3, 2, 2, 2), "int8", bytes(24))], (3, 2, 2, 2))
    file.outputs = [file.add("CONV_2D", [images["int8"], weights], (1, 3, 3, 3), **window)]
    return files


@pytest.mark.parametrize(
    ("name", "reason"),
    {
        "shape": "a tensor's shape does not follow from the operation",
        "early": "a tensor is used before it is computed",
        "twice": "a tensor is computed twice",
        "kernel": "the weights of a convolution do not match its input",
        "stride": "a window of CONV_2D has an invalid size",
        "activation": "CONV_2D uses the activation 4",
        "size": "the padding of CONV_2D is invalid",
        "int8": "it is quantised other than to half precision",
    }.items(),
)
def test_inconsistent_graphs_are_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        run(damaged_graphs()[name])


def test_values_that_are_not_finite_are_refused():
    file = TfliteFile()
    image = file.input((1, 2))
    file.outputs = [file.add("ADD", [image, file.constant(np.float32([1, np.nan]))], (1, 2))]
    with pytest.raises(ValueError, match="not finite"):
        run(file)


def test_thousands_of_tensors_with_the_same_bytes_are_refused():
    file = TfliteFile()
    values = file.constant(normal((1000,)))
    total = file.input((1, 1000))
    for _ in range(3):
        total = file.add("ADD", [total, values], (1, 1000))
    file.outputs = [total]
    pixels = normal((1, 1000), 1)
    np.testing.assert_allclose(run(file, pixels)[0], pixels + 3 * normal((1000,)), atol=1e-5)
    file.copies = {values: 3000}
    with pytest.raises(ValueError, match="the same values too often"):
        run(file)


CONTENT = tiny_landmark_detector()[0]
SMALL = damaged_graphs()["activation"].content()


@given(st.data())
def test_damaged_files_are_refused_or_read(data):
    """Any change to a file either leaves a graph that can be converted, or raises a ValueError."""
    content = bytearray(data.draw(st.sampled_from([CONTENT, SMALL])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, len(content) - 4), st.integers(len(content) - 400, len(content) - 4)))
        value = data.draw(st.sampled_from([0, 1, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1]))
        width = data.draw(st.sampled_from([1, 2, 4]))
        content[at : at + width] = (value & (256**width - 1)).to_bytes(width, "little")
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    with contextlib.suppress(ValueError):
        to_onnx(read_tflite(bytes(content[:cut])))


@given(st.binary(max_size=64))
def test_other_files_are_refused(content):
    for start in (content, content[:4] + b"TFL3" + content[4:]):
        with pytest.raises(ValueError, match=r"^it (is|has) "):
            read_tflite(start)
