"""Model folders with odd names, links and trees, and the stored hashes in them. What the page shows of them is text."""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facesnap_ext.cache import signature_of
from facesnap_ext.files import sha256
from facesnap_ext.identity import faces
from facesnap_ext.weights import model_list
from facesnap_ext.weights.identity_folder import choose_identity, find_identities
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.network_names import TITLES
from facesnap_ext.weights.networks import network_hash
from facesnap_ext.weights.search import find_models
from tests.fuzz import corpus
from tests.fuzz.harness import folder, fuzz, new_folder, refused, sample
from tests.fuzz.mutations import json_values, mutated
from tests.fuzz.networks import valid
from tests.fuzz.watch import only_reading
from tests.support.panel import OwnTags, mocked_panel

START = 2**12  # bytes of a large file that are mutated
HOSTILE = "'><img src=x onerror=alert(1)>"
NAMES = [
    *("antelopev2", "buffalo_l", "clip", "identities", "InstantID", "ControlNetModel", "__MACOSX", "checkpoints"),
    *("models [v1]", "a*b?", "[", "]", "{x}", "~", "%00", "a b", "…", "e\N{COMBINING ACUTE ACCENT}", "x" * 200, "con"),
    *(HOSTILE, "<script>alert(1)", "&lt;", '"', "`", "$(id)", ";id", "-rf", "#"),
    *("\N{RIGHT-TO-LEFT OVERRIDE}gnp", "\n", "\t", "\x7f", "\udcff\udcfe", ".hidden", "..."),
]
FILES = {
    "glintr100.onnx": "recognition",
    "scrfd_10g_bnkps.onnx": "detector",
    "1k3d68.onnx": "landmarks68",
    "deca_model.tar": "weights",
    "generic_model.pkl": "pickle",
    "a.safetensors": "weights",
    "model.safetensors": "weights",
    "config.json": "json",
    "hashes.json": "json",
    ".DS_Store": "noise",
    "._glintr100.onnx": "noise",
    "ip-adapter.bin": "weights",
    "x.PTH": "noise",
}


@cache
def contents(kind: str) -> list[bytes]:
    return {
        "weights": corpus.weights(),
        "pickle": corpus.pickles()[:6],
        "json": [b"{}", b"[]", b"[" * 5000, b"\xff"],
        "noise": [b"", b"\0\5\x16\7" + bytes(60), b"<html>"],
    }.get(kind) or [valid(kind)]


def add_entry(data: st.DataObject, parent: Path, root: Path, places: list[Path]) -> None:
    """Add a file, folder, link or something else to a folder of the tree."""
    name = data.draw(st.sampled_from([*FILES, *NAMES]))
    ending = "" if name in FILES else data.draw(st.sampled_from(["", "", ".onnx", ".safetensors", ".bin", ".pkl"]))
    path = parent / f"{name}{ending}"
    if os.path.lexists(path):
        return
    kind = data.draw(st.sampled_from(["file"] * 6 + ["folder"] * 4 + ["link"] * 3 + ["pipe", "sealed", "deep", "wide"]))
    if kind == "link":
        targets = [path, root, parent, root / "gone", root.parent / "outside", *places, Path("/dev/null")]
        path.symlink_to(data.draw(st.sampled_from(targets)))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "file":
        if name in FILES:
            path.write_bytes(data.draw(st.sampled_from(contents(FILES[name]))))
        else:
            path.touch()
        places.append(path)
    else:
        path.mkdir()
        places.append(path)
        if kind == "deep":
            deepest = path
            for _ in range(12):
                deepest /= "d"
            deepest.mkdir(parents=True)
            places.append(deepest)
        if kind == "wide":
            for i in range(300):
                (path / f"{i}{ending}").touch()
        if kind == "sealed":
            path.chmod(0)  # changes nothing for root


@pytest.fixture(scope="module")
def panel(tmp_path_factory):
    """The module of the panel, with a mock of gradio."""
    with mocked_panel(tmp_path_factory.mktemp("webui")) as module:
        yield module


