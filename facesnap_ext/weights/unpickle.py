"""Read pickles and torch files from untrusted sources without executing any code in them.

A pickle is a program that can call any function it names. Here, every name is looked up in a short list of inert
stand-ins, none of which runs code of numpy, scipy or chumpy. All other names are rejected before they are imported.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from facesnap_ext.errors import FaceSnapError

MAX_PICKLE_BYTES = 2 << 30  # FLAME's pickle is 50 MB
MAX_EXPANDED_BYTES = 1 << 27  # maximum total size of dense copies of sparse matrices and of chumpy's selections
MAX_ZIP_RATIO = 4  # maximum declared size of all entries relative to the zip file; weights hardly compress

_ZIP = b"PK\3\4"  # the signature by which torch recognises its files
# files of torch before 1.6 begin with a pickle of this number
_LEGACY_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)

_NOT_CALLABLE = "stands for a class whose instances are created by the reader"


def read_pickled_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a pickled dictionary, such as FLAME's `generic_model.pkl`.

    It reads numeric numpy arrays, chumpy arrays and scipy's csc and csr matrices (returned as dense arrays); neither
    chumpy nor scipy is needed. Other entries of the dictionary are left out. Python 2 strings are read as latin1.

    Returns:
        The arrays by name, with the dtypes of the file; they may be read-only.

    Raises:
        FaceSnapError: the file is missing, damaged or far too large, or refers to anything but plain arrays.
    """
    try:
        if path.stat().st_size > MAX_PICKLE_BYTES:
            raise FaceSnapError(f"{path.name} is too large for a pickle that FaceSnap can use; choose another file.")
        data = path.read_bytes()
    except OSError as error:
        raise FaceSnapError(f"The file {path} cannot be read ({error.strerror}); check its name and folder.") from error
    try:
        content = _InertUnpickler(data, path.name).load()
        if not isinstance(content, dict):
            raise TypeError(f"it contains a {type(content).__name__}, not a dictionary")
        arrays = _Arrays()
        return {str(name): arrays.read(value) for name, value in content.items() if isinstance(value, _Inert)}
    except FaceSnapError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        raise FaceSnapError(f"{path.name} is not a complete pickle of arrays ({error}); download it again.") from error


def is_torch_file(path: Path) -> bool:
    """Return whether the file was written by `torch.save`, in the zip format or the one before torch 1.6."""
    return _begins(path, _ZIP) or is_old_torch_file(path)


def is_old_torch_file(path: Path) -> bool:
    """Return whether the file was written by torch before 1.6, in a format that mixes names and data."""
    return _begins(path, _LEGACY_TORCH)


