"""Builds leave out listed people and photos, and every copy of their photos."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.dataset.scan import LEFT_OUT, MAX_BITS, PhotoScan, SkippedPhoto, find_duplicates
from facesnap_lab.training.shards import read_labels, read_shard_index
from tests.support.dataset_photos import portraits, save


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


PHOTO = st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(1, 3), st.booleans())
"""Person, pixels, area, and whether the photo is listed."""


@given(photos=st.lists(PHOTO, max_size=12))
@settings(max_examples=200, deadline=None)
def test_no_kept_photo_duplicates_a_left_out_or_a_kept_one(photos):
    """Photos with neighbouring contents are near-duplicates: their hashes differ in `MAX_BITS` bits."""
    scans = [
        (
            person,
            Path(f"{number}.png"),
            PhotoScan(f"{pixels}", "", f"{pixels}", area, f"{2 ** (MAX_BITS * pixels) - 1:x}"),
        )
        for number, (person, pixels, area, _) in enumerate(photos)
    ]
    listed = {path: SkippedPhoto(LEFT_OUT, "listed") for (_, path, _), photo in zip(scans, photos) if photo[3]}
    skipped = find_duplicates(scans, listed)
    kept = [photo for (_, path, _), photo in zip(scans, photos) if path not in skipped]
    left_out = [photo for photo in photos if photo[3]]
    assert listed.items() <= skipped.items()
    for person, pixels, *_ in kept:
        assert not any(other == pixels for _, other, *_ in left_out)
        assert not any(who == person and abs(other - pixels) <= 1 for who, other, *_ in left_out)
    assert all(count == 1 for count in Counter(pixels for _, pixels, *_ in kept).values())
    assert kept or listed or not photos