@sample(40, share=0.5)
@given(data=st.data())
def test_model_folders(data, panel):
    base = workplace()
    for old in base.iterdir():
        remove(old)
    root = base / data.draw(st.sampled_from(["models", "models [v1]", "m*d?", "<b>models<b>"]))
    root.mkdir()
    (base / "outside").mkdir()
    places = [root, base / "outside"]
    for _ in range(data.draw(st.integers(1, 14))):
        parent = data.draw(st.sampled_from(places))
        if parent.is_dir() and not parent.is_symlink():
            add_entry(data, parent, root, places)
    (base / "loop").symlink_to(base / "loop")
    start = data.draw(st.sampled_from([root, root, root, *places, base / "loop"]))
    with only_reading(base):
        files = find_models(start, (base / "outside", root, base / "missing", base / "loop"))
        use(files, panel)
        for read in (faces.load_pack, faces.load_landmarks68, signature_of):
            for place in {start, *(model.path for model in files.found if model.role == "face_pack")}:
                refused(read, place)


def use(files: ModelFiles, panel: ModuleType) -> None:
    """Do what the page and a job do with the found models, up to loading them."""
    files.missing()
    refused(files.choose_facesnap)
    find_identities(files.folder)
    refused(choose_identity, files.folder, "a")
    for model in files.found:
        signature_of(model.path)
        if model.role in TITLES:
            refused(network_hash, model.role, model.path)
    roles = model_list.list_models(files)
    model_list.as_text(roles, files)
    json.dumps(model_list.to_json(roles))
    OwnTags(panel.html(roles, files))


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@cache
def workplace() -> Path:
    """A folder, and the libraries have been initialised before their actions are audited."""
    base = new_folder()
    write_pack(base)
    find_models(folder())
    faces.load_pack(base / "pack")
    return base


def write_pack(parent: Path) -> Path:
    pack = parent / "pack"
    pack.mkdir()
    for name in ("glintr100.onnx", "scrfd_10g_bnkps.onnx"):
        (pack / name).write_bytes(valid(FILES[name]))
    return pack


@fuzz
@given(data=st.data())
def test_stored_hashes(data, panel):
    """`hashes.json`, which anyone who can write to the model folder may have made."""
    base, pack = hashed_folder()
    known = {str(path): [path.stat().st_size, path.stat().st_mtime_ns, "0" * 64] for path in sorted(pack.iterdir())}
    hashes = st.sampled_from([*["0" * 64] * 4, "A" * 64, "0" * 63, "\u0660" * 64, HOSTILE])
    texts = st.sampled_from(["x" * 5000, "a/" * 4000, "\0", "\ud800", HOSTILE, *known])
    values = json_values(texts | hashes)
    sizes = st.sampled_from([0, 1, -1, 2**63, 10**40])
    entries = st.tuples(sizes, sizes, hashes).map(list) | st.lists(values | hashes, max_size=4)
    stored = data.draw(st.dictionaries(texts, entries, min_size=1, max_size=4) | values)
    if isinstance(stored, dict) and data.draw(st.booleans()):
        stored = {**known, **stored}
    text = json.dumps(stored).encode()
    odd = [b"[" * 10**5, b"1" * 10**5, b'{"a":' * 10**4, b"\xff\xfe" + text]
    content = data.draw(st.sampled_from([text] * 8 + odd))
    if not data.draw(st.integers(0, 3)):
        content = data.draw(mutated([content[:START]]))
    (base / "hashes.json").write_bytes(content)
    with only_reading(base, may_change=True):
        files = find_models(base)
        assert files.face_pack == pack
        use(files, panel)
        listed = model_list.list_models(files)
        shown = [file for role in listed for model in role.found for file in model.files]
        assert all(re.fullmatch("([0-9a-f]{64})?", file.sha256, re.ASCII) for file in shown)
        assert not any(file.verdict.startswith("verified") for file in shown)
        model_list.compute_hashes(files)
        use(files, panel)
    stored = json.loads((base / "hashes.json").read_bytes())
    expected = {str(path): sha256(path) for path in pack.iterdir()}
    assert {path: entry[2] for path, entry in stored.items()} == expected


@cache
def hashed_folder() -> tuple[Path, Path]:
    base = new_folder()
    pack = write_pack(base)
    model_list.compute_hashes(find_models(base))
    return base, pack
