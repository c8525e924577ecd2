"""Read tensors, or only their names and shapes, from safetensors and torch files without executing any code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.unpickle import is_torch_file, read_torch

MAX_EXPANSION = 64  # size of a tensor relative to its stored data, which strides may refer to repeatedly
MAX_SMALL = 2**20  # bytes; smaller tensors may be expanded without limit


@dataclass(frozen=True)
class TensorIndex:
    """The names and shapes of the tensors in a weight file, and its metadata (empty for torch files)."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_index(path: Path) -> TensorIndex:
    """Read names and shapes only; the data stays on disk.

    Nested dictionaries in torch files are flattened with dots (`image_proj.latents`); the key `state_dict` is
    dropped.

    Raises:
        FaceSnapError: the file is missing, truncated or damaged.
    """
    if not path.is_file():
        raise FaceSnapError(f"There is no file {path}; check its name and folder.")
    if is_torch_file(path):
        shapes = shapes_of(_torch_tensors(path, "meta"))
        return TensorIndex(shapes, {})
    with _open_safetensors(path) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return TensorIndex(shapes, dict(file.metadata() or {}))


def read_tensors(
    path: Path, rename: Callable[[str], str | None] = lambda key: key, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Read tensors to the CPU.

    Args:
        rename: maps a key of the file to a key of the result; None skips the tensor.
        dtype: floating-point tensors are converted to it; by default, they keep the dtype of the file.
    """
    result: dict[str, Tensor] = {}

    def take(key: str, tensor: Tensor) -> None:
        if (name := rename(key)) is not None:
            result[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

    if is_torch_file(path):
        for key, tensor in _torch_tensors(path).items():
            take(key, tensor)
    else:
        with _open_safetensors(path) as file:
            for key in file.keys():  # noqa: SIM118
                if rename(key) is not None:
                    take(key, file.get_tensor(key))
    return result


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by name, as `read_index` does for a file."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def without_prefix(prefix: str) -> Callable[[str], str | None]:
    """Return a `rename` function for `read_tensors` that strips a prefix and skips keys without it."""
    return lambda key: key[len(prefix) :] if key.startswith(prefix) else None


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file's tensors, in hexadecimal.

    It covers names, dtypes, shapes and values, and does not depend on container, order or metadata. Safetensors files
    are read one tensor at a time.
    """
    digest = hashlib.sha256()

    def add(key: str, tensor: Tensor) -> None:
        digest.update(repr((key, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    if is_torch_file(path):
        for key, tensor in sorted(_torch_tensors(path).items()):
            add(key, tensor)
    else:
        with _open_safetensors(path) as file:
            for key in sorted(file.keys()):
                add(key, file.get_tensor(key))
    return digest.hexdigest()


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise FaceSnapError(
            f"{path.name} is damaged or not a weight file ({error}); download or copy it again."
        ) from error


def _torch_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    tensors = _flatten(read_torch(path, device))
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise FaceSnapError(
                f"{path.name} contains the sparse tensor {name}, and FaceSnap reads only dense ones; use another file."
            )
        stored = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.element_size() > max(MAX_EXPANSION * stored, MAX_SMALL):
            raise FaceSnapError(f"{path.name} declares {name} as far larger than its stored data; download it again.")
    return tensors


def _flatten(content: Any, prefix: str = "") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    if isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{key}"] = value
            elif isinstance(value, Mapping):
                tensors |= _flatten(value, prefix if key == "state_dict" else f"{prefix}{key}.")
    return tensors
