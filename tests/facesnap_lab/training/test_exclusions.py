"""The list of people and photos to leave out: which entries match, and that the loader never returns their images."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.training import trainer
from facesnap_lab.training.data import ImageSizes, TrainingImages
from facesnap_lab.training.exclusions import read_exclusions
from facesnap_lab.training.prepare import prepare_run
from facesnap_lab.training.provenance import leave_out
from facesnap_lab.training.shard_writer import write_shards
from facesnap_lab.training.shards import Sample, read_sample, read_shard_index
from tests.support.training_world import SIDE, samples

SIZES = ImageSizes(resolution=SIDE, latent_side=8, landmark_side=64, clip_side=28)
PEOPLE, IMAGES = 5, 3
NAME = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="/"), min_size=1, max_size=20)


def photo_hash(key: str) -> str:
    return key.replace("-", "").rjust(64, "a")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    fields = dict.fromkeys(("source", "license", "consent"), "unknown")
    stored = (
        replace(sample, person=f"faces/{sample.person}", provenance={**fields, "photo": photo_hash(sample.key)})
        for sample in samples(PEOPLE, IMAGES)
    )
    return write_shards(tmp_path_factory.mktemp("shards"), stored, per_shard=4)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@given(
    people=st.sets(st.integers(0, PEOPLE - 1)),
    photos=st.sets(st.tuples(st.integers(0, PEOPLE - 1), st.integers(0, IMAGES - 1))),
    reference=st.sampled_from(["other", "same"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_left_out_people_and_photos_never_appear(people, photos, reference, seed, shards, tmp_path_factory):
    stored = list(samples(PEOPLE, IMAGES))
    expected = {
        sample.key
        for sample in stored
        if not any(sample.key.startswith(f"{person:06d}-") for person in people)
        and not any(sample.key == f"{person:06d}-{photo:02d}" for person, photo in photos)
    }
    lines = [f"person {person}" for person in people]
    lines += [photo_hash(f"{person:06d}-{photo:02d}") for person, photo in photos]
    exclusions = read_exclusions(write(tmp_path_factory.mktemp("list") / "exclude.txt", *lines))
    index = read_shard_index(shards)
    if not expected:
        with pytest.raises(FaceSnapError, match=r"exclude\.txt lists all people or photos"):
            leave_out(index, exclusions)
        return
    remaining, message = leave_out(index, exclusions)
    assert message.startswith(f"{len(stored) - len(expected)} of {len(stored)} images and ")
    assert remaining.people == len({key.partition("-")[0] for key in expected})

    key_of_image = {sample.image.tobytes(): sample.key for sample in stored}
    key_of_embedding = {sample.embedding.tobytes(): sample.key for sample in stored}
    images = TrainingImages(remaining, SIZES, seed, reference, "none", 0.0)
    shown, references = [], []
    for row in range(2 * len(remaining)):
        item = images[row]
        pixels = ((item["images"] + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)
        shown.append(key_of_image[pixels.tobytes()])
        references.append(key_of_embedding[item["embeddings"].numpy().tobytes()])
    assert sorted(shown) == sorted([*expected, *expected])
    assert set(references) <= expected
    assert [key.partition("-")[0] for key in shown] == [key.partition("-")[0] for key in references]


def test_run_leaves_out_a_person_of_existing_shards(config, tmp_path, monkeypatch, capsys):
    """The shards were built without a manifest; the person is missing in every step of a run."""
    exclude = write(tmp_path / "exclude.txt", "# withdrew their consent", "person 1", "person 77")
    config = replace(config, exclude=exclude, id_rows=0, steps=8)
    run = prepare_run(config)
    assert len(run.images.index) == 12
    assert {run.images.read(number).person for number in range(12)} == {f"person {i}" for i in (0, 2, 3, 4)}
    assert (
        f"3 of 15 images and 1 of 5 people are left out. {exclude} lists person 77, which matches no photo; check the "
        "spelling.\n"
    ) in capsys.readouterr().err
    names = []

    def read(images: TrainingImages, number: int) -> Sample:
        names.append((sample := read_sample(images.index, number)).person)
        return sample

    monkeypatch.setattr(TrainingImages, "read", read)
    trainer.train(replace(config, out=tmp_path / "other"))
    assert len(names) > 16
    assert "person 1" not in names


def test_hashes_of_photos_are_rejected_if_shards_do_not_record_them(config, tmp_path):
    exclude = write(tmp_path / "exclude.txt", photo_hash("000000-00"))
    with pytest.raises(
        FaceSnapError, match=r"exclude\.txt lists photos by hash, but .*shard-000000\.tar was built with"
    ):
        prepare_run(replace(config, exclude=exclude))


@given(name=NAME, dataset=NAME, other=NAME)
@settings(max_examples=100, deadline=None)
def test_names_match_with_or_without_their_dataset_in_any_unicode_form(name, dataset, other, tmp_path_factory):
    folder = tmp_path_factory.mktemp("list")
    for line in (name, f"{dataset}/{name}"):
        exclusions = read_exclusions(write(folder / "a.txt", "", unicodedata.normalize("NFD", f"  {line}\r")))
        matched = exclusions.matches(unicodedata.normalize("NFC", f"{dataset}/{name}"), "")
        assert bool(matched) is not line.startswith("#")
    same = unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name)
    exclusions = read_exclusions(write(folder / "a.txt", f"{dataset}/{name}"))
    assert same or not exclusions.matches(f"{dataset}/{other}", "")


def test_hashes_are_read_as_sha256sum_prints_them(tmp_path):
    hashes = [photo_hash(str(number)) for number in range(4)]
    lines = hashes[0], f"{hashes[1].upper()}  a photo.png", f"{hashes[2]} *b.png", f"\\{hashes[3]}  odd\\nname.png"
    exclusions = read_exclusions(write(tmp_path / "a.txt", *lines))
    assert (exclusions.photos, exclusions.people) == (frozenset(hashes), frozenset())
    assert exclusions.matches(f"faces/{hashes[1].upper()}", "") == {hashes[1]}


@given(data=st.binary(max_size=100))
@settings(max_examples=100, deadline=None)
def test_any_content_is_read_or_rejected_in_one_line_that_names_file_and_line(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("list") / "a.txt"
    path.write_bytes(data)
    try:
        read_exclusions(path)
    except FaceSnapError as error:
        assert str(error).startswith("Line ")
        assert f" of {path} is not UTF-8; save" in str(error)
