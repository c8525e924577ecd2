"""Read a TensorFlow Lite file: the tensors, constants and operations of its graph. Nothing is executed.

The file is a FlatBuffer (tensorflow/compiler/mlir/lite/schema/schema.fbs). A table begins with the distance to its
vtable, which lists where in the table each field is stored. Only the fields that are needed are visited, and every
position is checked, so a damaged or hostile file costs bounded time and memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"TFL3"  # at bytes 4 to 8
MAX_ITEMS = 8192  # maximum number of tensors and of operations; MediaPipe's landmark detector has 727 and 471
MAX_RANK = 5
MAX_ARGUMENTS = 64  # maximum number of inputs or outputs of a graph or an operation
MAX_SHARED = 2  # maximum size of all constants, relative to the file; several may share the same bytes
MAX_NAME = 64  # bytes of the name of a custom operation that are read
MAX_ELEMENTS = 2**24  # maximum number of elements of a tensor
TYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 2: np.dtype("<i4")}  # by TensorType

# names of the first operations in BuiltinOperator
OPERATIONS = (
    *("ADD", "AVERAGE_POOL_2D", "CONCATENATION", "CONV_2D", "DEPTHWISE_CONV_2D", "DEPTH_TO_SPACE", "DEQUANTIZE"),
    *("EMBEDDING_LOOKUP", "FLOOR", "FULLY_CONNECTED", "HASHTABLE_LOOKUP", "L2_NORMALIZATION", "L2_POOL_2D"),
    *("LOCAL_RESPONSE_NORMALIZATION", "LOGISTIC", "LSH_PROJECTION", "LSTM", "MAX_POOL_2D", "MUL", "RELU"),
    *("RELU_N1_TO_1", "RELU6", "RESHAPE", "RESIZE_BILINEAR", "RNN", "SOFTMAX", "SPACE_TO_DEPTH", "SVDF", "TANH"),
    *("CONCAT_EMBEDDINGS", "SKIP_GRAM", "CALL", "CUSTOM", "EMBEDDING_LOOKUP_SPARSE", "PAD"),
    *("UNIDIRECTIONAL_SEQUENCE_RNN", "GATHER", "BATCH_TO_SPACE_ND", "SPACE_TO_BATCH_ND", "TRANSPOSE", "MEAN", "SUB"),
    *("DIV", "SQUEEZE", "UNIDIRECTIONAL_SEQUENCE_LSTM", "STRIDED_SLICE", "BIDIRECTIONAL_SEQUENCE_RNN", "EXP"),
    *("TOPK_V2", "SPLIT", "LOG_SOFTMAX", "DELEGATE", "BIDIRECTIONAL_SEQUENCE_LSTM", "CAST", "PRELU"),
)


class _Field(NamedTuple):
    """A number in a table: its place in the vtable, its size in bytes, and its value if it is not stored."""

    slot: int
    size: int
    default: int = 0


_CONVOLUTION = {"padding": _Field(0, 1), "stride_w": _Field(1, 4), "stride_h": _Field(2, 4)}
_OPTIONS = {  # by operation: the fields of its options table
    "ADD": {"activation": _Field(0, 1)},
    "CONV_2D": {
        **_CONVOLUTION,
        "activation": _Field(3, 1),
        "dilation_w": _Field(4, 4, 1),
        "dilation_h": _Field(5, 4, 1),
    },
    "DEPTHWISE_CONV_2D": {
        **_CONVOLUTION,
        "activation": _Field(4, 1),
        "dilation_w": _Field(5, 4, 1),
        "dilation_h": _Field(6, 4, 1),
    },
    "MAX_POOL_2D": {
        **_CONVOLUTION,
        "filter_w": _Field(3, 4),
        "filter_h": _Field(4, 4),
        "activation": _Field(5, 1),
    },
}


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a graph.

    Attributes:
        shape: images are [N, H, W, C].
        dtype: None for a type that no supported operation uses.
        constant: its values if they are stored in the file, otherwise None.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    constant: np.ndarray | None


@dataclass(frozen=True)
class Operation:
    """An operation of a graph.

    Attributes:
        name: in `OPERATIONS`, the name of a custom operation, or "number N" for another code N.
        inputs, outputs: indices of tensors; an input that is left out is -1.
        options: the numbers in `_OPTIONS`.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict[str, int]


