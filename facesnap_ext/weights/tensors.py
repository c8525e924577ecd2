"""Read tensors, or only their names and shapes, from safetensors and torch files without executing any code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import state_of
from facesnap_ext.networks.ffrnet import FLOAT8_TYPES
from facesnap_ext.weights.unpickle import is_torch_file, read_torch

MAX_EXPANSION = 64  # maximum size of a tensor relative to its stored data, which strides can repeat
MAX_SMALL = 2**20  # bytes; smaller tensors may be expanded without limit
OPENED_FOR = 64
"""Tensors that are read before a safetensors file is opened again. Closing it releases the pages of the tensors that
were converted; otherwise the whole file would stay in memory beside its converted copy."""
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, *FLOAT8_TYPES)
INTEGER_NAMES = ("parents", "faces", "position_ids", "num_batches_tracked")  # last parts of the keys of integer tensors
QUANTISED = (".scale_weight", ".scale_input", ".weight_scale", ".absmax", ".quant_map", "scaled_fp8", ".qweight")
"""Endings of additional keys in scaled fp8, NF4 and similar files, whose weights are meaningless without these
tensors."""


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
    path: Path,
    rename: Callable[[str], str | None] = lambda key: key,
    dtype: torch.dtype | None = None,
    check: bool = True,
    mapped: bool = False,
) -> dict[str, Tensor]:
    """Read tensors to the CPU, and check their values.

    Args:
        rename: maps a key of the file to a key of the result; None skips the tensor.
        dtype: floating-point tensors are converted to it; by default, they keep the dtype of the file.
        check: whether to check types and values; False if the caller checks them.
        mapped: whether tensors may be views of the file, for use only while it does not change. The data of skipped
            tensors is then not read.

    Raises:
        FaceSnapError: the file is damaged or quantised, or a tensor has an unsupported type or values that are not
            finite.
    """
    result: dict[str, Tensor] = {}

    def take(key: str, tensor: Tensor) -> None:
        if (name := rename(key)) is not None:
            if check:
                _check_numbers(path, key, tensor)
            result[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            if dtype is not None and dtype is not tensor.dtype and not is_finite(result[name]):
                raise FaceSnapError(
                    f"{path.name} contains values in {key} that are too large for {str(dtype).removeprefix('torch.')}; "
                    "use a file in single precision, or one that was converted from it correctly."
                )

    if is_torch_file(path):
        tensors = _torch_tensors(path, mapped=mapped)
        _check_unquantised(path, tensors)
        for key, tensor in tensors.items():
            take(key, tensor)
    else:
        with _open_safetensors(path) as file:
            state, keys = state_of(path), list(file.keys())
        _check_unquantised(path, keys)
        keys = [key for key in keys if rename(key) is not None]
        for first in range(0, len(keys), OPENED_FOR):
            with _open_safetensors(path) as file:
                for key in keys[first : first + OPENED_FOR]:
                    take(key, file.get_tensor(key))
        if state_of(path) != state:
            raise FaceSnapError(f"{path.name} was replaced while it was being read; try again.")
    return result


def _check_numbers(path: Path, key: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_TYPES and (
        key.rpartition(".")[2] not in INTEGER_NAMES or tensor.dtype not in (torch.int64, torch.int32)
    ):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise FaceSnapError(
            f"{path.name} stores {key} as {kind}, which FaceSnap cannot use; use the original file, whose weights are "
            "floating-point numbers."
        )
    if not is_finite(tensor):
        raise FaceSnapError(
            f"{path.name} contains values in {key} that are not finite (NaN or infinity), so it is damaged; download "
            "or create it again."
        )


def _check_unquantised(path: Path, keys: Iterable[str]) -> None:
    """Raise `FaceSnapError` for a file whose weights are quantised with separate scales."""
    for key in keys:
        if key.endswith(QUANTISED) or ".quant_state." in key:
            raise FaceSnapError(
                f"{path.name} is quantised (it has {key}), and FaceSnap cannot read such weights; use the original "
                "file in half or single precision."
            )


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite.

    The lowest and the highest value, which are NaN if any value is, are found five times as fast as a sum of halves in
    single precision. Versions of torch that cannot find them in half precision use the sum, which rarely overflows.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype in FLOAT8_TYPES:
        tensor = tensor.to(torch.float16)
    try:
        return all(bool(value.isfinite()) for value in tensor.aminmax())
    except RuntimeError:
        return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by name, as `read_index` does for a file."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def without_prefix(prefix: str) -> Callable[[str], str | None]:
    """Return a `rename` function for `read_tensors` that strips a prefix and skips keys without it."""
    return lambda key: key[len(prefix) :] if key.startswith(prefix) else None


def fingerprint(path: Path) -> str:
    """Return the `digest_of` a file's tensors, which does not depend on container, order or metadata.

    Safetensors files are read one tensor at a time.
    """
    if is_torch_file(path):
        return digest_of(sorted(_torch_tensors(path).items()))
    with _open_safetensors(path) as file:
        return digest_of((key, file.get_tensor(key)) for key in sorted(file.keys()))


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of tensors in hexadecimal. It covers names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for key, tensor in tensors:
        digest.update(repr((key, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise FaceSnapError(
            f"{path.name} is damaged or not a weight file ({error}); download or copy it again."
        ) from error


def _torch_tensors(path: Path, device: str = "cpu", mapped: bool = False) -> dict[str, Tensor]:
    tensors = _flatten(read_torch(path, device, mapped))
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
