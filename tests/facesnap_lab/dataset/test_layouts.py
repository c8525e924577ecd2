"""Who is in which photo, by the layouts of the data sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.dataset.layouts import list_people


def lay(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * (1 + len(name)))
    return folder


def listed(*folders: Path, **options) -> dict[str, list[str]]:
    return {who.name: [photo.path for photo in who.photos] for who in list_people(folders, **options).people}


def test_vggface2_has_a_folder_for_each_person(tmp_path):
    train = lay(tmp_path / "train", "n000002/0001_01.jpg", "n000002/0003_02.jpg", "n000001/0001_01.JPG")
    assert listed(train) == {
        "train/n000001": ["n000001/0001_01.JPG"],
        "train/n000002": ["n000002/0001_01.jpg", "n000002/0003_02.jpg"],
    }


def test_the_folder_above_vggface2s_is_refused(tmp_path):
    folder = lay(tmp_path / "vgg", "train/n000001/0001_01.jpg", "test/n000009/0001_01.jpg")
    with pytest.raises(FaceSnapError, match=r"n000009/0001_01\.jpg does not lie in the folder of a person"):
        list_people([folder])


@pytest.mark.parametrize("names", [("00000.png", "00001.png"), ("00000/00000.png", "69000/69999.png")])
def test_every_picture_of_ffhq_is_a_person_flat_or_in_thousands(names, tmp_path):
    assert listed(lay(tmp_path / "ffhq", *names)) == {f"ffhq/{name}": [name] for name in names}


def test_people_called_by_numbers_are_people(tmp_path):
    assert listed(lay(tmp_path / "faces", "01000/a.jpg", "01000/b.jpg", "02000/a.jpg")) == {
        "faces/01000": ["01000/a.jpg", "01000/b.jpg"],
        "faces/02000": ["02000/a.jpg"],
    }


def test_celeba_has_a_file_of_identities(tmp_path):
    folder = lay(tmp_path / "celeba", "000001.jpg", "000002.jpg", "000003.jpg")
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
def test_a_wrong_line_of_identities_is_named(line, tmp_path):
    lines = tmp_path / "identities.txt"
    lines.write_text(f"000000.jpg 5\n{line}\n")
    with pytest.raises(FaceSnapError, match=rf"Line {2 + line.count(chr(10))} of .*identities\.txt"):
        list_people([lay(tmp_path / "celeba", "000000.jpg")], identities=lines)


def test_captions_stand_beside_and_all_else_is_told(tmp_path):
    folder = lay(
        tmp_path / "p", "a/1.jpg", "a/1.txt", "a/2.png", "a/2.caption", "a/3.webp", "a/4.txt", "a/.x", "list.csv"
    )
    listing = list_people([folder])
    assert [(photo.path, photo.caption) for photo in listing.people[0].photos] == [
        ("a/1.jpg", "a/1.txt"),
        ("a/2.png", "a/2.caption"),
        ("a/3.webp", None),
    ]
    assert {str(path.relative_to(folder)) for path in listing.others} == {"a/4.txt", "a/.x", "list.csv"}


def test_equal_names_of_folders_and_people_stay_apart(tmp_path):
    one, two = (lay(tmp_path / disk / "faces", "n1/a.jpg") for disk in ("one", "two"))
    assert set(listed(one, two)) == {"faces-1/n1", "faces-2/n1"}


def test_what_is_not_clear_is_asked_for(tmp_path):
    mixed = lay(tmp_path / "mixed", "0.jpg", "n1/1.jpg")
    with pytest.raises(FaceSnapError, match=r"mixed has photos both in itself and in folders; .*--layout"):
        list_people([mixed])
    assert set(listed(mixed, layout="singles")) == {"mixed/0.jpg", "mixed/n1/1.jpg"}
    with pytest.raises(FaceSnapError, match=r"There are no photos in .*empty"):
        list_people([lay(tmp_path / "empty", "readme.md")])
    with pytest.raises(FaceSnapError, match=r"There is no folder .*nowhere"):
        list_people([tmp_path / "nowhere"])
