"""What tensors a weight file holds, and reading them: safetensors, and torch's own files without executing anything."""

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

MAX_EXPANDED = 64  # times the numbers that are stored of a tensor, which may name one of them again and again
MAX_SMALL = 2**20  # bytes of a tensor that may name one number as often as it likes


@dataclass(frozen=True)
class TensorIndex:
    """The names and shapes in a weight file, and its metadata (empty for torch's files)."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_index(path: Path) -> TensorIndex:
    """Read names and shapes alone; the numbers stay on the disk.

    Nested dictionaries of torch's files are flattened with dots (`image_proj.latents`), an outer `state_dict` is
    left out.

    Raises:
        FaceSnapError: the file is missing, cut short or damaged.
    """
    if not path.is_file():
        raise FaceSnapError(f"There is no file {path}; check the name and the folder.")
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
        rename: maps a key of the file to the key wanted; None leaves the tensor on the disk.
        dtype: what floating tensors become; by default they keep the file's type.
    """
    wanted: dict[str, Tensor] = {}

    def take(key: str, tensor: Tensor) -> None:
        if (name := rename(key)) is not None:
            wanted[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

    if is_torch_file(path):
        for key, tensor in _torch_tensors(path).items():
            take(key, tensor)
    else:
        with _open_safetensors(path) as file:
            for key in file.keys():  # noqa: SIM118
                if rename(key) is not None:
                    take(key, file.get_tensor(key))
    return wanted


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors by their names, as `read_index` gives those of a file."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def without_prefix(prefix: str) -> Callable[[str], str | None]:
    """For `read_tensors`: the rest of a name that begins so, None for others."""
    return lambda key: key[len(prefix) :] if key.startswith(prefix) else None


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's tensors, hexadecimal: their names, types, shapes and numbers, whatever container, order and
    metadata they come in. Of safetensors one tensor at a time is in memory."""
    digest = hashlib.sha256()

    def add(key: str, tensor: Tensor) -> None:
        digest.update(repr((key, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

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
            raise FaceSnapError(f"{path.name} holds {name} as a sparse tensor, which no weights of FaceSnap's are.")
        stored = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.element_size() > max(MAX_EXPANDED * stored, MAX_SMALL):
            raise FaceSnapError(f"{path.name} says that {name} is absurdly larger than what is there of it.")
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
