"""Read the inputs, outputs and operations of an ONNX file's graph, without onnx and without its weights.

The file is a protobuf message (github.com/onnx/onnx, onnx/onnx.proto). Only the fields that are needed are visited, so
a file of 260 MB is read in milliseconds, and a damaged or hostile file costs bounded time and memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.files import State, state_of

MAX_FIELDS = 2**20  # maximum number of fields read per file; published recognition networks have up to some 20,000
MAX_NAME = 4096  # maximum length of the name of an operation or a tensor, in bytes
UNBOUNDED = ("If", "Loop", "Scan", "SequenceMap")
"""Operations that run other graphs and may never terminate. No face model pack needs them."""

# numbers of the fields in onnx.proto
_MODEL_GRAPH, _MODEL_FUNCTIONS, _FUNCTION_NODE = 7, 25, 7
_NODE, _INITIALIZER, _INPUT, _OUTPUT = 1, 5, 11, 12
_OP_TYPE, _ATTRIBUTE, _ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS, _TENSOR_NAME = 4, 5, 6, 11, 8
_NOTHING = memoryview(b"")


@dataclass(frozen=True)
class OnnxGraph:
    """The inputs and outputs of a graph, and its operations.

    Args:
        inputs, outputs: their shapes; a size that is not fixed is 0. Weights are not counted as inputs.
        unbounded: the operations in `UNBOUNDED` that it uses at any level.
    """

    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    unbounded: tuple[str, ...]


def read_graph(path: Path) -> OnnxGraph:
    """Read the graph of an ONNX file; the result is cached until the file changes.

    Raises:
        FaceSnapError: the file is missing, truncated or not an ONNX file.
    """
    try:
        graph = _read(path, state_of(path))
    except OSError as error:
        raise FaceSnapError(f"{path} cannot be read ({error.strerror or error}); unpack it again.") from error
    if isinstance(graph, str):
        raise FaceSnapError(f"{path} is not a valid ONNX file ({graph}); unpack or download it again.")
    return graph


def read_bounded_graph(path: Path, advice: str) -> OnnxGraph:
    """Read the graph of a network that will be run.

    Args:
        advice: what to do if it may never end; completes the message.

    Raises:
        FaceSnapError: as in `read_graph`, or the graph has an operation that may never end.
    """
    graph = read_graph(path)
    if graph.unbounded:
        raise FaceSnapError(
            f"{path} uses the operation {graph.unbounded[0]}, which may never end, so it is not run: {advice}."
        )
    return graph


@lru_cache(maxsize=1024)
def _read(path: Path, state: State) -> OnnxGraph | str:
    """Return the graph, or the reason why the file is invalid."""
    if not state[0]:
        return "it is empty"
    with path.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        return _Parser().model(content)
    except (ValueError, RecursionError) as error:
        return reason_of(error)


class _Parser:
    """Parses one file, and gives up after `MAX_FIELDS` fields."""

    def __init__(self) -> None:
        self.fields_left = MAX_FIELDS

    def model(self, model: memoryview) -> OnnxGraph:
        graph: OnnxGraph | None = None
        in_functions: set[str] = set()
        for number, value in self.fields(model):
            if number == _MODEL_GRAPH:
                graph = self.graph(_message(value))
            elif number == _MODEL_FUNCTIONS:
                nodes = (node for inner, node in self.fields(_message(value)) if inner == _FUNCTION_NODE)
                in_functions.update(*map(self.unbounded, nodes))
        if graph is None or not graph.outputs:
            raise ValueError("it has no graph")
        return OnnxGraph(graph.inputs, graph.outputs, tuple(sorted({*graph.unbounded, *in_functions})))

    def graph(self, graph: memoryview) -> OnnxGraph:
        inputs: dict[str, tuple[int, ...]] = {}
        outputs: dict[str, tuple[int, ...]] = {}
        weights: set[str] = set()
        unbounded: set[str] = set()
        for number, value in self.fields(graph):
            if number == _NODE:
                unbounded |= self.unbounded(value)
            elif number == _INITIALIZER:
                weights.add(self.text(value, _TENSOR_NAME))
            elif number == _INPUT:
                inputs[self.text(value, 1)] = self.shape(value)
            elif number == _OUTPUT:
                outputs[self.text(value, 1)] = self.shape(value)
        taken = tuple([shape for name, shape in inputs.items() if name not in weights])
        return OnnxGraph(taken, tuple(outputs.values()), tuple(unbounded))

    def unbounded(self, node: int | memoryview) -> set[str]:
        """Return the name of a node's operation if it runs other graphs."""
        operation = self.text(node, _OP_TYPE)
        if operation in UNBOUNDED:
            return {operation}
        for number, value in self.fields(_message(node)):
            if number == _ATTRIBUTE and any(
                inner in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS) for inner, _ in self.fields(_message(value))
            ):
                return {operation}
        return set()

    def shape(self, value_info: int | memoryview) -> tuple[int, ...]:
        """Return a tensor's shape, at ValueInfo.type.tensor_type.shape.dim.dim_value; () if none is stated."""
        message: int | memoryview = value_info
        for field in (2, 1, 2):  # type, tensor_type, shape
            message = next((value for number, value in self.fields(_message(message)) if number == field), _NOTHING)
        sizes = []
        for number, dimension in self.fields(_message(message)):
            if number == 1:
                size = next((size for inner, size in self.fields(_message(dimension)) if inner == 1), 0)
                sizes.append(size if isinstance(size, int) and size < 2**31 else 0)
        return tuple(sizes)

    def text(self, message: int | memoryview, field: int) -> str:
        value = next((value for number, value in self.fields(_message(message)) if number == field), _NOTHING)
        return bytes(_message(value)[:MAX_NAME]).decode("utf-8", "replace")

    def fields(self, message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
        """Yield number and value of each field: an integer, or a view of the bytes."""
        position = 0
        while position < len(message):
            if not self.fields_left:
                raise ValueError("it has too many parts")
            self.fields_left -= 1
            key, position = _varint(message, position)
            if key < 8:  # fields are numbered from 1; a file of zeros would be a million of fields
                raise ValueError("it is not a protobuf message")
            kind = key & 7
            if kind == 0:
                number, position = _varint(message, position)
                yield key >> 3, number
                continue
            if kind == 2:
                length, position = _varint(message, position)
            elif kind in (1, 5):
                length = 8 if kind == 1 else 4
            else:
                raise ValueError("it is not a protobuf message")
            if position + length > len(message):
                raise ValueError("it is truncated")
            yield key >> 3, message[position : position + length]
            position += length


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("it has a number where a message is expected")
    return value


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return a number stored with 7 bits per byte, and the position after it."""
    if position < len(message) and message[position] < 128:  # most numbers are one byte long
        return message[position], position + 1
    result = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError("it is truncated")
        byte = message[position]
        position += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, position
    raise ValueError("it is not a protobuf message")
