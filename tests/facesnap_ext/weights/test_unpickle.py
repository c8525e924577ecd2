"""Pickles and torch files are read without executing any code in them."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import sys
import tarfile
import tracemalloc
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, boolean_dtypes, floating_dtypes, integer_dtypes

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.tensors import fingerprint, read_index, read_tensors
from facesnap_ext.weights.unpickle import is_torch_file, read_pickled_arrays, read_torch

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Reduced:
    """Pickles as a call to this function with these arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.fixture
def chumpy() -> Iterator[types.SimpleNamespace]:
    """Stand-ins for chumpy's modules and classes, whose instances pickle like chumpy's, as their attributes."""

    def setstate(self: Any, state: dict[str, Any]) -> None:
        raise AssertionError("the reader must not run chumpy's code")

    names = {"chumpy.ch": ["Ch"], "chumpy.reordering": ["Reshape", "Select", "transpose"], "chumpy.ch_ops": ["add"]}
    classes = {}
    for module_name, class_names in names.items():
        module = types.ModuleType(module_name)
        for name in class_names:
            classes[name] = type(name, (), {"__module__": module_name, "__setstate__": setstate})
            setattr(module, name, classes[name])
        sys.modules[module_name] = module
    sys.modules["chumpy"] = types.ModuleType("chumpy")
    yield types.SimpleNamespace(**classes)
    for name in ("chumpy", *names):
        del sys.modules[name]


def make(kind: type, **attributes: Any) -> Any:
    instance = kind()
    vars(instance).update(
        _dirty_vars=set(), _itr=None, _depends_on_deps={"r": {"deps": {"x"}, "value": None}}, **attributes
    )
    return instance


def write(path: Path, content: object, protocol: int = 2) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


