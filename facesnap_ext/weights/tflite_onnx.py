"""Convert a TensorFlow Lite graph of convolutions to ONNX (`to_onnx`), with onnx and without TensorFlow.

TensorFlow Lite stores images as [N, H, W, C], and ONNX's operations take [N, C, H, W]. Inside the converted graph, all
tensors with four dimensions have ONNX's order; its inputs and outputs keep TensorFlow's. Weights in half precision stay
in half precision and are cast when the file is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from facesnap_ext.weights.tflite import MAX_ELEMENTS, Operation, TfliteGraph

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 13, 8  # understood by onnxruntime since 1.8 (2021)
TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
SAME, VALID = 0, 1  # TensorFlow's kinds of padding
NONE, RELU, RELU6 = 0, 1, 3  # fused activations
MAX_STORED = 2**28  # maximum size of all constants in the ONNX file, in bytes
MAX_WINDOW = 256  # maximum size, stride and dilation of a window, in pixels

Shape = tuple[int, ...]


def to_onnx(graph: TfliteGraph) -> onnx.ModelProto:
    """Convert a graph. Its inputs are named "input", "input1" …, and its outputs "output", "output1" ….

    Raises:
        ValueError: the graph uses an operation that is not supported, or is inconsistent.
    """
    return _Converter(graph).model()


class _Converter:
    """The state of one conversion.

    Attributes:
        shapes: [N, H, W, C] or other shape of each tensor that has been computed, by its index.
        names: their names in the ONNX graph.
        constants: the values of tensors that are known, by index; those in half precision count as single precision.
    """

    def __init__(self, graph: TfliteGraph) -> None:
        self.graph = graph
        self.shapes: dict[int, Shape] = {}
        self.names: dict[int, str] = {}
        self.constants = {i: t.constant for i, t in enumerate(graph.tensors) if t.constant is not None}
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.stored = 0  # bytes

    def model(self) -> onnx.ModelProto:
        from onnx import TensorProto, helper

        inputs, outputs = [], []
        for number, index in enumerate(self.graph.inputs):
            name, shape = _numbered("input", number), self._shape_of_input(index)
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
            self.set(index, self.transposed(name, TO_NCHW) if len(shape) == 4 else name, shape)
        for operation in self.graph.operations:
            convert = _CONVERSIONS.get(operation.name)
            if convert is None:
                raise ValueError(f"it uses the operation {operation.name}, which FaceSnap cannot convert")
            if len(operation.outputs) != 1:
                raise ValueError(f"an operation {operation.name} has {len(operation.outputs)} outputs")
            convert(self, operation)
        for number, index in enumerate(self.graph.outputs):
            name, shape = _numbered("output", number), self.shape(index)
            last = self.transposed(self.names[index], TO_NHWC) if len(shape) == 4 else self.names[index]
            self.nodes.append(helper.make_node("Identity", [last], [name]))
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        converted = helper.make_graph(self.nodes, "converted", inputs, outputs, [*self.initializers.values()])
        return helper.make_model(converted, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    def _shape_of_input(self, index: int) -> Shape:
        tensor = self.graph.tensors[index]
        if tensor.dtype != np.float32 or index in self.constants:
            raise ValueError("an input is not a tensor of numbers in single precision")
        return tensor.shape

    def set(self, index: int, name: str, shape: Shape) -> None:
        """Record the name and shape of a computed tensor."""
        if index in self.shapes or index in self.constants:
            raise ValueError("a tensor is computed twice")
        if shape != self.graph.tensors[index].shape or math.prod(shape) > MAX_ELEMENTS:
            raise ValueError("a tensor's shape does not follow from the operation that computes it")
        self.names[index], self.shapes[index] = name, shape

    def shape(self, index: int) -> Shape:
        if index not in self.shapes:
            raise ValueError("a tensor is used before it is computed")
        return self.shapes[index]

    def image(self, index: int) -> Shape:
        """Return the shape [N, H, W, C] of a computed image."""
        shape = self.shape(index)
        if len(shape) != 4:
            raise ValueError("an operation on images is applied to a tensor that is not one")
        return shape

    def constant(self, index: int) -> np.ndarray:
        if index not in self.constants:
            raise ValueError("weights are computed instead of stored")
        return self.constants[index]

    def node(self, operation: str, inputs: list[str], **attributes: Any) -> str:
        """Add an ONNX operation and return the name of its output."""
        from onnx import helper

        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, inputs, [name], **attributes))
        return name

    def store(self, values: np.ndarray) -> str:
        """Store a constant, and return its name in single precision or, for integers, as int64."""
        from onnx import TensorProto, numpy_helper

        name = f"c{len(self.initializers)}"
        values = values.astype(np.int64) if values.dtype.kind == "i" else values
        self.stored += values.nbytes
        if self.stored > MAX_STORED:
            raise ValueError("it uses the same weights too often")
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return self.node("Cast", [name], to=TensorProto.FLOAT) if values.dtype == np.float16 else name

    def transposed(self, name: str, order: tuple[int, ...]) -> str:
        return self.node("Transpose", [name], perm=order)

    def finish(self, operation: Operation, name: str, shape: Shape) -> None:
        """Apply the fused activation, and record the output."""
        activation = operation.options.get("activation", NONE)
        if activation == RELU:
            name = self.node("Relu", [name])
        elif activation == RELU6:
            name = self.node("Clip", [name, self.store(np.array(0, np.float32)), self.store(np.array(6, np.float32))])
        elif activation != NONE:
            raise ValueError(f"{operation.name} uses the activation {activation}, which FaceSnap cannot convert")
        self.set(operation.outputs[0], name, shape)


def _numbered(name: str, number: int) -> str:
    return f"{name}{number or ''}"


def _arguments(operation: Operation, least: int, most: int) -> tuple[int, ...]:
    """Return an operation's inputs, padded with -1 to `most`."""
    inputs = operation.inputs
    if not least <= len(inputs) <= most or min(inputs[:least]) < 0:
        raise ValueError(f"an operation {operation.name} has {len(inputs)} inputs")
    return (*inputs, *[-1] * (most - len(inputs)))


