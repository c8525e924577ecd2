"""Write TensorFlow Lite files with Google's flatbuffers package, for tests of the reader and of the conversion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import flatbuffers
import numpy as np

CODES = {
    "ADD": 0,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 4,
    "DEQUANTIZE": 6,
    "LOGISTIC": 14,
    "MAX_POOL_2D": 17,
    "TANH": 28,
    "CUSTOM": 32,
    "PAD": 34,
    "PRELU": 54,
    "RESHAPE": 22,
    "GELU": 150,
}
TYPES = {np.dtype("float32"): 0, np.dtype("float16"): 1, np.dtype("int32"): 2, np.dtype("int8"): 9}
SAME, VALID = 0, 1

_WINDOW = ("padding", "stride_w", "stride_h")
_SLOTS = {  # the options tables of the schema: fields in their order
    "ADD": ("activation",),
    "CONV_2D": (*_WINDOW, "activation", "dilation_w", "dilation_h"),
    "DEPTHWISE_CONV_2D": (*_WINDOW, "multiplier", "activation", "dilation_w", "dilation_h"),
    "MAX_POOL_2D": (*_WINDOW, "filter_w", "filter_h", "activation"),
}
_BYTES = ("padding", "activation")  # the others are int32


@dataclass
class TfliteFile:
    """A graph under construction; every method that adds a tensor returns its index.

    Attributes:
        custom_name: the name of the operation "CUSTOM".
        copies: by tensor, the number of further tensors that share its bytes.
    """

    tensors: list[tuple[tuple[int, ...], np.dtype, bytes]] = field(default_factory=list)
    operations: list[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, int]]] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    custom_name: str = "Landmarks2TransformMatrix"
    copies: dict[int, int] = field(default_factory=dict)

    def tensor(self, shape: Sequence[int], dtype: str = "float32", data: bytes = b"") -> int:
        self.tensors.append((tuple(shape), np.dtype(dtype), data))
        return len(self.tensors) - 1

    def input(self, shape: Sequence[int]) -> int:
        self.inputs.append(self.tensor(shape))
        return self.inputs[-1]

    def constant(self, values: np.ndarray) -> int:
        return self.tensor(values.shape, values.dtype.name, values.tobytes())

    def half(self, values: np.ndarray) -> int:
        """A constant in half precision, which is dequantised."""
        return self.add("DEQUANTIZE", [self.constant(values.astype(np.float16))], values.shape)

    def add(self, name: str, inputs: Sequence[int], shape: Sequence[int], **options: int) -> int:
        result = self.tensor(shape)
        self.operations.append((name, tuple(inputs), (result,), options))
        return result

    def content(self) -> bytes:
        builder = flatbuffers.Builder(1024)
        data = [b"", *(data for *_, data in self.tensors)]
        buffers = [_table(builder, 1, {0: builder.CreateByteVector(one)} if one else {}) for one in data]
        tensors = []
        numbers = [*range(len(self.tensors)), *(one for one, count in self.copies.items() for _ in range(count))]
        for number in numbers:
            shape, dtype, _ = self.tensors[number]
            dimensions = builder.CreateNumpyVector(np.array(shape, np.int32))
            builder.StartObject(4)
            builder.PrependUOffsetTRelativeSlot(0, dimensions, 0)
            builder.PrependInt8Slot(1, TYPES[dtype], 0)
            builder.PrependUint32Slot(2, number + 1, 0)
            tensors.append(builder.EndObject())
        names = list(dict.fromkeys(name for name, *_ in self.operations))
        operations = [self._operation(builder, names, *operation) for operation in self.operations]
        graph = _table(
            builder,
            4,
            {
                0: _tables(builder, tensors),
                1: builder.CreateNumpyVector(np.array(self.inputs, np.int32)),
                2: builder.CreateNumpyVector(np.array(self.outputs, np.int32)),
                3: _tables(builder, operations),
            },
        )
        codes = [self._code(builder, name) for name in names]
        parts = {1: _tables(builder, codes), 2: _tables(builder, [graph]), 4: _tables(builder, buffers)}
        builder.StartObject(5)
        builder.PrependUint32Slot(0, 3, 0)
        for slot, offset in parts.items():
            builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
        builder.Finish(builder.EndObject(), file_identifier=b"TFL3")
        return bytes(builder.Output())

    def _code(self, builder: flatbuffers.Builder, name: str) -> int:
        custom = builder.CreateString(self.custom_name) if name == "CUSTOM" else 0
        builder.StartObject(4)
        builder.PrependInt8Slot(0, min(CODES[name], 127), 0)
        builder.PrependUOffsetTRelativeSlot(1, custom, 0)
        builder.PrependInt32Slot(2, 1, 1)
        builder.PrependInt32Slot(3, CODES[name], 0)
        return builder.EndObject()

    def _operation(
        self,
        builder: flatbuffers.Builder,
        names: list[str],
        name: str,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        options: dict[str, int],
    ) -> int:
        both = [builder.CreateNumpyVector(np.array(indices, np.int32)) for indices in (inputs, outputs)]
        slots = _SLOTS.get(name, ())
        builder.StartObject(len(slots))
        for slot, key in enumerate(slots):
            if key in options:
                prepend = builder.PrependInt8Slot if key in _BYTES else builder.PrependInt32Slot
                prepend(slot, options[key], 1 if key.startswith("dilation") else 0)
        table = builder.EndObject()
        kinds = {"CONV_2D": 1, "DEPTHWISE_CONV_2D": 2, "MAX_POOL_2D": 5, "ADD": 11}  # BuiltinOptions
        builder.StartObject(5)
        builder.PrependUint32Slot(0, names.index(name), 0)
        builder.PrependUOffsetTRelativeSlot(1, both[0], 0)
        builder.PrependUOffsetTRelativeSlot(2, both[1], 0)
        builder.PrependUint8Slot(3, kinds.get(name, 0), 0)
        builder.PrependUOffsetTRelativeSlot(4, table if slots else 0, 0)
        return builder.EndObject()


def _table(builder: flatbuffers.Builder, slots: int, offsets: dict[int, int]) -> int:
    builder.StartObject(slots)
    for slot, offset in offsets.items():
        builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
    return builder.EndObject()


def _tables(builder: flatbuffers.Builder, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return builder.EndVector()


def tiny_landmark_detector(seed: int = 0) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A file with the input and output of MediaPipe's detector, and its weights and bias.

    Its output is `weights @ brightest + bias`, where `brightest` [3] is the maximum of each colour in the image.
    """
    random = np.random.default_rng(seed)
    weights = random.normal(size=(1434, 3)).astype(np.float16).astype(np.float32)
    bias = random.uniform(0, 256, 1434).astype(np.float32)
    file = TfliteFile()
    image = file.input((1, 256, 256, 3))
    whole = {"filter_w": 256, "filter_h": 256, "stride_w": 256, "stride_h": 256, "padding": VALID}
    brightest = file.add("MAX_POOL_2D", [image], (1, 1, 1, 3), **whole)
    kernel = file.half(weights.reshape(1434, 1, 1, 3))
    options = {"padding": VALID, "stride_w": 1, "stride_h": 1}
    points = file.add("CONV_2D", [brightest, kernel, file.constant(bias)], (1, 1, 1, 1434), **options)
    file.outputs = [points]
    return file.content(), weights, bias
