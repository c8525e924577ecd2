"""ArcFace as a torch network, built from insightface's ONNX file, so that L_id is differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.weights.face_pack import file_hash, onnx_files, pack_files, role_of
from facesnap_ext.weights.onnx_graph import read_graph
from facesnap_ext.weights.tensors import is_finite

TEMPLATE = (  # eyes, nose and mouth corners in a 112 × 112 crop (insightface, utils/face_align.py)
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
SIDE = 112


class ArcFace(nn.Module):
    """A frozen face recognition network from insightface; see `load_arcface`.

    name: the file's name. content: the SHA-256 of the file, which names the network.
    """

    def __init__(self, path: Path):
        super().__init__()
        import onnx

        self.name = path.name
        self.content = file_hash(path)
        graph = onnx.load(str(path)).graph
        stored = {tensor.name for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in stored]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise FaceSnapError(
                f"{path.name} does not have exactly one input and one output; use a recognition model from insightface."
            )
        self._input, self._output = inputs[0].name, graph.output[0].name
        batch, _, height, width = (dimension.dim_value for dimension in inputs[0].type.tensor_type.shape.dim)
        self.size = width or height or SIDE
        self._one_by_one = batch == 1  # its Reshape nodes may contain the batch size 1

        # like insightface, recognise MXNet's exports, which include the normalisation, by the names of the first nodes
        first = [node.name for node in graph.node[:8]]
        normalised = any(name.startswith(("Sub", "_minus")) for name in first) and any(
            name.startswith(("Mul", "_mul")) for name in first
        )
        self.mean, self.std = (0.0, 1.0) if normalised else (127.5, 127.5)

        self._weights: dict[str, str] = {}  # maps ONNX names, which may contain dots, to buffer names
        self._constants: dict[str, Tensor] = {}  # shapes and indices, which stay on the CPU
        for tensor in graph.initializer:
            self._store(tensor.name, _to_torch(onnx.numpy_helper.to_array(tensor)))
        self._nodes: list[tuple[str, list[str], list[str], dict[str, Any]]] = []
        for node in graph.node:
            attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            if node.op_type == "Constant":
                self._store(node.output[0], _constant(attributes))
            elif node.op_type not in OPS:
                raise FaceSnapError(
                    f"{path.name} uses the operation {node.op_type}, which FaceSnap's training does not support; use "
                    "another recognition model from insightface, or set id_rows to 0."
                )
            else:
                self._nodes.append((node.op_type, list(node.input), list(node.output), attributes))

    def _store(self, name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point():
            self._weights[name] = f"weight_{len(self._weights)}"
            self.register_buffer(self._weights[name], tensor)
        else:
            self._constants[name] = tensor

    def forward(self, faces: Tensor) -> Tensor:
        """Return embeddings [N,E] of aligned faces [N,3,112,112], RGB in 0…1."""
        x = (255 * faces.float() - self.mean) / self.std
        if self._one_by_one:
            return torch.cat([self._run(row) for row in x.split(1)])
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        values: dict[str, Any] = {"": None, self._input: x, **self._constants}
        values |= {name: getattr(self, buffer) for name, buffer in self._weights.items()}
        for op, inputs, outputs, attributes in self._nodes:
            values[outputs[0]] = OPS[op](attributes, *(values[name] for name in inputs))
        return values[self._output].flatten(1)


def load_arcface(folder: Path) -> ArcFace:
    """Load the recognition model of an insightface pack, frozen, on the CPU.

    Args:
        folder: the pack, or a folder with only one pack in it, or the `.onnx` file itself.

    Raises:
        FaceSnapError: there is no recognition model, or it is damaged or uses an unsupported operation.
    """
    file = folder if folder.is_file() else _recognition_model(folder)
    if role_of(read_graph(file)) != "recognition":
        raise FaceSnapError(f"{file} is not a face recognition model; choose one from an insightface pack.")
    try:
        network = ArcFace(file).eval().requires_grad_(False)
    except FaceSnapError:
        raise
    except Exception as error:  # protobuf's errors have no common base class
        raise FaceSnapError(f"{file} is not a valid ONNX file ({reason_of(error)}); copy it again.") from error
    if not all(is_finite(weight) for weight in network.buffers()):
        raise FaceSnapError(f"{file} has weights that are not finite; unpack the pack again.")
    return network


def _recognition_model(folder: Path) -> Path:
    packs = [folder] if onnx_files(folder) else sorted(path.parent for path in folder.glob("*/*.onnx"))
    problems: list[str] = []
    for pack in dict.fromkeys(packs):
        files = pack_files(pack)
        if files.recognition is not None:
            return files.recognition
        problems += files.problems
    if problems:
        raise FaceSnapError(f"{problems[0]}.")
    raise FaceSnapError(f"{folder} contains no face recognition model (.onnx); put an insightface pack there.")


def similarity(points: Tensor, template: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fit the least-squares similarity transform from points [N,P,2] to a template [P,2]: x' = A (x - source) + target.

    Returns:
        A [N,2,2], rotation and scale; source [N,1,2] and target [2], the centroids of points and template.
    """
    source, target = points.mean(1, keepdim=True), template.mean(0)
    p, q = points - source, template - target
    norm = p.square().sum(dim=(1, 2))
    a = (p * q).sum(dim=(1, 2)) / norm
    b = (p[..., 0] * q[:, 1] - p[..., 1] * q[:, 0]).sum(dim=1) / norm
    return torch.stack([torch.stack([a, -b], -1), torch.stack([b, a], -1)], -2), source, target


