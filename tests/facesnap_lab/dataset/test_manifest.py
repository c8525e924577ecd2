"""Manifests: which line applies to a photo, what reaches the shards, and how invalid lines are reported."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.dataset.layouts import Origin, list_people
from facesnap_lab.dataset.manifest import COLUMNS, MAX_LENGTH, add_origins, read_manifest
from facesnap_lab.training.shards import read_labels, read_sample, read_shard_index

TEXT = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=30)
HEADER = ",".join(COLUMNS) + "\n"


def write(path: Path, *rows: tuple[str, ...]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return path


@given(rows=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=5), newline=st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=50, deadline=None)
def test_manifest_is_read_as_it_was_written(rows, newline, tmp_path_factory):
    path = tmp_path_factory.mktemp("manifest") / "m.csv"
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=newline).writerows([COLUMNS, *((f"{i}.png", *row) for i, row in enumerate(rows))])
    path.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())  # as spreadsheets save it
    expected = {path.parent / f"{i}.png": (i + 2, Origin(*row)) for i, row in enumerate(rows)}
    assert read_manifest(path) == expected


@given(data=st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(lambda rest: HEADER.encode() + rest)))
@settings(max_examples=200, deadline=None)
def test_any_content_is_read_or_rejected_in_one_line_that_names_file_and_line(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("manifest") / "m.csv"
    path.write_bytes(data)
    try:
        read_manifest(path)
    except FaceSnapError as error:
        assert str(error).startswith("Line ")
        assert f" of {path} " in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"Line 1 of .*m\.csv is not the header path,source,license,consent; add the header\."),
        (b"file,source\n", r"Line 1 of .*m\.csv is not the header"),
        (HEADER.encode() + b"a,b,c\n", r"Line 2 of .*m\.csv has 3 cells instead of 4"),
        (HEADER.encode() + b"\na,b,,d\n", r"Line 3 of .*m\.csv has an empty license; fill it in"),
        (HEADER.encode() + b'a,b,c,"d\n\ne"\n', r"Line 2 of .*m\.csv has a consent that is not plain text"),
        (HEADER.encode() + b"a," + b"b" * (MAX_LENGTH + 1) + b",c,d\n", r"Line 2 of .*m\.csv has a source that"),
        (HEADER.encode() + b"a,b,c,d\n./x/../a,b,c,d\n", r"Line 3 of .*m\.csv repeats the path of line 2"),
        (HEADER.encode() + b'a,b,c,d\nb,"b,c,d\n', r"Line 3 of .*m\.csv is not valid CSV"),
        (HEADER.encode() + b"a,b,c,d\nb,\xff,c,d\n", r"Line 3 of .*m\.csv is not UTF-8; save"),
    ],
)
def test_invalid_lines_are_reported_with_file_line_and_advice(content, message, tmp_path):
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(FaceSnapError, match=message):
        read_manifest(tmp_path / "m.csv")


def test_most_specific_line_applies_and_every_photo_needs_one(tmp_path):
    folder = tmp_path / "photos"
    for name in ("n0/a.png", "n0/b.png", "n1/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    listing = list_people([folder])
    origins = ("n0", "s0", "l0", "c0"), ("n0/b.png", "sb", "lb", "cb")
    manifest = write(folder / "m.csv", *origins)
    with pytest.raises(FaceSnapError, match=r"n1/c\.png has no line in the manifest .*m\.csv; add a line"):
        add_origins(listing, [folder], manifest)
    write(manifest, *origins, (".", "s", "l", "c"))
    people = add_origins(listing, [folder], manifest).people
    found = {photo.path: photo.origin for person in people for photo in person.photos}
    assert found == {
        "n0/a.png": Origin("s0", "l0", "c0"),
        "n0/b.png": Origin("sb", "lb", "cb"),
        "n1/c.png": Origin("s", "l", "c"),
    }
    for missing in ("n0/typo.png", "x" * 300, "n0/\x01"):
        write(manifest, *origins, (".", "s", "l", "c"), (missing, "s", "l", "c"))
        with pytest.raises(FaceSnapError, match=r"Line 5 of .*m\.csv names .*, which does not exist; correct the line"):
            add_origins(listing, [folder], manifest)


def test_origins_reach_the_shards_and_nothing_else_changes(built, people, build_here, tmp_path):
    photo = "n000002/0001_01.png"
    manifest = write(
        tmp_path / "m.csv",
        (str(people), "VGGFace2", "research only", "unknown"),
        (str(people / photo), "own photos", "CC0-1.0", "written"),
    )
    build_here(people, per_shard=4, manifest=manifest)
    index, plain = (read_shard_index(sorted(folder.glob("*.tar"))) for folder in (tmp_path / "out", built))
    hashes = {scan["content"] for scan in scans(tmp_path / "out")}
    seen = set()
    for number, (person, provenance) in enumerate(read_labels(index)):
        sample, before = read_sample(index, number), read_sample(plain, number)
        assert (sample.person, sample.provenance) == (person, provenance)
        assert before.provenance == {}
        assert sample.image.tobytes() == before.image.tobytes()
        origin = [provenance[name] for name in ("source", "license", "consent")]
        own = person == "people/n000002" and 3 <= number % 9 < 6
        assert origin == (["own photos", "CC0-1.0", "written"] if own else ["VGGFace2", "research only", "unknown"])
        seen.add(provenance["photo"])
    assert seen == hashes
    assert '"origin"' not in (built / "plan.jsonl").read_text()

    write(manifest, (str(people), "VGGFace2", "changed", "unknown"))
    with pytest.raises(FaceSnapError, match="has been given a different source, license or consent in the manifest"):
        build_here(people, per_shard=4, manifest=manifest)


def scans(out: Path) -> list[dict]:
    files = sorted((out / "work").glob("scans-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
