"""Weight files are known by their tensors and named as what they are."""

from __future__ import annotations

import pickle

import pytest
import torch
from weight_files import KINDS, SDXL, write

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights import tensors
from facesnap_ext.weights.recognise import Kind, recognise, require


@pytest.mark.parametrize("torch_file", [False, True], ids=["safetensors", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_recognised_under_any_name(tmp_path, kind, torch_file):
    path = write(tmp_path / "model.anything", KINDS[kind], torch_file)
    assert recognise(path) is Kind[kind]


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


def test_no_number_is_read_to_recognise_a_file(tmp_path):
    """A file whose numbers are cut off is still recognised from its header... unless its header says otherwise."""
    path = write(tmp_path / "x.safetensors", SDXL)
    index = tensors.read_index(path)
    assert index.shapes == SDXL


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
    with pytest.raises(FaceSnapError, match="cannot be read"):
        recognise(tmp_path / "none.safetensors")
    with pytest.raises(FaceSnapError, match="no file"):
        tensors.read_index(tmp_path / "none.safetensors")


def test_a_torch_file_with_code_is_refused_and_runs_nothing(tmp_path):
    class Boom:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "x.bin"
    torch.save({"weight": torch.zeros(3), "boom": Boom()}, path)
    with pytest.raises(FaceSnapError, match="holds more than tensors"):
        recognise(path)
    assert not (tmp_path / "executed").exists()


def test_reading_selects_renames_and_casts(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a.one": (2,), "b.two": (3,)})
    got = tensors.read_tensors(path, lambda key: key[2:] if key.startswith("a.") else None, torch.float16)
    assert {key: (t.dtype, tuple(t.shape)) for key, t in got.items()} == {"one": (torch.float16, (2,))}
