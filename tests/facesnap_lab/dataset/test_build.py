"""What a build promises: the same bytes however it went, nothing lost, and nothing left out in silence."""

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
from facesnap_lab.training.shards import read_index, read_sample
from tests.support.dataset_photos import SETTINGS, SIDE, portraits, save


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def reported(folder: Path) -> dict[str, tuple[str, str]]:
    """Reasons and messages by the files' names."""
    lines = [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]
    assert len({line["file"] for line in lines}) == len(lines)
    return {Path(line["file"]).name: (line["reason"], line["message"]) for line in lines}


def arguments(people: Path, out: Path, models: Path, workers: int) -> list[str]:
    sizes = {"resolution": SIDE, "crops": SETTINGS.crops, "min-face": SETTINGS.min_face, "per-shard": 4}
    options = [f"--{name}={value}" for name, value in {**sizes, "workers": workers}.items()]
    return ["dataset", "build", str(people), "--out", str(out), "--models", str(models), *options]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_killed_in_the_middle_and_resumed_with_more_workers_gives_the_same_bytes(
    built, people, models, tmp_path, capsys
):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "facesnap_lab", *arguments(people, out, models, workers=1)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while not (out / "work" / "shard-000000.json").exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.kill()  # the parent alone: its workers have to notice
        process.wait()
        deadline = time.monotonic() + 10
        while _alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _alive(process.pid), "a worker outlives its parent"
    finally:
        if _alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert 1 <= len(shards(out)) < len(shards(built))
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}

    assert main(arguments(people, out, models, workers=2)) == 0
    assert shards(out) == shards(built)
    assert all(path.stat().st_mtime_ns == written for path, written in before.items()), "what was whole is made again"
    assert not list(out.rglob("*.part"))
    assert "pictures: 54" in capsys.readouterr().out


