"""What is found in the model folders, under any names."""

from __future__ import annotations

import pytest
from weight_files import KINDS, write

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.places import find_models


def pack(folder):
    folder.mkdir(parents=True)
    (folder / "det.onnx").touch()
    return folder


def test_files_are_found_by_what_is_in_them(tmp_path):
    clip = write(tmp_path / "zebra.safetensors", KINDS["CLIP_VISION"])
    deca = write(tmp_path / "anything.tar", KINDS["DECA_ORIGINAL"], "torch")
    flame = write(tmp_path / "head.safetensors", {"v_template": (3, 3)}, format="facesnap-flame")
    first = write(tmp_path / "b.safetensors", {"ffrnet.conv_in.weight": (1,)})
    second = write(tmp_path / "a.safetensors", {"mixer.queries": (1,)}, format="facesnap")
    faces = pack(tmp_path / "my pack")
    files = find_models(tmp_path)
    assert (files.clip, files.deca, files.flame, files.face_pack) == (clip, deca, flame, faces)
    assert files.facesnap == {"a.safetensors": second, "b.safetensors": first}
    assert files.unreadable == []


def test_converted_files_come_before_the_originals(tmp_path):
    write(tmp_path / "a.tar", KINDS["DECA_ORIGINAL"], "torch")
    converted = write(tmp_path / "z.safetensors", {"x": (1,)}, format="facesnap-deca")
    assert find_models(tmp_path).deca == converted


@pytest.mark.parametrize("layout", ["antelopev2", "antelopev2/antelopev2"])
def test_a_pack_is_found_flat_and_nested_here_and_in_insightfaces_folder(tmp_path, layout):
    pack(tmp_path / "here" / layout)
    pack(tmp_path / "insightface" / "models" / layout)
    assert find_models(tmp_path / "here").face_pack == tmp_path / "here" / "antelopev2"
    other = (tmp_path / "insightface" / "models", tmp_path / "insightface")
    assert find_models(tmp_path / "none", other).face_pack == tmp_path / "insightface" / "models" / "antelopev2"
    assert find_models(tmp_path / "here", other).face_pack == tmp_path / "here" / "antelopev2"


def test_a_clip_folder_of_transformers_is_found(tmp_path):
    folder = tmp_path / "CLIP-ViT-H"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert find_models(tmp_path).clip == folder


def test_what_is_passed_over_is_said_where_something_is_missing(tmp_path):
    write(tmp_path / "control.safetensors", KINDS["SD15_CONTROLNET"])
    (tmp_path / "half.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("not a weight file")
    files = find_models(tmp_path)
    with pytest.raises(
        FaceSnapError, match=r"control\.safetensors is an SD1\.5 ControlNet.*half\.safetensors is damaged"
    ):
        files.choose_facesnap()
    assert "notes" not in " ".join(files.unreadable)


def test_a_file_that_changed_is_recognised_anew(tmp_path):
    path = write(tmp_path / "x.safetensors", KINDS["LORA"])
    assert find_models(tmp_path).clip is None
    write(path, KINDS["CLIP_VISION"])
    assert find_models(tmp_path).clip == path
