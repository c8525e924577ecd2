"""What the origins of training images change: the metadata of the trained file."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.networks import network_hash
from facesnap_ext.weights.sources import NOT_RECORDED, ImageSource
from facesnap_lab.training import checkpoints, trainer
from facesnap_lab.training.provenance import read_sources
from facesnap_lab.training.shard_writer import write_shards
from facesnap_lab.training.shards import read_shard_index
from tests.support.training_world import samples


def photo_hash(person: int, photo: int) -> str:
    return f"{person:032x}{photo:032x}"


def samples_with_provenance(networks=None):
    """The samples of `samples`, with the first person from one source and the others from another one."""
    for sample in samples(networks=networks):
        person, number = map(int, sample.key.split("-"))
        origin = ("A", "CC0-1.0", "written") if person == 0 else ("B", "research only", "unknown")
        fields = dict(zip(("source", "license", "consent"), origin))
        yield replace(sample, provenance={**fields, "photo": photo_hash(person, number)})


@pytest.fixture(scope="module")
def shards(tmp_path_factory, world) -> tuple[Path, ...]:
    networks = {"face_pack": network_hash("face_pack", world / "pack")}
    return tuple(write_shards(tmp_path_factory.mktemp("shards"), samples_with_provenance(networks), per_shard=4))


def test_trained_file_counts_its_images_by_source_license_and_consent(config, shards):
    done = trainer.train(replace(config, steps=1, id_rows=0, shards=(*shards, *config.shards)))
    sources = facesnap_file.read_info(done / checkpoints.WEIGHTS).sources
    assert sources == (
        ImageSource(NOT_RECORDED, NOT_RECORDED, NOT_RECORDED, 15),
        ImageSource("B", "research only", "unknown", 12),
        ImageSource("A", "CC0-1.0", "written", 3),
    )
    assert read_sources(read_shard_index(config.shards)) == ()


@pytest.mark.parametrize(
    "provenance", [1, [], {"source": "A"}, {"source": "A", "license": 1, "consent": "", "photo": ""}]
)
def test_damaged_provenance_is_rejected(shards, tmp_path, provenance):
    changed = tmp_path / "changed.tar"
    with tarfile.open(shards[0]) as before, tarfile.open(changed, "w") as after:
        for member in before:
            content = before.extractfile(member).read()
            if member.name == "000001-01.json":
                content = json.dumps({**json.loads(content), "provenance": provenance}).encode()
                member.size = len(content)
            after.addfile(member, io.BytesIO(content))
    with pytest.raises(FaceSnapError, match=r"Image 4 of the training data.*changed\.tar, is damaged \(its provenance"):
        read_sources(read_shard_index([changed]))
