"""Weight files are known by their tensors and named as what they are."""

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
def test_tensors_of_known_names_and_any_shapes_are_some_kind(shapes):
    assert isinstance(recognise_tensors(shapes), Kind)


@pytest.mark.parametrize(("form", "kind"), [("facesnap-flame", Kind.FLAME), ("facesnap-deca", Kind.DECA)])
def test_converted_files_say_what_they_are(tmp_path, form, kind):
    assert recognise(write(tmp_path / "x.safetensors", {"weight": (3,)}, format=form)) is kind


def test_a_pickle_is_named_without_being_read(tmp_path):
    class Boom:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "generic_model.pkl"
    path.write_bytes(pickle.dumps(Boom(), protocol=2))
    assert recognise(path) is Kind.PICKLE
    assert not (tmp_path / "executed").exists()


def no_numbers(path, framework):
    class Header:
        def __init__(self):
            self.file = safetensors_open(path, framework=framework)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def __getattr__(self, name):
            assert name != "get_tensor", "numbers were read"
            return getattr(self.file, name)

    return Header()


def test_no_number_is_read_to_recognise_a_file(tmp_path, monkeypatch):
    """From safetensors' header, or with torch's own tensors without storage."""
    monkeypatch.setattr("safetensors.safe_open", no_numbers)
    for form in ("safetensors", "torch"):
        path = write(tmp_path / form, SDXL, form)
        assert tensors.read_index(path).shapes == SDXL


def test_a_file_of_another_kind_is_named_as_what_it_is(tmp_path):
    path = write(tmp_path / "control.safetensors", KINDS["SD15_CONTROLNET"])
    with pytest.raises(FaceSnapError, match=r"control\.safetensors is an SD1\.5 ControlNet, not a FaceSnap file; use"):
        require(path, Kind.FACESNAP, "use another.")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"<html>404</html>", b"\x08\0\0\0\0\0\0\0{}      ", b"PK\x03\x04damaged"]
)
def test_damaged_files_are_told_by_name(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    if content.endswith(b"      "):  # an empty but whole file
        assert recognise(path) is Kind.UNKNOWN
    else:
        with pytest.raises(FaceSnapError, match=r"broken\.safetensors is damaged"):
            recognise(path)


def test_a_file_cut_short_is_told(tmp_path):
    path = write(tmp_path / "x.safetensors", SDXL)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FaceSnapError, match=r"x\.safetensors is damaged"):
        recognise(path)


def test_a_missing_file_is_told(tmp_path):
    for read in (recognise, tensors.read_index):
        with pytest.raises(FaceSnapError, match="no file"):
            read(tmp_path / "none.safetensors")


def test_a_torch_file_with_code_is_refused_and_runs_nothing(tmp_path):
    class Boom:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "x.bin"
    torch.save({"weight": torch.zeros(3), "boom": Boom()}, path)
    with pytest.raises(FaceSnapError, match=r"x\.bin holds .* beside its tensors"):
        recognise(path)
    assert not (tmp_path / "executed").exists()


def test_reading_selects_renames_and_casts(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a.one": (2,), "b.two": (3,)})
    got = tensors.read_tensors(path, lambda key: key[2:] if key.startswith("a.") else None, torch.float16)
    assert {key: (t.dtype, tuple(t.shape)) for key, t in got.items()} == {"one": (torch.float16, (2,))}
