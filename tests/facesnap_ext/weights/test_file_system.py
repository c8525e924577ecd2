"""Model folders with links, loops, deep trees and many files cost bounded time, and stop no job."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from facesnap_ext.cache import signature_of
from facesnap_ext.weights import model_list
from facesnap_ext.weights.identity_folder import find_identities
from facesnap_ext.weights.search import find_models
from tests.support.face_packs import write_pack
from tests.support.weight_files import KINDS, write


def dangling(folder):
    for place in (folder, folder / "antelopev2", folder / "clip", folder / "identities"):
        for name in ("gone.onnx", "gone.safetensors", "0.bin", "config.json.lock", "gone"):
            (place / name).symlink_to(folder / "nowhere" / name)


def loops(folder):
    for place in (folder, folder / "antelopev2", folder / "clip", folder / "identities"):
        (place / "loop.onnx").symlink_to(place / "loop.onnx")
        (place / "loop.safetensors").symlink_to(place / "loop.safetensors")
        (place / "round").symlink_to(folder)
        (place / "here").symlink_to(place)


def deep(folder):
    for place in (folder, folder / "antelopev2", folder / "clip"):
        here = os.open(place, os.O_RDONLY)
        for _ in range(2100):  # deeper than the longest possible path
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(here)


def many(folder):
    for place in (folder, folder / "antelopev2", folder / "clip"):
        for i in range(7000):
            (place / f"{i}.txt").touch()


def folders(folder):
    for i in range(3000):
        (folder / "antelopev2" / f"{i:05d}").mkdir()


def odd_kinds(folder):
    for place in (folder, folder / "antelopev2"):
        os.mkfifo(place / "pipe.onnx")
        os.mkfifo(place / "pipe.safetensors")
        (place / "folder.onnx").mkdir()
        (place / "folder.safetensors").mkdir()


ODDITIES = {function.__name__: function for function in (dangling, loops, deep, many, folders, odd_kinds)}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_odd_folders_cost_bounded_time_and_change_nothing(tmp_path, oddity):
    folder = tmp_path / "facesnap"
    pack = write_pack(folder / "antelopev2", "antelopev2")
    (folder / "clip").mkdir()
    (folder / "identities").mkdir()
    write(folder / "clip" / "model.safetensors", KINDS["CLIP_VISION"])
    (folder / "clip" / "config.json").write_text("{}")
    before = find_models(folder)
    ODDITIES[oddity](folder)
    start = time.perf_counter()
    for _ in range(3):
        files = find_models(folder)
        model_list.as_text(model_list.list_models(files), files)
        find_identities(folder)
        signatures = [signature_of(files.face_pack), signature_of(files.clip)]
    assert time.perf_counter() - start < 20  # one job used to take 119 s
    assert (files.face_pack, files.clip) == (before.face_pack, before.clip) == (pack, folder / "clip")
    assert [model.path for model in files.found] == [model.path for model in before.found]
    (pack / "glintr100.onnx").write_bytes(b"changed")
    assert signature_of(files.face_pack) != signatures[0]
    subprocess.run(["rm", "-rf", folder], check=True)  # shutil.rmtree fails on such a deep tree


@pytest.mark.parametrize("place", ["own", "other", "both"])
def test_a_model_folder_that_is_a_loop_of_links_is_empty(tmp_path, place):
    loop, folder = tmp_path / "loop", tmp_path / "facesnap"
    loop.symlink_to(loop)
    pack = write_pack(folder / "antelopev2", "antelopev2")
    own, others = {"own": (loop, (folder,)), "other": (folder, (loop,)), "both": (loop, (loop, loop / "x"))}[place]
    files = find_models(own, others)
    model_list.as_text(model_list.list_models(files), files)
    assert files.face_pack == (None if place == "both" else pack)
    assert find_identities(own) == {}