@dataclass(frozen=True, eq=False)
class TfliteGraph:
    """A graph: its operations in the order in which they run, and the indices of its input and output tensors."""

    tensors: tuple[Tensor, ...]
    operations: tuple[Operation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def read_tflite(content: bytes) -> TfliteGraph:
    """Read the only graph of a TensorFlow Lite file.

    Raises:
        ValueError: the content is not such a file, is truncated or damaged, or has several graphs.
    """
    file = _File(content)
    if content[4:8] != MAGIC:
        raise ValueError("it is not a TensorFlow Lite file")
    model = file.follow(0)
    graphs = file.tables(model, 2)
    if len(graphs) != 1:
        raise ValueError(f"it has {len(graphs)} graphs instead of one")
    graph = graphs[0]
    buffers = file.tables(model, 4)
    tensors = tuple([_tensor(file, table, buffers) for table in file.tables(graph, 0)])
    constants = [tensor.constant for tensor in tensors if tensor.constant is not None]
    if sum(values.nbytes for values in constants) > MAX_SHARED * len(content):
        raise ValueError("it uses the same values too often")
    if not all(np.isfinite(values).all() for values in constants):
        raise ValueError("it has values that are not finite")
    names = [_operation_name(file, table) for table in file.tables(model, 1)]
    operations = tuple([_operation(file, table, names, len(tensors)) for table in file.tables(graph, 3)])
    inputs, outputs = (file.indices(graph, slot, len(tensors)) for slot in (1, 2))
    if not inputs or not outputs or min(*inputs, *outputs) < 0:
        raise ValueError("it has no input or no output")
    return TfliteGraph(tensors, operations, inputs, outputs)


def _tensor(file: _File, table: int, buffers: list[int]) -> Tensor:
    shape = file.integers(table, 0, MAX_RANK)
    elements = math.prod(shape)
    if min(shape, default=1) < 1 or elements > MAX_ELEMENTS:
        raise ValueError(f"a tensor has the shape {list(shape)}")
    dtype = TYPES.get(file.number(table, _Field(1, 1)))
    buffer = file.number(table, _Field(2, 4))
    if not 0 <= buffer < len(buffers):
        raise ValueError("a tensor refers to a buffer that does not exist")
    data = file.vector(buffers[buffer], 0, 1)
    if data is None or not data[1] or dtype is None:
        return Tensor(shape, dtype, None)
    start, length = data
    if length != elements * dtype.itemsize:
        raise ValueError("a tensor's values do not match its shape")
    return Tensor(shape, dtype, np.frombuffer(file.content, dtype, elements, start).reshape(shape))


def _operation_name(file: _File, table: int) -> str:
    # files of schema versions before 3a store the code in the first field, later ones in the fourth
    code = max(file.number(table, _Field(0, 1)), file.number(table, _Field(3, 4)))
    name = OPERATIONS[code] if 0 <= code < len(OPERATIONS) else f"number {code}"
    return file.text(table, 1) or name if name == "CUSTOM" else name


def _operation(file: _File, table: int, names: list[str], tensors: int) -> Operation:
    code = file.number(table, _Field(0, 4))
    if not 0 <= code < len(names):
        raise ValueError("an operation refers to a code that does not exist")
    fields = _OPTIONS.get(names[code], {})
    options = file.table(table, 4)
    numbers = {
        name: field.default if options is None else file.number(options, field) for name, field in fields.items()
    }
    inputs, outputs = (file.indices(table, slot, tensors) for slot in (1, 2))
    if min(outputs, default=0) < 0:
        raise ValueError("an operation has no output")
    return Operation(names[code], inputs, outputs, numbers)


class _File:
    """Reads numbers, tables and vectors at checked positions."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def integer(self, position: int, size: int, signed: bool = False) -> int:
        if not 0 <= position <= len(self.content) - size:
            raise ValueError("it is truncated or damaged")
        return int.from_bytes(self.content[position : position + size], "little", signed=signed)

    def follow(self, position: int) -> int:
        """Return the position that an offset points to."""
        return position + self.integer(position, 4)

    def field(self, table: int, slot: int) -> int | None:
        """Return the position of a field; None if it is not stored."""
        vtable = table - self.integer(table, 4, signed=True)
        if 4 + 2 * slot + 2 > self.integer(vtable, 2):
            return None
        offset = self.integer(vtable + 4 + 2 * slot, 2)
        return table + offset if offset else None

    def number(self, table: int, field: _Field) -> int:
        position = self.field(table, field.slot)
        return field.default if position is None else self.integer(position, field.size, signed=True)

    def table(self, table: int, slot: int) -> int | None:
        position = self.field(table, slot)
        return None if position is None else self.follow(position)

    def vector(self, table: int, slot: int, item_size: int) -> tuple[int, int] | None:
        """Return the position and the number of a vector's items; None if it is not stored."""
        start = self.table(table, slot)
        if start is None:
            return None
        count = self.integer(start, 4)
        if start + 4 + count * item_size > len(self.content):
            raise ValueError("it is truncated or damaged")
        return start + 4, count

    def tables(self, table: int, slot: int) -> list[int]:
        start, count = self.vector(table, slot, 4) or (0, 0)
        if count > MAX_ITEMS:
            raise ValueError(f"it has more than {MAX_ITEMS} tensors or operations")
        return [self.follow(start + 4 * i) for i in range(count)]

    def integers(self, table: int, slot: int, max_count: int) -> tuple[int, ...]:
        start, count = self.vector(table, slot, 4) or (0, 0)
        if count > max_count:
            raise ValueError("it has a tensor or an operation with too many dimensions or arguments")
        return tuple([self.integer(start + 4 * i, 4, signed=True) for i in range(count)])

    def indices(self, table: int, slot: int, tensors: int) -> tuple[int, ...]:
        indices = self.integers(table, slot, MAX_ARGUMENTS)
        if not all(-1 <= index < tensors for index in indices):
            raise ValueError("an operation refers to a tensor that does not exist")
        return indices

    def text(self, table: int, slot: int) -> str:
        start, count = self.vector(table, slot, 1) or (0, 0)
        return self.content[start : start + min(count, MAX_NAME)].decode("utf-8", "replace")
