"""Builds leave out listed people and photos and every copy of their photos, and use copies across sources once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.cli.main import main
from facesnap_lab.dataset.scan import LEFT_OUT, MAX_BITS, PhotoScan, ScannedPhoto, SkippedPhoto, find_duplicates
from facesnap_lab.training.shards import read_labels, read_shard_index
from tests.support.dataset_photos import SIDE, portraits, save


def reported(folder: Path) -> dict[str, tuple[str, str]]:
    lines = [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]
    return {Path(line["file"]).name: (line["reason"], line["message"]) for line in lines}


def test_listed_person_is_missing_and_other_shards_stay_the_same(built, people, build_here, tmp_path, capsys):
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("n000002\nn999999\n")
    summary = build_here(people, per_shard=4, exclude=exclude)
    out = tmp_path / "out"
    assert summary["skipped"] == {LEFT_OUT: 3}
    index = read_shard_index(sorted(out.glob("*.tar")))
    assert {person for person, _ in read_labels(index)} == {f"people/n{i:06d}" for i in (0, 1, 3, 4, 5)}
    changed = {path.name for path in built.glob("*.tar") if path.read_bytes() != (out / path.name).read_bytes()}
    assert changed == {"shard-000001.tar"}
    assert f"{exclude} lists n999999, which matches no photo; check the spelling." in capsys.readouterr().err
    exclude.write_text("n000003\n")
    with pytest.raises(FaceSnapError, match=r"The build was started with exclude .*, but now has"):
        build_here(people, per_shard=4, exclude=exclude)


def test_copies_of_left_out_photos_are_left_out_too(build_here, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    (first, second), (other, _) = portraits(0, 2), portraits(1, 2)
    save(first, one / "n0" / "a.png")
    save(first, one / "n0" / "b.bmp")  # the same pixels
    save(first.resize((80, 80), Image.Resampling.LANCZOS), one / "n0" / "c.png")  # nearly identical
    save(second, one / "n0" / "d.png")
    save(other, one / "n1" / "e.png")
    shutil.copy(one / "n0" / "a.png", save(first, two / "n7" / "f.png"))  # listed as a different person
    save(other, two / "withdrawn" / "g.png")  # a photo of this person that `one` has, too
    exclude = tmp_path / "exclude.txt"
    exclude.write_text(f"{hashlib.sha256((one / 'n0' / 'b.bmp').read_bytes()).hexdigest()}\ntwo/withdrawn\n")
    build_here(one, two, exclude=exclude)
    report = reported(tmp_path / "out")
    assert {name: reason for name, (reason, _) in report.items()} == dict.fromkeys(
        ("a.png", "b.bmp", "c.png", "e.png", "f.png", "g.png"), LEFT_OUT
    )
    assert report["g.png"][1] == f"{exclude} lists two/withdrawn."
    assert report["e.png"][1] == f"It is the same file as {two / 'withdrawn' / 'g.png'}, which is left out."
    index = read_shard_index(sorted((tmp_path / "out").glob("*.tar")))
    assert {person for person, _ in read_labels(index)} == {"one/n0"}


@dataclass(frozen=True)
class Drawn:
    """A photo as hypothesis draws it. Photos with neighbouring contents are near-duplicates."""

    person: int
    content: int
    area: int
    source: str
    listed: bool


PHOTOS = st.lists(
    st.builds(
        Drawn, st.integers(0, 2), st.integers(0, 5), st.integers(1, 3), st.sampled_from(["a", "b"]), st.booleans()
    ),
    max_size=12,
)


def find(photos: list[Drawn]) -> dict[int, SkippedPhoto]:
    """The skipped photos by their position."""
    paths = [Path(f"{number}.png") for number in range(len(photos))]
    scanned = []
    for path, photo in zip(paths, photos):
        bits = 2 ** (MAX_BITS * photo.content) - 1
        scan = PhotoScan(str(photo.content), "", str(photo.content), photo.area, f"{bits:x}")
        scanned.append(ScannedPhoto(photo.person, path, scan, photo.source))
    left_out = {path: SkippedPhoto(LEFT_OUT, "listed") for path, photo in zip(paths, photos) if photo.listed}
    skipped = find_duplicates(scanned, left_out)
    assert left_out.items() <= skipped.items()
    return {number: skipped[path] for number, path in enumerate(paths) if path in skipped}


@given(photos=PHOTOS)
@settings(max_examples=200, deadline=None)
def test_no_kept_photo_duplicates_a_left_out_or_a_kept_one(photos):
    skipped = find(photos)
    kept = [photo for number, photo in enumerate(photos) if number not in skipped]
    left_out = [photo for photo in photos if photo.listed]
    for photo in kept:
        assert not any(other.content == photo.content for other in left_out)
        assert not any(other.person == photo.person and abs(other.content - photo.content) <= 1 for other in left_out)
    assert all(count == 1 for count in Counter(photo.content for photo in kept).values())
    assert kept or left_out or not photos


@given(photos=PHOTOS)
@settings(max_examples=200, deadline=None)
def test_copies_across_sources_are_reported_with_both_sources(photos):
    photos = [replace(photo, listed=False) for photo in photos]
    skipped = find(photos)
    contents = [photo.content for photo in photos]
    for number, photo in enumerate(photos):
        first = contents.index(photo.content)
        reason = skipped[number].reason if number in skipped else ""
        assert (reason in ("duplicate", "duplicate across sources")) is (first < number)
        across = first < number and photos[first].source != photo.source
        assert (reason == "duplicate across sources") is across
        if across:
            assert skipped[number].message == (
                f"It is the same file as {first}.png, whose source is {photos[first].source} and not {photo.source}."
            )


def test_first_source_of_a_photo_is_recorded(models, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    photo = save(portraits(0, 1)[0], one / "n0" / "a.png")
    shutil.copy(photo, save(portraits(1, 1)[0], two / "n7" / "b.png"))
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,source,license,consent\none,A,CC0-1.0,written\ntwo,B,research only,unknown\n")
    save(portraits(2, 1)[0], two / "n8" / "c.png")
    (tmp_path / "exclude.txt").write_text("n8")
    files = ["--manifest", str(manifest), "--exclude", str(tmp_path / "exclude.txt"), "--models", str(models)]
    sizes = ["--resolution", str(SIDE), "--crops", "1", "--min-face", "16", "--workers", "1", "--json"]
    assert main(["dataset", "build", str(one), str(two), "--out", str(tmp_path / "out"), *files, *sizes]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == {"duplicate across sources": 1, LEFT_OUT: 1}
    assert reported(tmp_path / "out")["b.png"][1] == f"It is the same file as {photo}, whose source is A and not B."
    index = read_shard_index(sorted((tmp_path / "out").glob("*.tar")))
    assert {(origin["source"], origin["license"], origin["consent"]) for _, origin in read_labels(index)} == {
        ("A", "CC0-1.0", "written")
    }
