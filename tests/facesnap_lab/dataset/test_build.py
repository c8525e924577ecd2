"""Builds are reproducible byte by byte, survive interruptions, and report every skipped photo."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.cli.main import main
from facesnap_lab.dataset import build as builder
from facesnap_lab.training.shards import read_sample, read_shard_index
from tests.support.dataset_photos import SETTINGS, SIDE, portraits, save
from tests.support.processes import group_is_alive, wait_for_end


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def reported(folder: Path) -> dict[str, tuple[str, str]]:
    """The reported reasons and messages, by file name."""
    lines = [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]
    assert len({line["file"] for line in lines}) == len(lines)
    return {Path(line["file"]).name: (line["reason"], line["message"]) for line in lines}


def arguments(people: Path, out: Path, models: Path, workers: int) -> list[str]:
    sizes = {"resolution": SIDE, "crops": SETTINGS.crops, "min-face": SETTINGS.min_face, "per-shard": 4}
    options = [f"--{name}={value}" for name, value in {**sizes, "workers": workers}.items()]
    return ["dataset", "build", str(people), "--out", str(out), "--models", str(models), *options]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="requires /proc")
def test_build_killed_and_continued_with_more_workers_gives_the_same_bytes(built, people, models, tmp_path, capsys):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "facesnap_lab", *arguments(people, out, models, workers=1)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while not (out / "work" / "shard-000000.json").exists():
            assert process.poll() is None, "the build ended before it could be killed"
            time.sleep(0.01)
        process.kill()  # only the parent is killed: its workers must exit by themselves
        process.wait()
        assert wait_for_end(process.pid), "a worker outlived its parent"
    finally:
        if group_is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert 1 <= len(shards(out)) < len(shards(built))
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}

    assert main(arguments(people, out, models, workers=2)) == 0
    assert shards(out) == shards(built)
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in before.items()), "finished shards were rebuilt"
    assert not list(out.rglob("*.part"))
    assert "images: 54" in capsys.readouterr().out


def test_incomplete_shard_is_removed_if_writing_fails(people, models, tmp_path):
    """A limit on file sizes simulates the full disk: the operating system rejects the write."""
    resource = pytest.importorskip("resource")
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(
            FaceSnapError, match=r"shard-000000\.tar cannot be written \(File too large\); free some disk space"
        ):
            builder.build([people], out, models, SETTINGS, per_shard=4, workers=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not [path for path in out.rglob("*") if path.suffix in (".tar", ".part")]


def test_each_person_is_in_the_shard_given_by_the_plan(built, people):
    plan = [json.loads(line) for line in (built / "plan.jsonl").read_text().splitlines()[1:]]
    shard_of_person = {line["name"]: line["shard"] for line in plan}
    assert Counter(shard_of_person.values()) == {0: 2, 1: 2, 2: 2}
    for number, path in enumerate(sorted(built.glob("*.tar"))):
        index = read_shard_index([path])
        assert {shard_of_person[read_sample(index, i).person] for i in range(len(index))} == {number}


def test_every_unusable_file_is_reported_with_its_reason(build_here, tmp_path):
    folder = tmp_path / "photos"
    photos = portraits(0, 3)
    good = save(photos[0], folder / "n0" / "good.png", "a usable photo")
    save(photos[1], folder / "n0" / "cut.png")
    cut = folder / "n0" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:-2000])
    save(photos[1], folder / "n0" / "text.jpg").write_text("not an image")
    save(photos[1], folder / "n0" / "nothing.jpg").write_bytes(b"")
    save(Image.new("1", (9000, 9000)), folder / "n0" / "huge.png")
    save(Image.new("RGB", (SIDE, SIDE), "teal"), folder / "n0" / "wall.png")
    save(photos[2].resize((20, 20)), folder / "n0" / "small.png")
    save(photos[1], folder / "n0" / "mute.png", "  \n")
    (folder / "n0" / "link.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "n0" / "link.txt").write_text("a link")
    (folder / "n0" / "notes.md").write_text("notes")
    with pytest.raises(FaceSnapError, match=r"link\.png has been removed"):
        build_here(folder)
    (folder / "n0" / "link.png").unlink()
    shutil.rmtree(tmp_path / "out")

    summary = build_here(folder)
    report = reported(tmp_path / "out")
    assert {name: reason for name, (reason, _) in report.items()} == {
        "cut.png": "unreadable",
        "text.jpg": "unreadable",
        "nothing.jpg": "unreadable",
        "huge.png": "unreadable",
        "wall.png": "no face",
        "small.png": "face too small",
        "mute.png": "no caption",
        "notes.md": "not a photo",
        "link.txt": "not a photo",
    }
    assert "truncated" in report["cut.png"][1]
    assert "million pixels" in report["huge.png"][1]
    assert "cannot be read" not in report["cut.png"][1]
    assert summary["skipped"] == Counter(reason for reason, _ in report.values())
    assert (summary["photos"], summary["people"], summary["images"]) == (8, 1, SETTINGS.crops)
    index = read_shard_index(sorted((tmp_path / "out").glob("*.tar")))
    assert {read_sample(index, i).caption for i in range(len(index))} == {"a usable photo"}
    assert good.exists()


def test_duplicates_are_found_across_folders_and_the_largest_near_duplicate_is_kept(build_here, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    (first, second), (other, _) = portraits(0, 2), portraits(1, 2)
    save(first, one / "n0" / "a.png", "kept a")
    save(first, one / "n0" / "b.bmp")  # the same pixels in another file
    save(second.resize((80, 80), Image.Resampling.LANCZOS), one / "n0" / "c.png")
    save(second, one / "n0" / "d.jpg", "kept d", quality=90)
    save(other, one / "n1" / "e.png", "kept e")
    shutil.copy(one / "n0" / "a.png", save(first, two / "n7" / "f.png"))  # the same file, listed as another person
    changed = np.array(other)
    changed[0, 0] ^= 1
    save(Image.fromarray(changed), two / "n8" / "g.png", "kept g")  # nearly identical, but listed as another person
    build_here(one, two)
    report = reported(tmp_path / "out")
    assert {name: reason for name, (reason, _) in report.items()} == {
        "b.bmp": "duplicate",
        "c.png": "near-duplicate",
        "f.png": "duplicate",
    }
    assert str(one / "n0" / "a.png") in report["b.bmp"][1]
    assert "same pixels" in report["b.bmp"][1]
    assert "same file" in report["f.png"][1]
    assert str(one / "n0" / "d.jpg") in report["c.png"][1]
    index = read_shard_index(sorted((tmp_path / "out").glob("*.tar")))
    captions = Counter(read_sample(index, i).caption for i in range(len(index)))
    assert captions == dict.fromkeys(("kept a", "kept d", "kept e", "kept g"), SETTINGS.crops)


def test_images_depend_only_on_the_photos(built, people, models, tmp_path):
    """A person in another folder, without the other people, gets different keys but the same images."""
    folder = tmp_path / "other" / "elsewhere"
    shutil.copytree(people / "n000003", folder / "zoe")
    builder.build([folder], tmp_path / "out", models, SETTINGS, workers=0)
    index, all_people = (read_shard_index(sorted(folder.glob("*.tar"))) for folder in (tmp_path / "out", built))
    expected = {read_sample(all_people, i).image.tobytes() for i in range(len(all_people))}
    assert {read_sample(index, i).image.tobytes() in expected for i in range(len(index))} == {True}


def test_settings_or_photos_that_differ_from_the_plan_are_rejected(built, people, models, tmp_path):
    out = shutil.copytree(built, tmp_path / "out")
    photos = shutil.copytree(people, tmp_path / "people")

    def build_again(**changes):
        builder.build([photos], out, models, replace(SETTINGS, **changes), per_shard=4, workers=0)

    build_again()
    with pytest.raises(FaceSnapError, match="started with crops 3, but now has 4"):
        build_again(crops=4)
    photo = photos / "n000002" / "0001_01.png"
    save(portraits(9, 1)[0], photos / "n000002" / "0009_01.png")
    with pytest.raises(FaceSnapError, match=r"n000002/0009_01\.png has been added since"):
        build_again()
    (photos / "n000002" / "0009_01.png").unlink()
    (photos / "n000002" / "0009_01.txt").unlink()
    content = photo.read_bytes()
    photo.write_bytes(content + b"more")
    with pytest.raises(FaceSnapError, match=r"n000002/0001_01\.png has changed since"):
        build_again()
    photo.unlink()
    with pytest.raises(FaceSnapError, match=r"n000002/0001_01\.png has been removed since"):
        build_again()
    # a change that keeps the file's size is noticed when the photo's shard is built
    photo.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    build_again()
    (out / "work" / "shard-000001.json").unlink()
    with pytest.raises(FaceSnapError, match=r"n000002/0001_01\.png has changed since"):
        build_again()
    assert shards(out) == shards(built)


def test_machine_with_other_networks_is_rejected(build_here, people, monkeypatch, tmp_path):
    planned = builder.fingerprints
    monkeypatch.setattr(builder, "fingerprints", lambda *files: {**planned(*files), "deca": "another file"})
    with pytest.raises(FaceSnapError, match=r"^The network 'deca' on .* is not the one that the build"):
        build_here(people)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_missing_inputs_are_reported_before_anything_is_written(people, models, tmp_path, build_here):
    uncaptioned = tmp_path / "uncaptioned"
    uncaptioned.mkdir()
    portraits(0, 1)[0].save(uncaptioned / "0.png")
    with pytest.raises(
        FaceSnapError, match=r"1 photos, such as .*0\.png, have no caption.*0\.txt or 0\.caption.*--blip2"
    ):
        build_here(uncaptioned)
    with pytest.raises(FaceSnapError, match=r"nowhere does not contain a BLIP-2 model"):
        build_here(uncaptioned, blip2=tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(FaceSnapError, match="no face model pack"):
        builder.build([people], tmp_path / "out", tmp_path / "none", SETTINGS)
    used = tmp_path / "used"
    used.mkdir()
    (used / "shard-000000.tar").write_bytes(b"existing")
    with pytest.raises(FaceSnapError, match=r"contains shard-000000\.tar, but no build plan"):
        builder.build([people], used, models, SETTINGS)
    assert (used / "shard-000000.tar").read_bytes() == b"existing"


def test_faces_below_the_minimum_score_are_skipped(build_here, tmp_path, models):
    from facesnap_ext.identity.faces import find_faces, load_pack
    from facesnap_ext.photos import from_path
    from facesnap_ext.weights.search import find_models

    pack = load_pack(find_models(models).require("face_pack"), threads=1)
    paths = [save(portraits(index, 1)[0], tmp_path / "p" / f"{index}.png") for index in range(3)]
    scores = {path.name: find_faces(pack, from_path(path))[0].score for path in paths}
    lowest, *_, highest = sorted(scores, key=scores.get)
    build_here(tmp_path / "p", settings=replace(SETTINGS, min_score=scores[highest]))
    report = reported(tmp_path / "out")
    assert report.keys() == scores.keys() - {highest}
    assert report[lowest][0] == "low confidence"


def test_build_without_any_face_gives_an_error_and_a_report(build_here, tmp_path):
    save(Image.new("RGB", (SIDE, SIDE), "teal"), tmp_path / "walls" / "0.png")
    with pytest.raises(FaceSnapError, match=r"None of the 1 photos can be used; .*report\.jsonl"):
        build_here(tmp_path / "walls")
    assert reported(tmp_path / "out")["0.png"][0] == "no face"


def test_second_build_into_the_same_folder_is_rejected(people, models, tmp_path):
    from filelock import FileLock

    (tmp_path / "out" / "work").mkdir(parents=True)
    with FileLock(tmp_path / "out" / "work" / "lock"), pytest.raises(FaceSnapError, match="Another build is writing"):
        builder.build([people], tmp_path / "out", models, SETTINGS)
