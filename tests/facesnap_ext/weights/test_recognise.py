"""Weight files are recognised by their tensors."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open as safetensors_open

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights import tensors
from facesnap_ext.weights.recognise import Kind, recognise, recognise_tensors, require
from tests.support.weight_files import KINDS, SDXL, write


@pytest.mark.parametrize("form", ["safetensors", "torch", "torch before 1.6"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_recognised_under_any_name(tmp_path, kind, form):
    path = write(tmp_path / "model.anything", KINDS[kind], form)
    assert recognise(path) is Kind[kind]


KNOWN_NAMES = sorted({name for shapes in KINDS.values() for name in shapes})


@given(st.dictionaries(st.sampled_from(KNOWN_NAMES), st.lists(st.integers(0, 4096), max_size=5).map(tuple)))
def test_any_shapes_of_known_names_give_some_kind(shapes):
    assert isinstance(recognise_tensors(shapes), Kind)


@pytest.mark.parametrize(("form", "kind"), [("facesnap-flame", Kind.FLAME), ("facesnap-deca", Kind.DECA)])
def test_converted_files_are_recognised_by_their_metadata(tmp_path, form, kind):
    assert recognise(write(tmp_path / "x.safetensors", {"weight": (3,)}, format=form)) is kind


def test_pickle_is_recognised_without_being_read(tmp_path):
    class Boom:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "generic_model.pkl"
    path.write_bytes(pickle.dumps(Boom(), protocol=2))
    assert recognise(path) is Kind.PICKLE
    assert not (tmp_path / "executed").exists()


def open_header(path, framework):
    class Header:
        def __init__(self):
            self.file = safetensors_open(path, framework=framework)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def __getattr__(self, name):
            assert name != "get_tensor", "data was read"
            return getattr(self.file, name)

    return Header()


def test_recognising_a_file_reads_no_data(tmp_path, monkeypatch):
    """It reads the header of safetensors files, and loads torch files as tensors without storage."""
    monkeypatch.setattr("safetensors.safe_open", open_header)
    for form in ("safetensors", "torch"):
        path = write(tmp_path / form, SDXL, form)
        assert tensors.read_index(path).shapes == SDXL


def test_file_of_another_kind_is_rejected_by_kind(tmp_path):
    path = write(tmp_path / "control.safetensors", KINDS["SD15_CONTROLNET"])
    with pytest.raises(FaceSnapError, match=r"control\.safetensors is an SD1\.5 ControlNet, not a FaceSnap file; use"):
        require(path, Kind.FACESNAP, "use another.")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"<html>404</html>", b"\x08\0\0\0\0\0\0\0{}      ", b"PK\x03\x04damaged"]
)
def test_damaged_files_are_reported_by_name(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    if content.endswith(b"      "):  # empty but valid
        assert recognise(path) is Kind.UNKNOWN
    else:
        with pytest.raises(FaceSnapError, match=r"broken\.safetensors is damaged"):
            recognise(path)


def test_truncated_file_is_reported(tmp_path):
    path = write(tmp_path / "x.safetensors", SDXL)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FaceSnapError, match=r"x\.safetensors is damaged"):
        recognise(path)


def test_missing_file_is_reported(tmp_path):
    for read in (recognise, tensors.read_index):
        with pytest.raises(FaceSnapError, match="no file"):
            read(tmp_path / "none.safetensors")


def test_torch_file_with_code_is_rejected_and_not_executed(tmp_path):
    class Boom:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "x.bin"
    torch.save({"weight": torch.zeros(3), "boom": Boom()}, path)
    with pytest.raises(FaceSnapError, match=r"x\.bin contains .* besides its tensors"):
        recognise(path)
    assert not (tmp_path / "executed").exists()


def test_read_tensors_selects_renames_and_casts(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a.one": (2,), "b.two": (3,)})
    result = tensors.read_tensors(path, lambda key: key[2:] if key.startswith("a.") else None, torch.float16)
    assert {key: (t.dtype, tuple(t.shape)) for key, t in result.items()} == {"one": (torch.float16, (2,))}
