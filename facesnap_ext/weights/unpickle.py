"""Read pickles and torch files that come from the net, without executing anything in them.

A pickle is a program that calls whatever it names. Here every name is looked up in a short list of inert stand-ins,
none of which runs code of numpy, scipy or chumpy; any other name is refused before it is imported.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from facesnap_ext.errors import FaceSnapError

MAX_PICKLE_BYTES = 2 << 30  # FLAME's pickle has 50 MB
MAX_MADE_BYTES = 1 << 27  # of all sparse matrices once their zeros are written out, and of what chumpy picks out
MAX_ZIP_RATIO = 4  # of the sizes that a zip's entries declare to the size of the zip; weights hardly compress

_ZIP = b"PK\3\4"  # by which torch knows its files
# how torch.save began before torch 1.6: a pickle of one number
_LEGACY_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)

_NOT_CALLABLE = "a class whose stand-in is made by the reader"


def read_pickled_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a pickled dictionary, such as FLAME's `generic_model.pkl`.

    Numpy arrays of numbers, chumpy's arrays (chumpy itself is not needed) and scipy's csc and csr matrices (made dense,
    scipy is not needed) are read; entries of the dictionary that are no arrays are left out. Text of Python 2 is read
    as latin1.

    Returns:
        The arrays by name, perhaps read-only, with the types of the file.

    Raises:
        FaceSnapError: the file is missing, damaged, absurdly large, or names anything beyond plain arrays.
    """
    try:
        if path.stat().st_size > MAX_PICKLE_BYTES:
            raise FaceSnapError(f"{path.name} is larger than any pickle that FaceSnap knows, and is not read.")
        data = path.read_bytes()
    except OSError as error:
        raise FaceSnapError(f"The file {path} cannot be read ({error.strerror}); check the name and folder.") from error
    try:
        content = _InertUnpickler(data, path.name).load()
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, not a dictionary")
        arrays = _Arrays()
        return {str(name): arrays.read(value) for name, value in content.items() if isinstance(value, _Inert)}
    except FaceSnapError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise FaceSnapError(f"{path.name} is not a whole pickle of arrays ({error}); download it again.") from error


def is_torch_file(path: Path) -> bool:
    """Whether `torch.save` wrote the file, in the zip format or the one before torch 1.6."""
    return _begins(path, _ZIP) or is_old_torch_file(path)


def is_old_torch_file(path: Path) -> bool:
    """Whether torch before 1.6 wrote the file, in a format that has its numbers between its names."""
    return _begins(path, _LEGACY_TORCH)