def _windows(operation: Operation, height: int, width: int, kernel: tuple[int, int]) -> tuple[Shape, dict[str, Any]]:
    """Return height and width of the result of a convolution or pooling, and ONNX's attributes for it."""
    options = operation.options
    strides = (options["stride_h"], options["stride_w"])
    dilations = (options.get("dilation_h", 1), options.get("dilation_w", 1))
    if not all(1 <= size <= MAX_WINDOW for size in (*kernel, *strides, *dilations)):
        raise ValueError(f"a window of {operation.name} has an invalid size")
    sizes, before, after = [], [], []
    for length, side, stride, dilation in zip((height, width), kernel, strides, dilations):
        reach = (side - 1) * dilation + 1
        if options["padding"] == SAME:
            sizes.append(-(-length // stride))
            padding = max((sizes[-1] - 1) * stride + reach - length, 0)
        elif options["padding"] == VALID and reach <= length:
            sizes.append((length - reach) // stride + 1)
            padding = 0
        else:
            raise ValueError(f"the padding of {operation.name} is invalid")
        before.append(padding // 2)
        after.append(padding - padding // 2)
    attributes = {"kernel_shape": kernel, "strides": strides, "pads": [*before, *after]}
    return tuple(sizes), attributes if dilations == (1, 1) else {**attributes, "dilations": dilations}


def _convolution(to: _Converter, operation: Operation) -> None:
    source, weights, bias = _arguments(operation, 2, 3)
    batch, height, width, channels = to.image(source)
    kernel = to.constant(weights)
    if kernel.ndim != 4 or kernel.dtype.kind != "f":
        raise ValueError("the weights of a convolution have the wrong shape or type")
    if operation.name == "DEPTHWISE_CONV_2D":  # [1, H, W, outputs], grouped by input channel
        kernel, groups = kernel.transpose(3, 0, 1, 2), channels
        fits = kernel.shape[1] == 1 and len(kernel) % channels == 0
    else:  # [outputs, H, W, inputs]
        kernel, groups = kernel.transpose(0, 3, 1, 2), 1
        fits = kernel.shape[1] == channels
    if not fits:
        raise ValueError("the weights of a convolution do not match its input")
    inputs = [to.names[source], to.store(kernel)]
    if bias >= 0:
        if to.constant(bias).shape != kernel.shape[:1] or to.constant(bias).dtype.kind != "f":
            raise ValueError("the bias of a convolution does not match its weights")
        inputs.append(to.store(to.constant(bias)))
    sizes, attributes = _windows(operation, height, width, (kernel.shape[2], kernel.shape[3]))
    name = to.node("Conv", inputs, group=groups, **attributes)
    to.finish(operation, name, (batch, *sizes, len(kernel)))


def _max_pool(to: _Converter, operation: Operation) -> None:
    (source,) = _arguments(operation, 1, 1)
    batch, height, width, channels = to.image(source)
    window = (operation.options["filter_h"], operation.options["filter_w"])
    sizes, attributes = _windows(operation, height, width, window)
    to.finish(operation, to.node("MaxPool", [to.names[source]], **attributes), (batch, *sizes, channels))


def _operand(to: _Converter, index: int, rank: int) -> tuple[str, Shape]:
    """Return an operand of a calculation on tensors with `rank` dimensions, and its shape."""
    if index not in to.constants:
        if len(to.shape(index)) != rank:
            raise ValueError("an operation combines tensors with different numbers of dimensions")
        return to.names[index], to.shape(index)
    values = to.constant(index)
    if values.ndim > rank or values.dtype.kind != "f":
        raise ValueError("a constant has the wrong shape or type")
    values = values.reshape((1,) * (rank - values.ndim) + values.shape)
    return to.store(values.transpose(TO_NCHW) if rank == 4 else values), values.shape


def _broadcast(one: Shape, other: Shape) -> Shape:
    try:
        return np.broadcast_shapes(one, other)
    except ValueError:
        raise ValueError("an operation combines tensors whose shapes do not match") from None


def _add(to: _Converter, operation: Operation) -> None:
    both = _arguments(operation, 2, 2)
    rank = max((len(to.shapes[index]) for index in both if index in to.shapes), default=0)
    (one, shape), (other, other_shape) = (_operand(to, index, rank) for index in both)
    to.finish(operation, to.node("Add", [one, other]), _broadcast(shape, other_shape))


def _prelu(to: _Converter, operation: Operation) -> None:
    source, slope = _arguments(operation, 2, 2)
    shape = to.shape(source)
    to.constant(slope)
    name, slope_shape = _operand(to, slope, len(shape))
    to.finish(operation, to.node("PRelu", [to.names[source], name]), _broadcast(shape, slope_shape))


def _pad(to: _Converter, operation: Operation) -> None:
    source, amounts = _arguments(operation, 2, 2)
    shape, pads = to.shape(source), to.constant(amounts)
    if pads.dtype.kind != "i" or pads.shape != (len(shape), 2) or pads.min(initial=0) < 0:
        raise ValueError("an operation PAD has invalid amounts")
    padded = tuple([size + int(before) + int(after) for size, (before, after) in zip(shape, pads)])
    pads = pads[list(TO_NCHW)] if len(shape) == 4 else pads
    name = to.node("Pad", [to.names[source], to.store(pads.T.ravel())], mode="constant")
    to.finish(operation, name, padded)


def _reshape(to: _Converter, operation: Operation) -> None:
    source, _ = _arguments(operation, 1, 2)
    shape, target = to.shape(source), to.graph.tensors[operation.outputs[0]].shape
    if math.prod(shape) != math.prod(target):
        raise ValueError("an operation RESHAPE changes the number of values")
    name = to.transposed(to.names[source], TO_NHWC) if len(shape) == 4 else to.names[source]
    name = to.node("Reshape", [name, to.store(np.array(target, np.int64))])
    to.finish(operation, to.transposed(name, TO_NCHW) if len(target) == 4 else name, target)


def _sigmoid(to: _Converter, operation: Operation) -> None:
    (source,) = _arguments(operation, 1, 1)
    shape = to.shape(source)
    to.finish(operation, to.node("Sigmoid", [to.names[source]]), shape)


def _dequantize(to: _Converter, operation: Operation) -> None:
    """Half precision is the only kind of quantisation that is supported."""
    (source,) = _arguments(operation, 1, 1)
    target = operation.outputs[0]
    values = to.constants.get(source)
    if values is None or values.dtype != np.float16 or values.shape != to.graph.tensors[target].shape:
        raise ValueError("it is quantised other than to half precision, which FaceSnap cannot convert")
    if target in to.shapes or target in to.constants:
        raise ValueError("a tensor is computed twice")
    to.constants[target] = values


_CONVERSIONS: dict[str, Callable[[_Converter, Operation], None]] = {
    "ADD": _add,
    "CONV_2D": _convolution,
    "DEPTHWISE_CONV_2D": _convolution,
    "DEQUANTIZE": _dequantize,
    "LOGISTIC": _sigmoid,
    "MAX_POOL_2D": _max_pool,
    "PAD": _pad,
    "PRELU": _prelu,
    "RESHAPE": _reshape,
}