def _begins(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def read_torch(path: Path, device: str = "cpu", mapped: bool = False) -> Mapping[str, Any]:
    """Read a dictionary written by `torch.save`, in either format.

    The file is read by `torch.load(weights_only=True)`. Files that it would pass on to other readers are rejected
    first: TorchScript archives, which are programs, and the tar archives of torch before 0.1.10.

    Args:
        device: where the tensors are loaded; "meta" reads shapes but no data.
        mapped: whether the tensors may be views of the file, whose data is read when it is used. Files of torch before
            1.6 and compressed files are read at once.

    Raises:
        FaceSnapError: the file is missing, damaged or of one of the kinds named above, or refers to anything but plain
            tensors.
    """
    try:
        _check_torch_archive(path)
        maps = _begins(path, _ZIP) and (device == "meta" or (mapped and _is_uncompressed(path)))
        options: dict[str, Any] = {"mmap": True} if maps else {}
        # A1111 replaces torch.load with a check that returns None for files of torch 2.7 and newer
        content = torch.serialization.load(str(path), map_location=device, weights_only=True, **options)
    except FaceSnapError:
        raise
    except FileNotFoundError as error:
        raise FaceSnapError(f"There is no file {path}; check its name and folder.") from error
    except Exception as error:  # a damaged archive can make torch raise any exception
        rejected = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        reason = f"contains {rejected[1]} besides its tensors" if rejected else "is damaged or not a torch file"
        raise FaceSnapError(f"{path.name} {reason} and was not loaded; download it again from its authors.") from error
    if not isinstance(content, Mapping):
        raise FaceSnapError(
            f"{path.name} does not contain a dictionary of tensors; download it again from its authors."
        )
    return content


def _check_torch_archive(path: Path) -> None:
    """Reject files that torch before 2.6 executes in spite of `weights_only` (CVE-2025-32434).

    The names of the entries are also read by torch itself, because two zip readers can see different directories.
    """
    if not _begins(path, _ZIP):
        if tarfile.is_tarfile(path):
            raise FaceSnapError(f"{path.name} is a tar archive, not a file of weights; unpack it.")
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    _reject_program(path, [entry.filename for entry in entries])
    if not _has_one_directory(path):
        raise FaceSnapError(f"{path.name} is not a zip file as torch writes it and was not loaded; download it again.")
    if sum(entry.file_size for entry in entries) > MAX_ZIP_RATIO * path.stat().st_size:
        raise FaceSnapError(f"{path.name} would unpack to an implausible size and was not loaded; download it again.")
    with path.open("rb") as file:  # given a path, torch may not find names with non-ASCII characters on Windows
        _reject_program(path, torch._C.PyTorchFileReader(file).get_all_records())


def _is_uncompressed(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _reject_program(path: Path, names: Sequence[str]) -> None:
    if any(name.lower().endswith("constants.pkl") for name in names):
        raise FaceSnapError(f"{path.name} is a TorchScript program and was not loaded; use its plain weights instead.")


def _has_one_directory(path: Path) -> bool:
    """Return whether a zip's central directory is where the end record says, and also ends right before that record.

    Zip readers rely on one or the other. A comment after the end record is not allowed.
    """
    with path.open("rb") as file:
        end = file.seek(0, io.SEEK_END) - 22
        file.seek(max(0, end - 20))
        locator, record = struct.unpack("20s22s", file.read().rjust(42, b"\0"))
        signature, length, start, comment = struct.unpack("<4s8xIIH", record)
        if signature != b"PK\5\6" or comment:
            return False
        if locator[:4] == b"PK\6\7":  # zip64
            end -= 20 + 56
            if struct.unpack("<8xQ4x", locator)[0] != end or end < 0:
                return False
            file.seek(end)
            signature, length, start = struct.unpack("<4s36xQQ", file.read(56))
            if signature != b"PK\6\6":
                return False
        return start + length == end


class _Inert:
    """An object of a pickle, reduced to its state. Each load creates its own subclasses, which a pickle may modify."""


class _Array(_Inert):
    """numpy.ndarray: (version, shape, dtype, Fortran order, bytes); the oldest numpy versions omit the version."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _DType(_Inert):
    """numpy.dtype: its code, and a state whose second entry is the byte order."""

    code: Any
    state: tuple[Any, ...] = (0, "|")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _Chumpy(_Inert):
    """A chumpy array: `Ch` holds its data in `x`; `Reshape`, `Select` and `transpose` rearrange another array, `a`."""


class _SparseMatrix(_Inert):
    """A sparse matrix of scipy: columns (csc) or rows (csr) of `data` at `indices`, delimited by `indptr`."""


class _Arrays:
    """Converts stand-ins to arrays, each only once, however often a pickle refers to it.

    Together, the arrays take at most `MAX_EXPANDED_BYTES` more than the data stored in the file.
    """

    def __init__(self) -> None:
        self.arrays: dict[int, np.ndarray] = {}  # by id() of the stand-in, which stays alive while arrays are read
        self.bytes_left = MAX_EXPANDED_BYTES

    def read(self, stand_in: Any) -> np.ndarray:
        if id(stand_in) not in self.arrays:
            self.arrays[id(stand_in)] = self._make(stand_in)
        return self.arrays[id(stand_in)]

    def _make(self, stand_in: Any) -> np.ndarray:
        if isinstance(stand_in, _Array):
            shape, dtype, fortran, raw = stand_in.state[-4:]
            return _numbers(raw, dtype, shape, bool(fortran))
        if isinstance(stand_in, _Chumpy):
            return self._chumpy(type(stand_in).__name__, vars(stand_in))
        if isinstance(stand_in, _SparseMatrix):
            return self._dense(type(stand_in).__name__, vars(stand_in))
        raise ValueError(f"a {type(stand_in).__name__} instead of an array")

    def _take(self, size: int) -> None:
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise ValueError("its arrays are far larger than the file")

    def _chumpy(self, kind: str, state: dict[str, Any]) -> np.ndarray:
        if kind == "Ch":
            return self.read(state["x"])
        if kind == "Reshape":
            return self.read(state["a"]).reshape(state["newshape"])
        if kind == "transpose":
            return self.read(state["a"]).transpose(state.get("axes"))
        if kind == "Select":
            values, indices = self.read(state["a"]), self.read(state["idxs"])
            self._take(indices.size * values.itemsize)
            chosen = values.ravel()[indices]
            return chosen.reshape(state.get("preferred_shape", chosen.shape))
        raise ValueError(f"chumpy's {kind} is an expression, not an array")

    def _dense(self, kind: str, state: dict[str, Any]) -> np.ndarray:
        shape = tuple(map(int, state["_shape"]))
        data, indices, starts = (self.read(state[name]) for name in ("data", "indices", "indptr"))
        by_column = kind.startswith("csc")
        lines, length = shape[::-1] if by_column else shape
        # with more axes, an array without numbers could have any length
        one_axis = data.ndim == indices.ndim == starts.ndim == 1
        if not one_axis or min(shape) < 0 or len(starts) != lines + 1 or len(data) != len(indices):
            raise ValueError(f"an inconsistent sparse matrix of {shape[0]} × {shape[1]}")
        if np.any((indices < 0) | (indices >= length)):
            raise ValueError("a sparse matrix with indices out of range")
        self._take(lines * length * data.itemsize)
        dense = np.zeros((lines, length), data.dtype)
        np.add.at(dense, (np.repeat(np.arange(lines), np.diff(starts)), indices), data)
        return dense.T if by_column else dense


def _numbers(raw: Any, dtype: Any, shape: Any, fortran: bool) -> np.ndarray:
    if not (isinstance(dtype, _DType) and re.fullmatch(r"[<>=|]?[biufc]\d+", str(dtype.code))):
        raise ValueError("an array that does not contain numbers")
    byte_order = dtype.state[1] if dtype.state[1] in ("<", ">") else "|"
    numbers = np.frombuffer(_to_bytes(raw), np.dtype(dtype.code).newbyteorder(byte_order))
    shape = tuple(map(int, shape))
    if min(shape, default=1) < 0 or math.prod(shape) != numbers.size:  # numpy's product can overflow
        raise ValueError(f"an array of shape {shape} with {numbers.size} values")
    return numbers.reshape(shape, order="F" if fortran else "C")


def _to_bytes(raw: Any) -> bytes | bytearray:
    """Return the bytes of an array; Python 2 strings were read as latin1 text."""
    if isinstance(raw, str):
        return raw.encode("latin1")
    if isinstance(raw, bytes | bytearray):
        return raw
    raise ValueError("an array of Python objects")


class _InertUnpickler(pickle._Unpickler):
    """Creates inert stand-ins for the few classes and functions that pickled arrays refer to, and rejects all others.

    It extends the pure-Python unpickler, because the C version allocates memory for sizes that a file declares. Methods
    stand in for functions, because a pickle can call methods but not set attributes on them.
    """

    read: Callable[[int], bytes]  # set by `load`
    append: Callable[[Any], None]  # set by `load`

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.name = name

    def load_bytearray8(self) -> None:
        """Read only the bytes that the file has; Python would first allocate the declared size."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            functions = {"_reconstruct": self._empty_array, "scalar": self._scalar}
            if name in functions:
                return functions[name]
        if full_name in ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"):
            return self._array_from_buffer
        if full_name == "numpy.dtype":
            return self._dtype
        if full_name in ("__builtin__.bytes", "builtins.bytes"):
            return self._empty_bytes
        if full_name == "_codecs.encode":
            return self._encode
        if full_name in ("copy_reg._reconstructor", "copyreg._reconstructor"):
            return self._reconstructor
        if full_name in ("numpy.ndarray", "__builtin__.object", "builtins.object"):
            return _NOT_CALLABLE
        if full_name in ("__builtin__.set", "builtins.set"):
            return set
        if full_name == "collections.OrderedDict":
            return dict
        if re.fullmatch(r"chumpy(\.\w+)+", module):
            return type(name, (_Chumpy,), {})
        if re.fullmatch(r"scipy\.sparse\._?cs[cr]", module) and re.fullmatch(r"cs[cr]_(matrix|array)", name):
            return type(name, (_SparseMatrix,), {})
        raise FaceSnapError(
            f"{self.name} refers to {full_name}, which a file of arrays does not need, and was not loaded; download it "
            "again from its authors."
        )

    def _empty_array(self, *_: Any) -> _Array:
        return type("_Array", (_Array,), {})()

    def _array_from_buffer(self, raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        array = self._empty_array()
        array.state = (shape, dtype, order == "F", raw)
        return array

    def _scalar(self, dtype: Any, raw: Any) -> Any:
        return _numbers(raw, dtype, (), False)[()]

    def _dtype(self, code: Any, *_: Any) -> _DType:
        dtype = type("_DType", (_DType,), {})()
        dtype.code = code
        return dtype

    def _empty_bytes(self) -> bytes:
        return b""

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise ValueError(f"text in {encoding}")
        return text.encode("latin1")

    def _reconstructor(self, kind: Any, *_: Any) -> _Inert:
        """Stand in for `copyreg._reconstructor`, which creates objects in protocols 0 and 1."""
        if not (isinstance(kind, type) and issubclass(kind, _Inert)):
            raise TypeError("an object without a class")
        return kind()