def align(images: Tensor, keypoints: Tensor, size: int = SIDE) -> Tensor:
    """Crop faces like insightface's `norm_crop`, but differentiably: five points are fitted to ArcFace's template.

    Args:
        images: [N,3,H,W]. The crop is 0 (black) where it extends beyond the image.
        keypoints: [N,5,2] eyes, nose and mouth corners, x to the right and y down, in pixels with the centre of the
            first pixel at 0, 0, as in detectors and `norm_crop`.
        size: side of the crop in pixels.

    Returns:
        [N,3,size,size]
    """
    keypoints = keypoints.to(images.device, torch.float32)
    height, width = images.shape[2:]
    template = torch.tensor(TEMPLATE, device=images.device)
    if size % SIDE == 0:
        template = template * (size / SIDE)
    else:  # crops of 128 pixels and multiples have a wider margin on the left and right
        template = template * (size / 128) + torch.tensor([size / 16, 0.0], device=images.device)

    # grid_sample maps from crop to image, so the transform that norm_crop fits (points to template) is inverted
    matrix, source, target = similarity(keypoints, template)
    inverse = matrix.transpose(1, 2) / matrix[:, :1].square().sum(dim=2, keepdim=True)

    line = torch.arange(size, dtype=torch.float32, device=images.device)
    y, x = torch.meshgrid(line, line, indexing="ij")
    positions = torch.stack([x, y], -1).reshape(-1, 2) - target
    positions = positions @ inverse.transpose(1, 2) + source
    positions = 2 * positions / torch.tensor([width - 1, height - 1], device=images.device) - 1
    grid = positions.reshape(len(images), size, size, 2)
    return F.grid_sample(images.float(), grid, align_corners=True)


