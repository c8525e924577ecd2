"""The list of model files: location, kind, size, hash and licence of each part, and what is missing."""

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


def roles_of(folder, *elsewhere):
    return {role.name: role for role in model_list.list_models(find_models(folder, elsewhere))}


@pytest.fixture
def own(tmp_path):
    folder = tmp_path / "facesnap"
    (folder / "auraface").mkdir(parents=True)
    (folder / "auraface" / "scrfd_10g_bnkps.onnx").write_bytes(b"detector")
    (folder / "auraface" / "glintr100.onnx").write_bytes(b"recognition")
    write(folder / "a.safetensors", {"ffrnet.x": (1,)}, format="facesnap", license="CC0-1.0")
    return folder


def test_every_part_is_listed_as_found_or_missing(own, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    clip = write(other / "h.safetensors", KINDS["CLIP_VISION"])
    roles = roles_of(own, other)
    assert list(roles) == list(catalogue.ROLES)
    assert {name for name, role in roles.items() if role.needed} == {"facesnap", "face_pack"}
    assert {name for name, role in roles.items() if role.missing} == set()
    (model,) = roles["clip"].found
    assert (model.path, model.folder, model.kind) == (str(clip), str(other), "a CLIP image encoder")
    assert (model.licence, model.used) == ("MIT (commercial use allowed)", True)
    (model,) = roles["face_pack"].found
    assert (model.path, model.folder) == ("auraface", str(own))
    assert model.licence == "Apache-2.0 (commercial use allowed), judging by the file name: AuraFace"
    assert [(file.name, file.size, file.sha256) for file in model.files] == [
        ("glintr100.onnx", 11, ""),
        ("scrfd_10g_bnkps.onnx", 8, ""),
    ]
    assert roles["facesnap"].found[0].licence == "CC0-1.0"


@pytest.mark.parametrize(
    ("source", "licence"),
    [
        (
            "generic_model.pkl",
            "depends on where the file came from: CC-BY-4.0 (commercial use allowed), non-commercial",
        ),
        ("flame2020.pkl", "non-commercial research (no commercial use), judging by the file name: FLAME 2020"),
        ("flame2023.pkl", "depends on where the file came from: CC-BY-4.0 (commercial use allowed), non-commercial"),
        ("flame2023_Open.pkl", "CC-BY-4.0 (commercial use allowed), judging by the file name: FLAME 2023 Open"),
    ],
)
def test_converted_file_has_the_licence_of_its_source(own, source, licence):
    write(own / "flame.safetensors", {"v_template": (3, 3)}, format="facesnap-flame", source=source)
    assert roles_of(own)["flame"].found[0].licence.startswith(licence)


def test_new_users_see_how_to_get_started_and_instantid_users_miss_nothing(tmp_path):
    empty = find_models(tmp_path / "none")
    text = model_list.as_text(model_list.list_models(empty), empty)
    assert "To get started, you need InstantID's two files and antelopev2, which FaceSnap can download" in text
    needed = {role.name for role in model_list.list_models(empty) if role.needed}
    assert needed == {"instantid", "face_pack"}, "nobody has published a FaceSnap file"
    assert text.count("MISSING") == 2
    write(tmp_path / "ip-adapter.bin", ADAPTER, "torch")
    write(tmp_path / "net.safetensors", KINDS["SDXL_CONTROLNET"])
    (tmp_path / "antelopev2").mkdir()
    for name in ("scrfd_10g_bnkps.onnx", "glintr100.onnx"):
        (tmp_path / "antelopev2" / name).touch()
    files = find_models(tmp_path)
    text = model_list.as_text(model_list.list_models(files), files)
    assert "To get started" not in text
    assert "MISSING" not in text


def test_unused_models_are_marked(own, tmp_path):
    first = write(own / "b.safetensors", KINDS["CLIP_VISION"])
    write(own / "c.safetensors", KINDS["CLIP_VISION"])
    assert [(model.path, model.used) for model in roles_of(own)["clip"].found] == [
        (first.name, True),
        ("c.safetensors", False),
    ]


def test_instantid_is_used_if_there_is_no_facesnap_file(tmp_path):
    write(tmp_path / "ip-adapter.bin", ADAPTER, "torch")
    write(tmp_path / "net.safetensors", KINDS["SDXL_CONTROLNET"])
    files = find_models(tmp_path)
    roles = {role.name: role for role in model_list.list_models(files)}
    assert [model.used for model in roles["instantid"].found] == [True, True]
    assert {name for name, role in roles.items() if role.missing} == {"face_pack"}
    assert model_list.as_text([roles["facesnap"], roles["clip"]], files).count("MISSING") == 0


def test_hashes_are_stored_until_a_file_changes(own):
    messages = []
    model_list.compute_hashes(find_models(own), messages.append)
    assert messages == ["hashing a.safetensors", "hashing glintr100.onnx", "hashing scrfd_10g_bnkps.onnx"]
    files = roles_of(own)["face_pack"].found[0].files
    assert [file.sha256 for file in files] == [
        hashlib.sha256(content).hexdigest() for content in (b"recognition", b"detector")
    ]
    assert {file.verdict for file in files} == {""}  # the catalogue has no hashes of AuraFace
    (own / "auraface" / "glintr100.onnx").write_bytes(b"RECOGNITION")
    assert [bool(file.sha256) for file in roles_of(own)["face_pack"].found[0].files] == [False, True]
    messages.clear()
    model_list.compute_hashes(find_models(own), messages.append)
    assert messages == ["hashing glintr100.onnx"]
    for damaged in ("{", "[]", '{"a": 1}', '{"a": [1]}', "null"):
        (own / model_list.HASHES).write_text(damaged)
        assert roles_of(own)["face_pack"].found[0].files[1].sha256 == ""


def test_known_hashes_are_distinguished_from_unknown_ones(own, monkeypatch):
    path = write(own / "ip-adapter.bin", ADAPTER, "torch")
    model_list.compute_hashes(find_models(own))
    assert roles_of(own)["instantid"].found[0].files[0].verdict == "unknown hash"
    content = path.read_bytes()
    known = replace(catalogue.PARTS[-1], sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    monkeypatch.setattr(catalogue, "PARTS", (known,))
    assert roles_of(own)["instantid"].found[0].files[0].verdict == "verified: InstantID's adapter"


def test_stored_hash_alone_does_not_verify_a_file(own, monkeypatch):
    """Someone else may have written hashes.json together with the file."""
    path = write(own / "ip-adapter.bin", ADAPTER, "torch")
    known = replace(catalogue.PARTS[-1], sha256="0" * 64, size=path.stat().st_size)
    monkeypatch.setattr(catalogue, "PARTS", (known,))
    entry = [path.stat().st_size, path.stat().st_mtime_ns, "0" * 64]
    (own / model_list.HASHES).write_text(json.dumps({str(path): entry}))
    verdict = roles_of(own)["instantid"].found[0].files[0].verdict
    assert verdict == "InstantID's adapter according to a stored hash (not verified)"
    monkeypatch.setattr(catalogue, "PARTS", (replace(known, size=known.size + 1),))
    assert roles_of(own)["instantid"].found[0].files[0].verdict == "unknown hash"
    model_list.compute_hashes(find_models(own))
    assert roles_of(own)["instantid"].found[0].files[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


NO_HASHES = [
    *("'><img src=x onerror=alert(1)>", "<script>alert(1)</script>", '" onmouseover="alert(1)', "javascript:alert(1)"),
    *("", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "\u0660" * 64, "0" * 64 + "\n"),
    *(0, 1e999, None, True, [], {}),
]


@pytest.mark.parametrize("value", NO_HASHES)
def test_stored_hash_of_another_form_is_ignored(own, value):
    path = own / "a.safetensors"
    entry = [path.stat().st_size, path.stat().st_mtime_ns, value]
    (own / model_list.HASHES).write_text(json.dumps({str(path): entry}))
    assert roles_of(own)["facesnap"].found[0].files[0].sha256 == ""
    assert model_list._read_hashes(own) == {}


DAMAGED = {
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a number": b"3",
    "a long number": b"9" * 10_000,
    "text": b'"x"',
    "not UTF-8": b"\xff\xfe{}",
    "UTF-16": "{}".encode("utf-16"),
    "a null byte": b"\x00",
    "a list of entries": b'[["a", 1, 2]]',
    "entries of other forms": b'{"a": 1, "b": [], "c": [1, 2], "d": {"x": 1}, "e": [1, 2, 3, 4], "f": "abc"}',
    "infinite numbers": b'{"a": [Infinity, NaN, "0"]}',
    "too large": b" " * 2**23 + b"{}",
}


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_hashes_are_computed_again(own, content):
    (own / model_list.HASHES).write_bytes(DAMAGED[content])
    assert roles_of(own)["facesnap"].found[0].files[0].sha256 == ""
    model_list.compute_hashes(find_models(own))
    assert len(roles_of(own)["facesnap"].found[0].files[0].sha256) == 64


@pytest.mark.parametrize("path", ["x" * 5000, "/" + "a/" * 4000, "\0", "\ud800", "", "<b>", "/etc/passwd"])
def test_hashes_of_paths_that_are_no_models_are_dropped(own, path):
    """A name that is too long for the file system made every later computation fail."""
    (own / "hashes.json").write_text(json.dumps({path: [1, 1, "0" * 64]}))
    files = find_models(own)
    model_list.compute_hashes(files)
    assert set(json.loads((own / "hashes.json").read_text())) == {
        str(path) for model in files.found for path in model_list._files_of(model.path)
    }


def test_hashes_that_are_a_folder_are_ignored(own):
    (own / model_list.HASHES).mkdir()
    assert roles_of(own)["facesnap"].found[0].files[0].sha256 == ""


def test_file_that_vanishes_is_not_listed(own):
    files = find_models(own)
    (own / "a.safetensors").unlink()
    roles = {role.name: role for role in model_list.list_models(files)}
    assert roles["facesnap"].found == ()
    assert len(roles["face_pack"].found) == 1


def test_unwritable_hashes_are_reported(own, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    files = find_models(own)
    monkeypatch.setattr(model_list, "_write_hashes", refuse)
    with pytest.raises(FaceSnapError, match=r"a\.safetensors cannot be computed or stored .*Permission denied"):
        model_list.compute_hashes(files)


def test_existing_file_of_a_part_is_recognised_by_its_size(own, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    path = write(other / "ip-adapter_instant_id_sdxl.bin", ADAPTER, "torch")
    files = find_models(own, [other])
    part = replace(catalogue.PARTS[-1], size=path.stat().st_size)
    assert model_list.existing_file(part, files) == path
    assert model_list.existing_file(catalogue.PARTS[-1], files) is None


def test_text_and_json_agree(own):
    files = find_models(own)
    roles = model_list.list_models(files)
    text = model_list.as_text(roles, files)
    for part in catalogue.PARTS:
        assert f"{part.title}, " in text
        assert part.licence in text
        assert part.target in text
    dictionaries = model_list.to_json(roles)
    assert text.count("MISSING") == sum(role["needed"] and bool(role["missing"]) for role in dictionaries) == 1
    assert all(gap in text for gap in catalogue.COMMERCIAL_GAPS)
    assert json.loads(json.dumps(dictionaries))[0]["found"][0]["path"] == "a.safetensors"


def test_downloadable_parts_have_a_sourced_hash_and_a_target_in_the_model_folder():
    names = [part.name for part in catalogue.PARTS]
    assert len(set(names)) == len(names)
    assert {part.role for part in catalogue.PARTS} == set(catalogue.ROLES)
    for part in catalogue.PARTS:
        assert bool(part.url) == bool(part.sha256) == bool(part.hash_from)
        assert not part.url or part.url.startswith("https://")
        assert re.fullmatch(r"([0-9a-f]{64})?", part.sha256)
        assert not Path(part.target).is_absolute()
        assert ".." not in Path(part.target).parts


def test_only_the_catalogue_names_hosts():
    package = Path(catalogue.__file__).parents[1]
    modules = {
        path.name
        for path in package.rglob("*.py")
        if re.search(r"https?://(?!127\.0\.0\.1)[^\s\"']*(huggingface|releases|tue\.mpg)", path.read_text("utf-8"))
    }
    assert modules == {"catalogue.py"}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (300_000, "300 kB"), (2_502_139_136, "2.50 GB")]
)
def test_sizes_are_formatted_with_units(count, text):
    assert model_list.format_size(count) == text


PACK = [part for part in catalogue.PARTS if part.name.startswith("antelopev2-")]


def pack_with(folder, sizes):
    folder.mkdir(parents=True)
    for name, size in sizes.items():
        with (folder / name).open("wb") as file:
            file.truncate(size)


@pytest.mark.parametrize("missing", [None, *(part.name for part in PACK)])
def test_a_pack_counts_as_downloaded_only_if_all_of_its_files_are_together(tmp_path, missing):
    """buffalo_l has the same detector and landmark model as antelopev2, under other names."""
    sizes = {Path(part.target).name: part.size for part in PACK if part.name != missing}
    pack_with(tmp_path / "elsewhere", sizes)
    pack_with(tmp_path / "buffalo_l", {"det_10g.onnx": PACK[0].size, "w600k_r50.onnx": 1, "1k3d68.onnx": PACK[2].size})
    found = [model_list.existing_file(part, find_models(tmp_path)) for part in PACK]
    if missing is None:
        assert [path.name for path in found] == list(sizes)
    else:
        assert found == [None] * 3


@pytest.mark.parametrize(
    ("folder", "verdict"), [("antelopev2", "unknown hash"), ("buffalo_l", ""), ("auraface", ""), ("faces", "")]
)
def test_the_hash_of_a_pack_of_a_different_name_is_not_expected_to_be_known(tmp_path, folder, verdict):
    pack_with(tmp_path / folder, {"scrfd_10g_bnkps.onnx": 3, "glintr100.onnx": 4})
    model_list.compute_hashes(find_models(tmp_path))
    assert {file.verdict for file in roles_of(tmp_path)["face_pack"].found[0].files} == {verdict}


def test_the_starter_bundle_is_what_instantid_needs():
    parts = catalogue.downloadable("starter")
    assert {part.role for part in parts} == {"instantid", "face_pack"}
    assert 4.5e9 < sum(part.size for part in parts) < 4.7e9
    assert all(part.url.startswith("https://") and len(part.sha256) == 64 for part in parts)