def _alive(group: int) -> bool:
    """Whether a process of the group still runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    states = [_state(entry, group) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return any(state not in (None, "Z") for state in states)


def _state(entry: Path, group: int) -> str | None:
    try:
        state, _, found = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return None
    return state if int(found) == group else None


def test_a_shard_that_cannot_be_written_whole_is_not_there(people, models, tmp_path):
    """A limit on the size of files stands in for the full disk; the system refuses the write itself."""
    resource = pytest.importorskip("resource")
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(FaceSnapError, match=r"shard-000000\.tar cannot be written \(File too large\); make room"):
            builder.build([people], out, models, SETTINGS, per_shard=4, workers=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not [path for path in out.rglob("*") if path.suffix in (".tar", ".part")]


def deadly(job, tick):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_worker_is_an_error_and_what_is_whole_stays(built, people, models, tmp_path, monkeypatch):
    out = shutil.copytree(built, tmp_path / "out")
    for file in ("shard-000001.tar", "work/shard-000001.json"):
        (out / file).unlink()
    whole = shards(out)
    monkeypatch.setattr(builder, "make_shard", deadly)
    with pytest.raises(FaceSnapError, match=r"A process that builds the data died.*give the command again"):
        builder.build([people], out, models, SETTINGS, per_shard=4, workers=1)
    assert shards(out) == whole
    monkeypatch.undo()
    builder.build([people], out, models, SETTINGS, per_shard=4, workers=0)
    assert shards(out) == shards(built)


def test_a_person_is_in_one_shard_and_the_plan_says_which(built, people):
    plan = [json.loads(line) for line in (built / "plan.jsonl").read_text().splitlines()[1:]]
    homes = {line["name"]: line["shard"] for line in plan}
    assert Counter(homes.values()) == {0: 2, 1: 2, 2: 2}
    for number, path in enumerate(sorted(built.glob("*.tar"))):
        index = read_index([path])
        assert {homes[read_sample(index, i).person] for i in range(len(index))} == {number}


def test_everything_unusable_is_reported_with_its_reason(build_here, tmp_path):
    folder = tmp_path / "photos"
    photos = portraits(0, 3)
    good = save(photos[0], folder / "n0" / "good.png", "a good one")
    save(photos[1], folder / "n0" / "cut.png")
    cut = folder / "n0" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:-2000])
    save(photos[1], folder / "n0" / "text.jpg").write_text("no picture")
    save(photos[1], folder / "n0" / "nothing.jpg").write_bytes(b"")
    save(Image.new("1", (9000, 9000)), folder / "n0" / "huge.png")
    save(Image.new("RGB", (SIDE, SIDE), "teal"), folder / "n0" / "wall.png")
    save(photos[2].resize((20, 20)), folder / "n0" / "small.png")
    save(photos[1], folder / "n0" / "mute.png", "  \n")
    (folder / "n0" / "link.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "n0" / "link.txt").write_text("a link")
    (folder / "n0" / "notes.md").write_text("notes")
    with pytest.raises(FaceSnapError, match=r"link\.png has gone"):
        build_here(folder)
    (folder / "n0" / "link.png").unlink()
    shutil.rmtree(tmp_path / "out")

    summary = build_here(folder)
    found = reported(tmp_path / "out")
    assert {name: reason for name, (reason, _) in found.items()} == {
        "cut.png": "unreadable",
        "text.jpg": "unreadable",
        "nothing.jpg": "unreadable",
        "huge.png": "unreadable",
        "wall.png": "no face",
        "small.png": "face too small",
        "mute.png": "no caption",
        "notes.md": "no photo",
        "link.txt": "no photo",
    }
    assert "truncated" in found["cut.png"][1]
    assert "million pixels" in found["huge.png"][1]
    assert "cannot be read" not in found["cut.png"][1]
    assert summary["left out"] == Counter(reason for reason, _ in found.values())
    assert (summary["photos"], summary["people"], summary["pictures"]) == (8, 1, SETTINGS.crops)
    index = read_index(sorted((tmp_path / "out").glob("*.tar")))
    assert {read_sample(index, i).caption for i in range(len(index))} == {"a good one"}
    assert good.exists()


def test_duplicates_are_found_in_all_the_input_and_the_largest_of_twins_stays(build_here, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    (first, second), (other, _) = portraits(0, 2), portraits(1, 2)
    save(first, one / "n0" / "a.png", "kept a")
    save(first, one / "n0" / "b.bmp")  # the same pixels in another file
    save(second.resize((80, 80), Image.Resampling.LANCZOS), one / "n0" / "c.png")
    save(second, one / "n0" / "d.jpg", "kept d", quality=90)
    save(other, one / "n1" / "e.png", "kept e")
    shutil.copy(one / "n0" / "a.png", save(first, two / "n7" / "f.png"))  # the same file, as somebody else
    nearly = np.array(other)
    nearly[0, 0] ^= 1
    save(Image.fromarray(nearly), two / "n8" / "g.png", "kept g")  # alike, but somebody else
    build_here(one, two)
    found = reported(tmp_path / "out")
    assert {name: reason for name, (reason, _) in found.items()} == {
        "b.bmp": "duplicate",
        "c.png": "near-duplicate",
        "f.png": "duplicate",
    }
    assert str(one / "n0" / "a.png") in found["b.bmp"][1]
    assert "same pixels" in found["b.bmp"][1]
    assert "same file" in found["f.png"][1]
    assert str(one / "n0" / "d.jpg") in found["c.png"][1]
    index = read_index(sorted((tmp_path / "out").glob("*.tar")))
    captions = Counter(read_sample(index, i).caption for i in range(len(index)))
    assert captions == dict.fromkeys(("kept a", "kept d", "kept e", "kept g"), SETTINGS.crops)


def test_pictures_depend_on_the_photos_alone(built, people, models, tmp_path):
    """Elsewhere, with the same person among others: other keys, but the same pictures."""
    folder = tmp_path / "other" / "elsewhere"
    shutil.copytree(people / "n000003", folder / "zoe")
    builder.build([folder], tmp_path / "out", models, SETTINGS, workers=0)
    index, whole = (read_index(sorted(place.glob("*.tar"))) for place in (tmp_path / "out", built))
    there = {sample.picture.tobytes() for sample in (read_sample(whole, i) for i in range(len(whole)))}
    assert {read_sample(index, i).picture.tobytes() in there for i in range(len(index))} == {True}


def test_other_settings_or_photos_than_the_plans_are_refused(built, people, models, tmp_path):
    out = shutil.copytree(built, tmp_path / "out")
    photos = shutil.copytree(people, tmp_path / "people")

    def again(**changes):
        builder.build([photos], out, models, replace(SETTINGS, **changes), per_shard=4, workers=0)

    again()
    with pytest.raises(FaceSnapError, match="begun with crops 3 and is now to go on with 4"):
        again(crops=4)
    picture = photos / "n000002" / "0001_01.png"
    save(portraits(9, 1)[0], photos / "n000002" / "0009_01.png")
    with pytest.raises(FaceSnapError, match=r"n000002/0009_01\.png is new since"):
        again()
    (photos / "n000002" / "0009_01.png").unlink()
    (photos / "n000002" / "0009_01.txt").unlink()
    content = picture.read_bytes()
    picture.write_bytes(content + b"more")
    with pytest.raises(FaceSnapError, match=r"n000002/0001_01\.png has changed since"):
        again()
    picture.unlink()
    with pytest.raises(FaceSnapError, match=r"n000002/0001_01\.png is missing since"):
        again()
    # of the same size, a change is noticed when the photo's shard is made
    picture.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again()
    (out / "work" / "shard-000001.json").unlink()
    with pytest.raises(FaceSnapError, match=r"n000002/0001_01\.png has changed since"):
        again()
    assert shards(out) == shards(built)


def test_what_is_missing_is_said_before_anything_is_done(people, models, tmp_path, build_here):
    bare = tmp_path / "bare"
    bare.mkdir()
    portraits(0, 1)[0].save(bare / "0.png")
    with pytest.raises(
        FaceSnapError, match=r"1 photos, such as .*0\.png, have no caption.*0\.txt or 0\.caption.*--blip2"
    ):
        build_here(bare)
    with pytest.raises(FaceSnapError, match=r"There is no BLIP-2 in .*nowhere"):
        build_here(bare, blip2=tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(FaceSnapError, match="no face model pack"):
        builder.build([people], tmp_path / "out", tmp_path / "none", SETTINGS)
    used = tmp_path / "used"
    used.mkdir()
    (used / "shard-000000.tar").write_bytes(b"somebody's")
    with pytest.raises(FaceSnapError, match=r"has shard-000000\.tar in it, but no plan"):
        builder.build([people], used, models, SETTINGS)
    assert (used / "shard-000000.tar").read_bytes() == b"somebody's"


def test_a_face_of_which_the_detector_is_not_sure_is_left_out_by_its_score(build_here, tmp_path, models):
    from facesnap_ext.identity.faces import find_faces, load_pack
    from facesnap_ext.photos import from_path
    from facesnap_ext.weights.search import find_models

    pack = load_pack(find_models(models).require("face_pack"), threads=1)
    paths = [save(portraits(index, 1)[0], tmp_path / "p" / f"{index}.png") for index in range(3)]
    scores = {path.name: find_faces(pack, from_path(path))[0].score for path in paths}
    unsure, *_, surest = sorted(scores, key=scores.get)
    build_here(tmp_path / "p", settings=replace(SETTINGS, min_score=scores[surest]))
    found = reported(tmp_path / "out")
    assert found.keys() == scores.keys() - {surest}
    assert found[unsure][0] == "unsure face"


def test_photos_without_a_face_give_an_error_and_the_report(build_here, tmp_path):
    save(Image.new("RGB", (SIDE, SIDE), "teal"), tmp_path / "walls" / "0.png")
    with pytest.raises(FaceSnapError, match=r"None of the 1 photos gives a picture; .*report\.jsonl"):
        build_here(tmp_path / "walls")
    assert reported(tmp_path / "out")["0.png"][0] == "no face"


def test_a_second_build_into_the_same_folder_is_refused(people, models, tmp_path):
    from filelock import FileLock

    (tmp_path / "out" / "work").mkdir(parents=True)
    with FileLock(tmp_path / "out" / "work" / "lock"), pytest.raises(FaceSnapError, match="Another build is writing"):
        builder.build([people], tmp_path / "out", models, SETTINGS)
