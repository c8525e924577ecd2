"""ONNX networks for fuzzing: small ones that work as a detector, a recognition model and a model of 68 landmarks, and
others whose graphs or outputs are wrong."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx.helper as make
import onnx.numpy_helper
import onnx.parser
from hypothesis import strategies as st

from facesnap_ext.weights.onnx_graph import UNBOUNDED
from tests.fuzz.mutations import NUMBERS

HEADER = '<ir_version: 7, opset_import: ["" : 13]>\n'
STRIDES = (8, 16, 32)
WIDTHS = {"s": 1, "b": 4, "k": 10}  # scores, boxes and keypoints
SIZES = (0, 1, 2, 3, 4, 5, 9, 10, 16, 68, 96, 112, 128, 192, 204, 212, 256, 512, 640, 3309)
INPUTS = {"detector": (1, 3, 0, 0), "recognition": (0, 3, 112, 112), "landmarks68": (0, 3, 192, 192)}
OUTPUTS = {  # by role: the shapes that insightface expects for an input of 640 × 640 or of the role's own size
    "detector": [(2 * (640 // stride) ** 2, width) for width in WIDTHS.values() for stride in STRIDES],
    "recognition": [(1, 512)],
    "landmarks68": [(1, 3309)],
}


@cache
def valid(role: str) -> bytes:
    """A network of this role that works. The detector finds a face in each bright square."""
    weights = {}
    if role == "recognition":
        text = "(float[N, 3, 112, 112] face) => (float[N, 512] embedding) {"
        text += "mean = ReduceMean <axes = [2, 3], keepdims = 0> (face)\n embedding = MatMul (mean, rows) }"
        weights["rows"] = np.linspace(-1, 1, 3 * 512, dtype=np.float32).reshape(3, 512)
    elif role == "landmarks68":
        text = "(float[N, 3, 192, 192] face) => (float[N, 3309] points) {"
        text += "mean = ReduceMean <axes = [2, 3], keepdims = 0> (face)\n points = MatMul (mean, rows) }"
        weights["rows"] = np.linspace(-1, 1, 3 * 3309, dtype=np.float32).reshape(3, 3309)
    else:
        outputs = ", ".join(f"float[n, {WIDTHS[kind]}] {kind}{stride}" for kind in WIDTHS for stride in STRIDES)
        text = f"(float[1, 3, height, width] image) => ({outputs}) {{ shape = Constant <value_ints = [-1, 1]> ()\n"
        text += "grey = ReduceMean <axes = [1]> (image)\n"
        for stride in STRIDES:
            pool = f"kernel_shape = [{stride}, {stride}], strides = [{stride}, {stride}]"
            text += f"cells{stride} = AveragePool <{pool}> (grey)\n"
            text += f"both{stride} = Concat <axis = 3> (cells{stride}, cells{stride})\n"
            text += f"s{stride} = Reshape (both{stride}, shape)\n"
            text += "".join(f"{kind}{stride} = MatMul (s{stride}, row{kind})\n" for kind in "bk")
        text += "}"
        points = np.array([-1, -1, 1, -1, 0, 0, -1, 1, 1, 1], np.float32)
        weights |= {"rowb": np.full((1, 4), 3, np.float32), "rowk": points[None]}
    network = onnx.parser.parse_model(f"{HEADER}net {text}")
    network.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    return network.SerializeToString()


@st.composite
def odd_network(draw: st.DrawFn, role: str) -> bytes:
    """A network that looks like one of this role, but whose sizes, outputs or operations are not all as expected.

    It returns constants of the shapes that are drawn, whatever its graph declares.
    """
    declared_input = _odd_shape(draw, INPUTS[role])
    declared = [_odd_shape(draw, (0, *shape[1:])) for shape in OUTPUTS[role]]
    actual = [_odd_shape(draw, shape) for shape in OUTPUTS[role]]
    if not draw(st.integers(0, 3)):
        count = draw(st.integers(0, 16))
        declared, actual = (declared * 16)[:count], (actual * 16)[:count]
    nodes, outputs = [], []
    for number, (stated, shape) in enumerate(zip(declared, actual)):
        value = draw(st.sampled_from([0.0, 0.6, 3.0, -50.0, np.nan, np.inf, 3e38]))
        size = make.make_tensor(f"n{number}", onnx.TensorProto.INT64, [len(shape)], _limited(shape))
        fill = make.make_tensor("value", onnx.TensorProto.FLOAT, [1], [value])
        nodes.append(make.make_node("Constant", [], [f"n{number}"], value=size))
        nodes.append(make.make_node("ConstantOfShape", [f"n{number}"], [f"out{number}"], value=fill))
        outputs.append(_value(f"out{number}", stated, draw))
    nodes += draw(st.lists(st.sampled_from([*UNBOUNDED, "Relu", "NotAnOperation"]).map(_node), max_size=1))
    inputs = [
        _value(f"in{number}", declared_input, draw) for number in range(draw(st.sampled_from((1, 1, 1, 1, 0, 2))))
    ]
    graph = make.make_graph(nodes, "net", inputs, outputs)
    opset = draw(st.sampled_from((13, 13, 13, 13, 1, 9, 99)))
    content: bytes = make.make_model(
        graph, opset_imports=[make.make_opsetid("", opset)], ir_version=7
    ).SerializeToString()
    return content


def _limited(shape: tuple[int, ...]) -> list[int]:
    """A shape with at most 2²⁰ elements."""
    sizes: list[int] = []
    for size in shape:
        sizes.append(min(size, 2**20 // max(1, math.prod(sizes))))
    return sizes


def _odd_shape(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape itself in half of the cases, otherwise with another size or another number of sizes."""
    if draw(st.booleans()):
        return shape
    sizes = [draw(st.sampled_from([size] * 4 + [*SIZES, *(n for n in NUMBERS if n < 2**63)])) for size in shape]
    return (*sizes, 1, 1)[: draw(st.sampled_from([len(sizes)] * 8 + [0, 1, 2, 3, 4]))]


def _value(name: str, shape: tuple[int, ...], draw: st.DrawFn) -> Any:
    kind = draw(st.sampled_from([onnx.TensorProto.FLOAT] * 8 + [onnx.TensorProto.INT64, onnx.TensorProto.STRING]))
    return make.make_tensor_value_info(name, kind, [size or "n" for size in shape])


def _node(operation: str) -> Any:
    """A node of an operation; one that runs another graph gets one."""
    value = make.make_tensor_value_info("v", onnx.TensorProto.FLOAT, [1])
    body = make.make_graph([make.make_node("Identity", ["in0"], ["v"])], "body", [], [value])
    names = {"If": ("then_branch", "else_branch"), **dict.fromkeys(UNBOUNDED[1:], ("body",))}.get(operation, ())
    return make.make_node(operation, ["in0"], ["more"], **dict.fromkeys(names, body))
