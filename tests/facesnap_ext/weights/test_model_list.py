"""What is known of every part: found where, of which kind, size, hash and licence; and what is missing."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights import catalogue, model_list
from facesnap_ext.weights.search import find_models
from tests.support.weight_files import KINDS, write

ADAPTER = KINDS["INSTANTID_ADAPTER"]


def stock(folder, *elsewhere):
    return {role.name: role for role in model_list.list_models(find_models(folder, elsewhere))}


@pytest.fixture
def own(tmp_path):
    folder = tmp_path / "facesnap"
    (folder / "auraface").mkdir(parents=True)
    (folder / "auraface" / "scrfd_10g_bnkps.onnx").write_bytes(b"detector")
    (folder / "auraface" / "glintr100.onnx").write_bytes(b"recognition")
    write(folder / "a.safetensors", {"ffrnet.x": (1,)}, format="facesnap", license="CC0-1.0")
    return folder


def test_every_part_is_listed_found_or_missing(own, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    clip = write(other / "h.safetensors", KINDS["CLIP_VISION"])
    found = stock(own, other)
    assert list(found) == list(catalogue.ROLES)
    assert {name for name, role in found.items() if role.needed} == {"facesnap", "face_pack"}
    assert {name for name, role in found.items() if role.missing} == {"deca", "flame"}
    (holding,) = found["clip"].holdings
    assert (holding.path, holding.where, holding.kind) == (str(clip), str(other), "a CLIP image encoder")
    assert (holding.licence, holding.used) == ("MIT (commercial use allowed)", True)
    (holding,) = found["face_pack"].holdings
    assert (holding.path, holding.where) == ("auraface", str(own))
    assert holding.licence == "Apache-2.0 (commercial use allowed), if it is what its name says: AuraFace"
    assert [(file.name, file.size, file.sha256) for file in holding.files] == [
        ("glintr100.onnx", 11, ""),
        ("scrfd_10g_bnkps.onnx", 8, ""),
    ]
    assert found["facesnap"].holdings[0].licence == "CC0-1.0"


@pytest.mark.parametrize(
    ("source", "licence"),
    [
        ("generic_model.pkl", "depends on where it is from: CC-BY-4.0 (commercial use allowed), non-commercial"),
        ("flame2020.pkl", "non-commercial research (no commercial use), if it is what its name says: FLAME 2020"),
        ("flame2023.pkl", "depends on where it is from: CC-BY-4.0 (commercial use allowed), non-commercial"),
        ("flame2023_Open.pkl", "CC-BY-4.0 (commercial use allowed), if it is what its name says: FLAME 2023 Open"),
    ],
)
def test_a_converted_file_has_the_licence_of_what_it_was_made_of(own, source, licence):
    write(own / "flame.safetensors", {"v_template": (3, 3)}, format="facesnap-flame", source=source)
    assert stock(own)["flame"].holdings[0].licence.startswith(licence)


def test_a_newcomer_is_told_what_to_begin_with_and_a_user_of_instantid_misses_nothing(tmp_path):
    empty = find_models(tmp_path / "none")
    told = model_list.as_text(model_list.list_models(empty), empty)
    assert "To begin: InstantID's two files, which FaceSnap downloads" in told
    assert told.count("MISSING") == 3  # and CLIP, which a FaceSnap file would want
    write(tmp_path / "ip-adapter.bin", ADAPTER, "torch")
    write(tmp_path / "net.safetensors", KINDS["SDXL_CONTROLNET"])
    (tmp_path / "antelopev2").mkdir()
    for name in ("scrfd_10g_bnkps.onnx", "glintr100.onnx"):
        (tmp_path / "antelopev2" / name).touch()
    files = find_models(tmp_path)
    told = model_list.as_text(model_list.list_models(files), files)
    assert "To begin" not in told
    assert "MISSING" not in told


def test_what_is_not_used_says_so(own, tmp_path):
    first = write(own / "b.safetensors", KINDS["CLIP_VISION"])
    write(own / "c.safetensors", KINDS["CLIP_VISION"])
    assert [(holding.path, holding.used) for holding in stock(own)["clip"].holdings] == [
        (first.name, True),
        ("c.safetensors", False),
    ]


def test_instantid_serves_where_there_is_no_facesnap_file(tmp_path):
    write(tmp_path / "ip-adapter.bin", ADAPTER, "torch")
    write(tmp_path / "net.safetensors", KINDS["SDXL_CONTROLNET"])
    files = find_models(tmp_path)
    roles = {role.name: role for role in model_list.list_models(files)}
    assert [holding.used for holding in roles["instantid"].holdings] == [True, True]
    assert {name for name, role in roles.items() if role.missing} == {"face_pack", "deca", "flame"}
    assert model_list.as_text([roles["facesnap"], roles["clip"]], files).count("MISSING") == 0


def test_hashes_are_remembered_until_a_file_changes(own, monkeypatch):
    told = []
    model_list.compute_hashes(find_models(own), told.append)
    assert told == ["hashing a.safetensors", "hashing glintr100.onnx", "hashing scrfd_10g_bnkps.onnx"]
    files = stock(own)["face_pack"].holdings[0].files
    assert [file.sha256 for file in files] == [
        hashlib.sha256(content).hexdigest() for content in (b"recognition", b"detector")
    ]
    assert {file.verdict for file in files} == {""}  # no hash of a pack is known
    (own / "auraface" / "glintr100.onnx").write_bytes(b"RECOGNITION")
    assert [bool(file.sha256) for file in stock(own)["face_pack"].holdings[0].files] == [False, True]
    told.clear()
    model_list.compute_hashes(find_models(own), told.append)
    assert told == ["hashing glintr100.onnx"]
    for damaged in ("{", "[]", '{"a": 1}', '{"a": [1]}', "null"):
        (own / model_list.HASHES).write_text(damaged)
        assert stock(own)["face_pack"].holdings[0].files[1].sha256 == ""


def test_a_known_hash_is_told_from_an_unknown_one(own, monkeypatch):
    path = write(own / "ip-adapter.bin", ADAPTER, "torch")
    model_list.compute_hashes(find_models(own))
    assert stock(own)["instantid"].holdings[0].files[0].verdict == "not a file that FaceSnap knows"
    known = replace(catalogue.PARTS[-1], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(catalogue, "PARTS", (known,))
    assert stock(own)["instantid"].holdings[0].files[0].verdict == "the known file: InstantID's adapter"


def test_hashes_that_cannot_be_written_are_an_error_of_one_sentence(own, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    files = find_models(own)
    monkeypatch.setattr(inventory, "_write_hashes", refuse)
    with pytest.raises(FaceSnapError, match=r"a\.safetensors cannot be computed, or written .*Permission denied"):
        model_list.compute_hashes(files)


def test_a_part_is_known_to_be_there_by_its_size(own, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    path = write(other / "ip-adapter_instant_id_sdxl.bin", ADAPTER, "torch")
    files = find_models(own, [other])
    part = replace(catalogue.PARTS[-1], size=path.stat().st_size)
    assert model_list.is_there(part, files) == path
    assert model_list.is_there(catalogue.PARTS[-1], files) is None


def test_text_and_json_say_the_same(own):
    files = find_models(own)
    roles = model_list.list_models(files)
    text = model_list.as_text(roles, files)
    for part in catalogue.PARTS:
        assert f"{part.title}, " in text
        assert part.licence in text
        assert part.into in text
    assert (
        text.count("MISSING")
        == sum(role["needed"] and bool(role["missing"]) for role in model_list.to_json(roles))
        == 1
    )
    assert all(gap in text for gap in catalogue.COMMERCIAL_GAPS)
    assert json.loads(json.dumps(model_list.to_json(roles)))[0]["holdings"][0]["path"] == "a.safetensors"


def test_the_catalogue_has_a_hash_and_its_source_for_whatever_is_downloaded_and_goes_into_the_folder():
    names = [part.name for part in catalogue.PARTS]
    assert len(set(names)) == len(names)
    assert {part.role for part in catalogue.PARTS} == set(catalogue.ROLES)
    for part in catalogue.PARTS:
        assert bool(part.url) == bool(part.sha256) == bool(part.hash_from)
        assert not part.url or part.url.startswith("https://")
        assert re.fullmatch(r"([0-9a-f]{64})?", part.sha256)
        assert not Path(part.into).is_absolute()
        assert ".." not in Path(part.into).parts


def test_hosts_are_named_in_the_catalogue_alone():
    package = Path(catalogue.__file__).parents[1]
    error_prefix = {
        path.name
        for path in package.rglob("*.py")
        if re.search(r"https?://(?!127\.0\.0\.1)[^\s\"']*(huggingface|releases|tue\.mpg)", path.read_text("utf-8"))
    }
    assert error_prefix == {"catalogue.py"}


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 bytes"), (999, "999 bytes"), (300_000, "300 kB"), (2_502_139_136, "2.50 GB")]
)
def test_sizes_are_told_in_words(count, words):
    assert model_list.readable(count) == words
