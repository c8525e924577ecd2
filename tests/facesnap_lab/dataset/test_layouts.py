"""Which person is in which photo, in the layouts of the supported datasets."""

from __future__ import annotations

from pathlib import Path

import pytest

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.dataset.layouts import list_people


def create(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * (1 + len(name)))
    return folder


def listed(*folders: Path, **options) -> dict[str, list[str]]:
    return {person.name: [photo.path for photo in person.photos] for person in list_people(folders, **options).people}


def test_vggface2_has_one_folder_per_person(tmp_path):
    train = create(tmp_path / "train", "n000002/0001_01.jpg", "n000002/0003_02.jpg", "n000001/0001_01.JPG")
    assert listed(train) == {
        "train/n000001": ["n000001/0001_01.JPG"],
        "train/n000002": ["n000002/0001_01.jpg", "n000002/0003_02.jpg"],
    }


def test_parent_folder_of_vggface2_is_rejected(tmp_path):
    folder = create(tmp_path / "vgg", "train/n000001/0001_01.jpg", "test/n000009/0001_01.jpg")
    with pytest.raises(FaceSnapError, match=r"n000009/0001_01\.jpg is not in a person\'s folder"):
        list_people([folder])


@pytest.mark.parametrize("names", [("00000.png", "00001.png"), ("00000/00000.png", "69000/69999.png")])
def test_every_photo_of_ffhq_is_a_person_flat_or_in_thousands(names, tmp_path):
    assert listed(create(tmp_path / "ffhq", *names)) == {f"ffhq/{name}": [name] for name in names}


def test_folders_with_numeric_names_are_people(tmp_path):
    assert listed(create(tmp_path / "faces", "01000/a.jpg", "01000/b.jpg", "02000/a.jpg")) == {
        "faces/01000": ["01000/a.jpg", "01000/b.jpg"],
        "faces/02000": ["02000/a.jpg"],
    }


def test_celeba_has_an_identities_file(tmp_path):
    folder = create(tmp_path / "celeba", "000001.jpg", "000002.jpg", "000003.jpg")
    lines = tmp_path / "identity_CelebA.txt"
    lines.write_text("000001.jpg 2880\n000002.jpg 2937\n000003.jpg 2880\n000004.jpg 1\n")
    assert listed(folder, identities=lines) == {
        "celeba/2880": ["000001.jpg", "000003.jpg"],
        "celeba/2937": ["000002.jpg"],
    }
    lines.write_text("000001.jpg 2880\n")
    with pytest.raises(FaceSnapError, match=r"2 photos in .*celeba, such as 000002\.jpg, have no line in"):
        list_people([folder], identities=lines)


@pytest.mark.parametrize("line", ["000001.jpg", "000001.jpg 1 2", "000001.jpg 7\n000001.jpg 8"])
def test_error_names_the_invalid_line_of_identities(line, tmp_path):
    lines = tmp_path / "identities.txt"
    lines.write_text(f"000000.jpg 5\n{line}\n")
    with pytest.raises(FaceSnapError, match=rf"Line {2 + line.count(chr(10))} of .*identities\.txt"):
        list_people([create(tmp_path / "celeba", "000000.jpg")], identities=lines)


def test_captions_are_beside_the_photos_and_other_files_are_listed(tmp_path):
    folder = create(
        tmp_path / "p", "a/1.jpg", "a/1.txt", "a/2.png", "a/2.caption", "a/3.webp", "a/4.txt", "a/.x", "list.csv"
    )
    listing = list_people([folder])
    assert [(photo.path, photo.caption) for photo in listing.people[0].photos] == [
        ("a/1.jpg", "a/1.txt"),
        ("a/2.png", "a/2.caption"),
        ("a/3.webp", None),
    ]
    assert {str(path.relative_to(folder)) for path in listing.others} == {"a/4.txt", "a/.x", "list.csv"}


def test_folders_with_equal_names_are_numbered(tmp_path):
    one, two = (create(tmp_path / disk / "faces", "n1/a.jpg") for disk in ("one", "two"))
    assert set(listed(one, two)) == {"faces-1/n1", "faces-2/n1"}


def test_ambiguous_or_missing_folders_are_rejected(tmp_path):
    mixed = create(tmp_path / "mixed", "0.jpg", "n1/1.jpg")
    with pytest.raises(FaceSnapError, match=r"mixed contains both photos and folders of photos; .*--layout"):
        list_people([mixed])
    assert set(listed(mixed, layout="singles")) == {"mixed/0.jpg", "mixed/n1/1.jpg"}
    with pytest.raises(FaceSnapError, match=r"empty contains no photos"):
        list_people([create(tmp_path / "empty", "readme.md")])
    with pytest.raises(FaceSnapError, match=r"The folder .*nowhere does not exist"):
        list_people([tmp_path / "nowhere"])