number_arrays = st.one_of(integer_dtypes(endianness="?"), floating_dtypes(endianness="?"), boolean_dtypes()).flatmap(
    lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(number_arrays, st.sampled_from(PROTOCOLS), st.booleans())
def test_arrays_are_read_unchanged(tmp_path: Path, array: np.ndarray, protocol: int, fortran: bool) -> None:
    array = np.asfortranarray(array) if fortran else array
    content = {"name": "text", "array": array, "number": 3, "scalar": np.float64(2.5), "list": [1, {2}]}
    read = read_pickled_arrays(write(tmp_path / "a.pkl", content, protocol))
    assert list(read) == ["array"]
    assert read["array"].dtype == array.dtype
    np.testing.assert_array_equal(read["array"], array)


def test_old_and_new_module_names_of_numpy_are_accepted(tmp_path: Path) -> None:
    array = np.arange(6.0).reshape(2, 3)
    data = pickle.dumps(OrderedDict(a=array), 2)
    assert b"collections\nOrderedDict" in data
    old, new = (
        data.replace(b"numpy._core", name).replace(b"numpy.core", name) for name in (b"numpy.core", b"numpy._core")
    )
    assert old != new
    for variant in (old, new):
        np.testing.assert_array_equal(read_pickled_arrays(write(tmp_path / "a.pkl", variant))["a"], array)


@pytest.mark.parametrize("binary", [True, False])
def test_pickle_of_python_2_is_read_as_latin1(tmp_path: Path, binary: bool) -> None:
    """Python 2 has no bytes type, so arrays are pickled as strings of arbitrary bytes, here opcode by opcode."""
    array = np.array([[-1.5, 1e300], [0.1, 3.0]])

    def text(value: bytes) -> bytes:
        if binary:
            return b"T" + struct.pack("<I", len(value)) + value
        return b"S'" + "".join(f"\\x{byte:02x}" for byte in value).encode() + b"'\n"

    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"f8")
        + b"K\x00K\x01\x87R"
        + b"(K\x03"
        + text(b"<")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array_opcodes = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    state = b"(K\x01K\x02K\x02\x86" + dtype + b"\x89" + text(array.tobytes()) + b"tb"
    pickled = b"\x80\x02}" + text(b"v_template") + array_opcodes + state + b"s."
    np.testing.assert_array_equal(pickle.loads(pickled, encoding="latin1")["v_template"], array)
    np.testing.assert_array_equal(read_pickled_arrays(write(tmp_path / "p2.pkl", pickled))["v_template"], array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_chumpy_arrays_are_read_without_chumpy(tmp_path: Path, chumpy: types.SimpleNamespace, protocol: int) -> None:
    array = np.arange(24.0).reshape(2, 3, 4)
    ch = make(chumpy.Ch, x=array)
    content = {
        "ch": ch,
        "reshape": make(chumpy.Reshape, a=ch, newshape=(4, 6)),
        "transpose": make(chumpy.transpose, a=ch, axes=(2, 0, 1)),
        "reversed": make(chumpy.transpose, a=ch, axes=None),
        "select": make(chumpy.Select, a=ch, idxs=np.array([5, 0, 7]), preferred_shape=(3, 1)),
        "flat": make(chumpy.Select, a=ch, idxs=np.array([2, 2])),
    }
    path = write(tmp_path / "c.pkl", content, protocol)
    for name in [name for name in sys.modules if name.startswith("chumpy")]:
        vars(sys.modules[name]).clear()
    read = read_pickled_arrays(path)
    np.testing.assert_array_equal(read["ch"], array)
    np.testing.assert_array_equal(read["reshape"], array.reshape(4, 6))
    np.testing.assert_array_equal(read["transpose"], array.transpose(2, 0, 1))
    np.testing.assert_array_equal(read["reversed"], array.T)
    np.testing.assert_array_equal(read["select"], [[5], [0], [7]])
    np.testing.assert_array_equal(read["flat"], [2, 2])


def test_chumpy_expression_is_rejected_by_name(tmp_path: Path, chumpy: types.SimpleNamespace) -> None:
    path = write(tmp_path / "sum.pkl", {"sum": make(chumpy.add, a=1, b=2)})
    with pytest.raises(FaceSnapError, match=r"sum\.pkl.*chumpy's add"):
        read_pickled_arrays(path)


@pytest.mark.parametrize("kind", ["csc_matrix", "csr_matrix", "csc_array", "csr_array"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_sparse_matrices_are_read_as_dense_arrays(tmp_path: Path, kind: str, protocol: int) -> None:
    import scipy.sparse

    random = np.random.default_rng(0)
    dense = random.normal(size=(5, 9)) * (random.random((5, 9)) < 0.4)
    data = pickle.dumps({"J": getattr(scipy.sparse, kind)(dense)}, protocol)
    np.testing.assert_array_equal(read_pickled_arrays(write(tmp_path / "s.pkl", data))["J"], dense)
    if protocol == 2:
        old = data.replace(b"scipy.sparse._cs", b"scipy.sparse.cs")
        assert old != data
        np.testing.assert_array_equal(read_pickled_arrays(write(tmp_path / "s.pkl", old))["J"], dense)


def creates(path: Path) -> list[Any]:
    """Objects that create this file or folder when an ordinary unpickler loads them."""
    return [
        Reduced(os.mkdir, str(path)),
        Reduced(eval, f"open({str(path)!r}, 'w')"),
        Reduced(io.FileIO, str(path), "w"),
    ]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("index", range(3))
def test_nothing_in_a_pickle_is_executed(tmp_path: Path, protocol: int, index: int) -> None:
    created = tmp_path / "created"
    evil = creates(created)[index]
    data = pickle.dumps({"v_template": np.zeros(3), "x": evil}, protocol)
    pickle.loads(data)
    assert created.exists(), "the pickle must be dangerous"
    created.rmdir() if created.is_dir() else created.unlink()

    called = pickle.dumps(evil.call[0], 4)
    name = next(word for word in ("mkdir", "eval", "FileIO") if word.encode() in called)
    with pytest.raises(FaceSnapError, match=rf"evil\.pkl refers to \w+\.{name}"):
        read_pickled_arrays(write(tmp_path / "evil.pkl", data))
    assert not created.exists()


@pytest.mark.parametrize(
    "name",
    [
        "numpy load",
        "numpy fromfile",
        "numpy.core.multiarray fromfile",
        "numpy._core.multiarray _reconstruct.__globals__",
        "copyreg __newobj__",
        "builtins getattr",
        "scipy.sparse load_npz",
        "functools partial",
        "codecs open",
    ],
)
def test_names_similar_to_allowed_ones_are_rejected(tmp_path: Path, name: str) -> None:
    module, attribute = name.split()
    path = write(tmp_path / "n.pkl", f"\x80\x02}}X\x01\0\0\0ac{module}\n{attribute}\ns.".encode("latin1"))
    with pytest.raises(FaceSnapError, match=rf"n\.pkl refers to {module}\.{attribute}"):
        read_pickled_arrays(path)


def test_pickle_cannot_modify_the_reader(tmp_path: Path) -> None:
    """A pickle can set attributes on the objects it refers to; this must not affect the next load."""
    good = pickle.dumps({"a": np.arange(3.0)}, 2)
    names = [b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"cchumpy.ch\nCh\n", b"cnumpy\nndarray\n",
             b"cscipy.sparse.csc\ncsc_matrix\n", b"ccollections\nOrderedDict\n"]  # fmt: skip
    for name in names:
        attack = b"\x80\x02}X\x01\0\0\0a" + name + b"N}X\x0c\0\0\0__setstate__cnumpy\ndtype\ns\x86bs."
        with contextlib.suppress(FaceSnapError):
            read_pickled_arrays(write(tmp_path / "spoil.pkl", attack))
        np.testing.assert_array_equal(read_pickled_arrays(write(tmp_path / "good.pkl", good))["a"], np.arange(3.0))


def array_state(shape: tuple[int, ...], code: str, raw: bytes) -> dict[str, Any]:
    """Return a dictionary with an array whose data need not match its shape."""

    class Lying:
        def __reduce__(self) -> tuple[Any, ...]:
            empty = np.empty(0, np.uint8).__reduce__()
            return empty[0], empty[1], (1, shape, np.dtype(code), False, raw)

    return {"a": Lying()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (array_state((10**12,), "f8", b"12345678"), "shape"),
        (array_state((2**33, 2**33), "f8", b""), "shape"),
        (array_state((-1, -8), "u1", b"12345678"), "shape"),
        (array_state((1,), "O", b"12345678"), "numbers"),
        ({"a": np.array([{}, []], dtype=object)}, "numbers"),
        ({"a": np.array(["text"])}, "numbers"),
        ([np.zeros(3)], "not a dictionary"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "complete pickle"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "not a dictionary"),
        (b"\x80\x02T\xff\xff\xff\x7fabc.", "complete pickle"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00abc.", "complete pickle"),
        (pickle.dumps({"a": np.zeros(100)}, 2)[:-40], "complete pickle"),
        (b"", "complete pickle"),
        (b"not a pickle", "complete pickle"),
        (b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".", "complete pickle"),
    ],
)
def test_implausible_and_damaged_pickles_are_rejected(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(FaceSnapError, match=rf"bad\.pkl is .*{message}"):
        read_pickled_arrays(write(tmp_path / "bad.pkl", content))


@pytest.mark.parametrize("lines", [2**20, 2**28, 2**40])
def test_sparse_matrix_without_numbers_takes_no_memory(tmp_path: Path, lines: int) -> None:
    """An array of shape (lines, 0) needs no bytes in the file, but its length was that of the columns."""
    import scipy.sparse

    matrix = scipy.sparse.csc_matrix((4, 6))
    matrix.indptr = np.zeros((lines + 1, 0), np.int32)
    matrix._shape = (0, lines)
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"J": matrix}, 2))
    tracemalloc.start()
    try:
        with pytest.raises(FaceSnapError, match="an inconsistent sparse matrix"):
            read_pickled_arrays(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_huge_sparse_matrix_is_rejected(tmp_path: Path) -> None:
    import scipy.sparse

    huge = scipy.sparse.csc_matrix((10**8, 10**3))
    with pytest.raises(FaceSnapError, match=r"bad\.pkl .*far larger than the file"):
        read_pickled_arrays(write(tmp_path / "bad.pkl", {"J": huge}))


def test_repeated_references_to_an_array_take_no_additional_memory(tmp_path: Path) -> None:
    import scipy.sparse

    one = scipy.sparse.csc_matrix((10**3, 10**4))  # 80 MB as a dense array
    assert len(read_pickled_arrays(write(tmp_path / "same.pkl", dict.fromkeys("abcdefgh", one)))) == 8
    others = {name: scipy.sparse.csc_matrix((10**3, 10**4)) for name in "ab"}
    with pytest.raises(FaceSnapError, match=r"others\.pkl .*far larger than the file"):
        read_pickled_arrays(write(tmp_path / "others.pkl", others))


def test_declared_sizes_are_not_allocated(tmp_path: Path) -> None:
    """Python allocates the declared size of a bytearray before it reads the data."""
    path = write(tmp_path / "short.pkl", b"\x80\x05\x96" + (2**34).to_bytes(8, "little") + b"short.")
    with pytest.raises(FaceSnapError, match=r"short\.pkl is not a complete pickle"):
        read_pickled_arrays(path)


def test_nested_selections_are_evaluated_once(tmp_path: Path) -> None:
    """Each level refers to the next one twice, so 40 levels would take a trillion steps."""
    module = types.ModuleType("chumpy.reordering")
    module.Select = type("Select", (), {"__module__": "chumpy.reordering"})
    array: Any = np.zeros(4, np.int64)
    for _ in range(40):
        select = module.Select()
        select.a, select.idxs = array, array
        array = select
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "chumpy", types.ModuleType("chumpy"))
        patch.setitem(sys.modules, "chumpy.reordering", module)
        path = write(tmp_path / "deep.pkl", {"v": array})
    np.testing.assert_array_equal(read_pickled_arrays(path)["v"], np.zeros(4))


def test_missing_file_is_reported_by_name(tmp_path: Path) -> None:
    for read in (read_pickled_arrays, read_torch):
        with pytest.raises(FaceSnapError, match=r"absent\.pkl"):
            read(tmp_path / "absent.pkl")


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_of_both_formats_are_read(tmp_path: Path, zipped: bool) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    content = {"E_flame": OrderedDict(a=shared, b=shared.t()[1:], c=torch.ones(2).half()), "step": 7}
    torch.save(content, tmp_path / "m.tar", _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(tmp_path / "m.tar") is zipped
    read = read_torch(tmp_path / "m.tar")
    assert read["step"] == 7
    assert read["E_flame"].keys() == content["E_flame"].keys()
    assert all(torch.equal(read["E_flame"][key], tensor) for key, tensor in content["E_flame"].items())


@pytest.mark.parametrize("kind", ["stored", "compressed", "before torch 1.6"])
def test_tensors_may_be_views_of_a_file_unless_it_is_compressed(tmp_path: Path, kind: str) -> None:
    content = {"a": torch.randn(300, 40), "b": {"c": torch.randn(7).half()}, "t": torch.randn(5, 6).T}
    path, packed = tmp_path / "weights.bin", tmp_path / "packed.bin"
    torch.save(content, path, _use_new_zipfile_serialization=kind != "before torch 1.6")
    if kind == "compressed":
        with zipfile.ZipFile(path) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry in plain.namelist():
                archive.writestr(entry, plain.read(entry))
        path = packed
    read = read_torch(path, mapped=True)
    assert torch.equal(read["a"], content["a"])
    assert torch.equal(read["b"]["c"], content["b"]["c"])
    assert torch.equal(read["t"], content["t"])
    if sys.platform != "linux":  # only Linux lists a process's views of files
        return
    address = read["a"].data_ptr()
    regions = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    inside = any(int(low, 16) <= address < int(high, 16) for low, high in (region[0].split("-") for region in regions))
    assert inside == (kind == "stored")


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_torch_file_is_executed(tmp_path: Path, zipped: bool) -> None:
    created = tmp_path / "created"
    torch.save(
        {"a": torch.ones(2), "x": creates(created)[0]}, tmp_path / "evil.tar", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(FaceSnapError, match=r"evil\.tar contains \w+\.mkdir"):
        read_torch(tmp_path / "evil.tar")
    assert not created.exists()


def test_programs_archives_and_zip_bombs_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.serialization, "load", lambda *_, **__: pytest.fail("torch must not read these"))
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("model/data.pkl", b"")
        archive.writestr("model/constants.pkl", b"")
    with pytest.raises(FaceSnapError, match=r"script\.pt is a TorchScript program"):
        read_torch(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data/0", bytes(10**6))
    with pytest.raises(FaceSnapError, match=r"bomb\.pt would unpack to an implausible size"):
        read_torch(tmp_path / "bomb.pt")
    with tarfile.open(tmp_path / "old.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(FaceSnapError, match=r"old\.tar is a tar archive"):
        read_torch(tmp_path / "old.tar")


class Program(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def two_faced(program: bytes) -> bytes:
    """Return a zip with two central directories that differ in a name, to be found by different readers."""
    plain = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(program)) as read, zipfile.ZipFile(plain, "w") as stored:  # without 64 bits
        for name in read.namelist():
            stored.writestr(zipfile.ZipInfo(name), read.read(name))
    data = plain.getvalue()
    end = data.rindex(b"PK\5\6")
    size, start = struct.unpack("<II", data[end + 12 : end + 20])
    return data[:end] + data[start : start + size].replace(b"constants.pkl", b"constants.pkx") + data[end:]


def test_ambiguous_zip_files_are_rejected_before_torch_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch before 2.6, which both WebUIs pin, executes TorchScript in spite of `weights_only`."""
    program, weights, tar = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.script(Program()), program)
    torch.save({"a": torch.ones(2)}, weights)
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    monkeypatch.setattr(torch.serialization, "load", lambda *_, **__: pytest.fail("torch must not read these"))
    data, valid = two_faced(program.getvalue()), weights.getvalue()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert not any(name.endswith("constants.pkl") for name in archive.namelist())
    assert any(
        name.endswith("constants.pkl") for name in torch._C.PyTorchFileReader(io.BytesIO(data)).get_all_records()
    )
    locator = valid.rindex(b"PK\6\7")
    moved = valid[:locator] + struct.pack("<4sIQI", b"PK\6\7", 0, 0, 1) + valid[locator + 20 :]
    for name, content, message in (
        ("two-faced", data, "not a zip file as torch writes it"),
        ("elsewhere", moved, "not a zip file as torch writes it|damaged"),
        ("comment", valid[:-2] + b"\4\0PKPK", "not a zip file as torch writes it"),
        ("program", program.getvalue(), "TorchScript program"),
        ("tar, then zip", tar.getvalue() + valid, "tar archive"),
        ("text, then zip", b"text" + valid, "damaged or not a torch file|not a zip file"),
    ):
        path = tmp_path / f"{name}.pth"
        path.write_bytes(content)
        if name.startswith("text"):
            assert not is_torch_file(path)
            continue
        with pytest.raises(FaceSnapError, match=message):
            read_torch(path)


def test_tensor_far_larger_than_its_stored_data_is_rejected(tmp_path: Path) -> None:
    torch.save({"wide": torch.ones(1).expand(10**5, 10**5)}, tmp_path / "m.pt")
    for read in (read_index, read_tensors, fingerprint):
        with pytest.raises(FaceSnapError, match=r"m\.pt declares wide as far larger than its stored data"):
            read(tmp_path / "m.pt")


def test_slightly_expanded_tensors_are_read_and_sparse_ones_rejected(tmp_path: Path) -> None:
    few = torch.arange(3.0).expand(4, 3)
    torch.save({"few": few, "view": torch.arange(12.0).reshape(3, 4).t()[1:]}, tmp_path / "m.pt")
    assert torch.equal(read_tensors(tmp_path / "m.pt")["few"], few)
    torch.save({"a": torch.eye(2).to_sparse(), "b": few}, tmp_path / "sparse.pt")
    with pytest.raises(FaceSnapError, match=r"sparse\.pt contains the sparse tensor a"):
        read_index(tmp_path / "sparse.pt")


def test_torch_load_as_replaced_by_the_host_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A1111's replacement returns None for files of torch 2.7 and newer."""
    torch.save({"a": torch.ones(2)}, tmp_path / "m.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: None)
    assert torch.equal(read_torch(tmp_path / "m.pt")["a"], torch.ones(2))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 cut short", b"\x80\x02}q\x00.", b"text"])
def test_damaged_torch_files_are_reported_by_name(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(FaceSnapError, match=r"cut\.pt"):
        read_torch(write(tmp_path / "cut.pt", data))