def _begins(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def read_torch(path: Path, device: str = "cpu") -> Mapping[str, Any]:
    """Read a dictionary that `torch.save` wrote, in either format.

    `torch.load(weights_only=True)` does the reading. What it would hand over to other readers is refused first:
    TorchScript archives, which are programs, and the tar archives of torch before 0.1.10.

    Args:
        device: where the tensors go; "meta" reads shapes and no numbers.

    Raises:
        FaceSnapError: the file is missing, damaged, of those two kinds, or names anything beyond plain tensors.
    """
    try:
        _check_torch_archive(path)
        lazily = {"mmap": True} if device == "meta" and _begins(path, _ZIP) else {}
        # A1111 replaces torch.load by a check of its own, which answers None to files of torch 2.7 and newer
        content = torch.serialization.load(str(path), map_location=device, weights_only=True, **lazily)
    except FaceSnapError:
        raise
    except FileNotFoundError as error:
        raise FaceSnapError(f"There is no file {path}; check the name and the folder.") from error
    except Exception as error:  # torch raises whatever a damaged archive leads it to
        refused = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        reason = f"holds {refused[1]} beside its tensors" if refused else "is damaged or no torch file"
        raise FaceSnapError(f"{path.name} {reason}, and is not read; download it from its authors again.") from error
    if not isinstance(content, Mapping):
        raise FaceSnapError(f"{path.name} holds no dictionary of tensors; download it from its authors again.")
    return content


def _check_torch_archive(path: Path) -> None:
    """Refuse what torch before 2.6 runs in spite of `weights_only` (CVE-2025-32434), seen with torch's own eyes: two
    readers of zips can be shown two tables of contents."""
    if not _begins(path, _ZIP):
        if tarfile.is_tarfile(path):
            raise FaceSnapError(f"{path.name} is a tar archive, which holds no weights that FaceSnap reads; unpack it.")
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    _refuse_program(path, [entry.filename for entry in entries])
    if not _has_one_directory(path):
        raise FaceSnapError(
            f"{path.name} is not the kind of zip that torch writes, and is not read; download it again."
        )
    if sum(entry.file_size for entry in entries) > MAX_ZIP_RATIO * path.stat().st_size:
        raise FaceSnapError(f"{path.name} unpacks to an absurd size and is not read; download it again.")
    with path.open("rb") as file:  # a path of other letters than Windows' own it would not find
        _refuse_program(path, torch._C.PyTorchFileReader(file).get_all_records())


def _refuse_program(path: Path, names: Sequence[str]) -> None:
    if any(name.lower().endswith("constants.pkl") for name in names):
        raise FaceSnapError(f"{path.name} is a TorchScript program and is not run; use its plain weights instead.")


def _has_one_directory(path: Path) -> bool:
    """Whether a zip's table of contents lies where its end says and also right before that end, without a comment
    behind it: readers look in either place."""
    with path.open("rb") as file:
        end = file.seek(0, io.SEEK_END) - 22
        file.seek(max(0, end - 20))
        locator, record = struct.unpack("20s22s", file.read().rjust(42, b"\0"))
        signature, length, start, comment = struct.unpack("<4s8xIIH", record)
        if signature != b"PK\5\6" or comment:
            return False
        if locator[:4] == b"PK\6\7":  # of a zip of 64 bits
            end -= 20 + 56
            if struct.unpack("<8xQ4x", locator)[0] != end or end < 0:
                return False
            file.seek(end)
            signature, length, start = struct.unpack("<4s36xQQ", file.read(56))
            if signature != b"PK\6\6":
                return False
        return start + length == end


class _Inert:
    """An object of a pickle as its state alone. Each load makes its own subclasses, which it may spoil freely."""


class _Array(_Inert):
    """numpy.ndarray: (version, shape, type, whether in Fortran's order, bytes); the oldest numpy has no version."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _DType(_Inert):
    """numpy.dtype: its code, and a state of which the second entry is the byte order."""

    code: Any
    state: tuple[Any, ...] = (0, "|")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _Chumpy(_Inert):
    """A chumpy array: `Ch` holds its numbers in `x`; `Reshape`, `Select`, `transpose` rearrange another one, `a`."""


class _SparseMatrix(_Inert):
    """scipy's compressed sparse matrices: columns (csc) or rows (csr) of `data` at `indices`, from `indptr` on."""


class _Arrays:
    """The arrays that stand-ins describe, each made once however often a pickle names it, and together no larger than
    `MAX_MADE_BYTES` beyond what lies in the file."""

    def __init__(self) -> None:
        self.made: dict[int, np.ndarray] = {}  # by the stand-in's identity; all live as long as the pickle's content
        self.left = MAX_MADE_BYTES

    def read(self, stand_in: Any) -> np.ndarray:
        if id(stand_in) not in self.made:
            self.made[id(stand_in)] = self._make(stand_in)
        return self.made[id(stand_in)]

    def _make(self, stand_in: Any) -> np.ndarray:
        if isinstance(stand_in, _Array):
            shape, dtype, fortran, raw = stand_in.state[-4:]
            return _numbers(raw, dtype, shape, bool(fortran))
        if isinstance(stand_in, _Chumpy):
            return self._chumpy(type(stand_in).__name__, vars(stand_in))
        if isinstance(stand_in, _SparseMatrix):
            return self._dense(type(stand_in).__name__, vars(stand_in))
        raise ValueError(f"a {type(stand_in).__name__} where an array belongs")

    def _take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise ValueError("arrays that are absurdly larger than the file")

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
        if min(shape) < 0 or len(starts) != lines + 1 or len(data) != len(indices):
            raise ValueError(f"a sparse matrix of {shape[0]} by {shape[1]}")
        if np.any((indices < 0) | (indices >= length)):
            raise ValueError("a sparse matrix whose indices do not fit")
        self._take(lines * length * data.itemsize)
        dense = np.zeros((lines, length), data.dtype)
        np.add.at(dense, (np.repeat(np.arange(lines), np.diff(starts)), indices), data)
        return dense.T if by_column else dense


def _numbers(raw: Any, dtype: Any, shape: Any, fortran: bool) -> np.ndarray:
    if not (isinstance(dtype, _DType) and re.fullmatch(r"[<>=|]?[biufc]\d+", str(dtype.code))):
        raise ValueError("an array of something else than numbers")
    byte_order = dtype.state[1] if dtype.state[1] in ("<", ">") else "|"
    numbers = np.frombuffer(_to_bytes(raw), np.dtype(dtype.code).newbyteorder(byte_order))
    shape = tuple(map(int, shape))
    if min(shape, default=1) < 0 or math.prod(shape) != numbers.size:  # numpy's product may overflow
        raise ValueError(f"an array of shape {shape} with {numbers.size} numbers")
    return numbers.reshape(shape, order="F" if fortran else "C")


def _to_bytes(raw: Any) -> bytes | bytearray:
    """Bytes of Python 2 arrive as latin1 text."""
    if isinstance(raw, str):
        return raw.encode("latin1")
    if isinstance(raw, bytes | bytearray):
        return raw
    raise ValueError("an array of Python objects")


class _InertUnpickler(pickle._Unpickler):
    """Builds inert stand-ins for the few classes and functions that pickled arrays name, and refuses all others.

    It extends the unpickler written in Python: the one in C allocates tables as long as the file says.
    Methods stand in for functions: a pickle can call them but cannot change them.
    """

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.name = name

    def load_bytearray8(self) -> None:
        """Read what there is, where Python first makes room for as much as the file says."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}

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
            return self._no_bytes
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
            f"{self.name} names {full_name}, which a file of arrays has no need of, and is not read; "
            "download it from its authors again."
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

    def _no_bytes(self) -> bytes:
        return b""

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise ValueError(f"text in {encoding}")
        return text.encode("latin1")

    def _reconstructor(self, kind: Any, *_: Any) -> _Inert:
        """What protocols 0 and 1 make an object with."""
        if not (isinstance(kind, type) and issubclass(kind, _Inert)):
            raise TypeError("an object of no class")
        return kind()