def _to_torch(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    return tensor.float() if tensor.is_floating_point() else tensor


def _constant(attributes: dict[str, Any]) -> Tensor:
    import onnx

    name, value = next(iter(attributes.items()))
    return _to_torch(onnx.numpy_helper.to_array(value)) if name == "value" else torch.tensor(value)


def _padded(x: Tensor, attributes: dict[str, Any], kernel: Sequence[int], fill: float) -> Tensor:
    """Apply the padding specified by ONNX's `pads` or `auto_pad`, which may be asymmetric."""
    spatial = x.ndim - 2
    strides = attributes.get("strides", [1] * spatial)
    dilations = attributes.get("dilations", [1] * spatial)
    pads = list(attributes.get("pads", [0] * 2 * spatial))
    auto = attributes.get("auto_pad", b"NOTSET").decode()
    if auto.startswith("SAME"):
        for i, size in enumerate(x.shape[2:]):
            total = max(0, (-(-size // strides[i]) - 1) * strides[i] + dilations[i] * (kernel[i] - 1) + 1 - size)
            small, large = total // 2, total - total // 2
            pads[i], pads[i + spatial] = (small, large) if auto == "SAME_UPPER" else (large, small)
    if not any(pads):
        return x
    return F.pad(x, [pads[i + end] for i in reversed(range(spatial)) for end in (0, spatial)], value=fill)


def _conv(attributes: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x = _padded(x, attributes, weight.shape[2:], 0.0)
    stride, dilation = attributes.get("strides", 1), attributes.get("dilations", 1)
    return F.conv2d(x, weight, bias, stride, 0, dilation, attributes.get("group", 1))


def _max_pool(attributes: dict[str, Any], x: Tensor) -> Tensor:
    kernel = attributes["kernel_shape"]
    x = _padded(x, attributes, kernel, -torch.inf)
    ceil = bool(attributes.get("ceil_mode", 0))
    return F.max_pool2d(x, kernel, attributes.get("strides", 1), 0, attributes.get("dilations", 1), ceil)


def _average_pool(attributes: dict[str, Any], x: Tensor) -> Tensor:
    kernel, stride = attributes["kernel_shape"], attributes.get("strides", 1)
    ceil = bool(attributes.get("ceil_mode", 0))
    padded = _padded(x, attributes, kernel, 0.0)
    means = F.avg_pool2d(padded, kernel, stride, ceil_mode=ceil)
    if padded is x or attributes.get("count_include_pad", 0):
        return means
    return means / F.avg_pool2d(_padded(torch.ones_like(x), attributes, kernel, 0.0), kernel, stride, ceil_mode=ceil)


def _batch_norm(
    attributes: dict[str, Any], x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    return F.batch_norm(x, mean, var, scale, bias, eps=attributes.get("epsilon", 1e-5))


def _gemm(attributes: dict[str, Any], a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if attributes.get("transA") else a
    b = b.T if attributes.get("transB") else b
    product = attributes.get("alpha", 1.0) * (a @ b)
    return product if c is None else product + attributes.get("beta", 1.0) * c


def _reshape(attributes: dict[str, Any], x: Tensor, shape: Tensor) -> Tensor:
    # a size of 0 means the input's size
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())])


def _flatten(attributes: dict[str, Any], x: Tensor) -> Tensor:
    axis = attributes.get("axis", 1)
    return x.reshape(int(np.prod(x.shape[:axis])), -1)


def _axes(attributes: dict[str, Any], axes: Tensor | None) -> list[int] | None:
    """Return the axes, which are an attribute in older ONNX versions and an input in newer ones."""
    return axes.tolist() if axes is not None else attributes.get("axes")


def _squeeze(attributes: dict[str, Any], x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = _axes(attributes, axes)
    return x.squeeze() if dims is None else x.squeeze(tuple(dims))


def _unsqueeze(attributes: dict[str, Any], x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = _axes(attributes, axes) or []
    for dim in sorted(dim % (x.ndim + len(dims)) for dim in dims):
        x = x.unsqueeze(dim)
    return x


def _reduce(reduction: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(attributes: dict[str, Any], x: Tensor, axes: Tensor | None = None) -> Tensor:
        dims = _axes(attributes, axes) or list(range(x.ndim))
        return reduction(x, dim=dims, keepdim=bool(attributes.get("keepdims", 1)))

    return reduce


def _clip(attributes: dict[str, Any], x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    low = attributes.get("min") if low is None else low.to(x)
    high = attributes.get("max") if high is None else high.to(x)
    if low is None and high is None:
        return x
    if isinstance(low, Tensor) != isinstance(high, Tensor):  # torch accepts two numbers or two tensors, but not a mix
        low, high = (value.item() if isinstance(value, Tensor) else value for value in (low, high))
    return torch.clamp(x, low, high)


def _pad(attributes: dict[str, Any], x: Tensor, pads: Tensor | None = None, fill: Tensor | None = None) -> Tensor:
    sides = attributes["pads"] if pads is None else pads.tolist()
    value = attributes.get("value", 0.0) if fill is None else float(fill)
    mode = attributes.get("mode", b"constant").decode()
    both = [sides[i + end] for i in reversed(range(x.ndim)) for end in (0, x.ndim)]
    if mode == "constant":
        return F.pad(x, both, value=value)
    return F.pad(x, both[: 2 * (x.ndim - 2)], mode={"edge": "replicate", "reflect": "reflect"}[mode])


def _slice(
    attributes: dict[str, Any],
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first = attributes["starts"] if starts is None else starts.tolist()
    last = attributes["ends"] if ends is None else ends.tolist()
    dims = _axes(attributes, axes) or list(range(len(first)))
    strides = [1] * len(first) if steps is None else steps.tolist()
    index = [slice(None)] * x.ndim
    for dim, start, end, stride in zip(dims, first, last, strides):
        index[dim] = slice(start, end, stride)
    return x[tuple(index)]


def _gather(attributes: dict[str, Any], x: Tensor, indices: Tensor) -> Tensor:
    axis = attributes.get("axis", 0) % x.ndim
    picked = x.index_select(axis, indices.to(x.device).reshape(-1) % x.shape[axis])
    return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _prelu(attributes: dict[str, Any], x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x > 0, x, x * slope)


def _hard_sigmoid(attributes: dict[str, Any], x: Tensor) -> Tensor:
    return (attributes.get("alpha", 0.2) * x + attributes.get("beta", 0.5)).clamp(0, 1)


_TORCH_TYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float32, 11: torch.float32}

OPS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda attributes, a, b: a + b,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": lambda attributes, x: x.to(_TORCH_TYPES[attributes["to"]]),
    "Clip": _clip,
    "Concat": lambda attributes, *tensors: torch.cat(tensors, attributes["axis"]),
    "Conv": _conv,
    "Div": lambda attributes, a, b: a / b if a.is_floating_point() else a // b,
    "Dropout": lambda attributes, x, *rest: x,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda attributes, x: x.mean(dim=tuple(range(2, x.ndim)), keepdim=True),
    "HardSigmoid": _hard_sigmoid,
    "Identity": lambda attributes, x: x,
    "LeakyRelu": lambda attributes, x: F.leaky_relu(x, attributes.get("alpha", 0.01)),
    "MatMul": lambda attributes, a, b: a @ b,
    "MaxPool": _max_pool,
    "Mul": lambda attributes, a, b: a * b,
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": lambda attributes, a, b: a**b,
    "ReduceL2": _reduce(torch.linalg.vector_norm),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": lambda attributes, x: F.relu(x),
    "Reshape": _reshape,
    "Shape": lambda attributes, x: torch.tensor(x.shape),
    "Sigmoid": lambda attributes, x: torch.sigmoid(x),
    "Slice": _slice,
    "Sqrt": lambda attributes, x: x.sqrt(),
    "Squeeze": _squeeze,
    "Sub": lambda attributes, a, b: a - b,
    "Tanh": lambda attributes, x: torch.tanh(x),
    "Transpose": lambda attributes, x: x.permute(attributes.get("perm", list(reversed(range(x.ndim))))),
    "Unsqueeze": _unsqueeze,
}
