"""Training with the packs that users have, and only with shards made with the same pack."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.networks import network_hash
from facesnap_lab.training.arcface import SIDE, load_arcface
from facesnap_lab.training.shard_writer import write_shards
from facesnap_lab.training.shards import read_networks, read_sample, read_shard_index
from facesnap_lab.training.trainer import train
from tests.support.face_packs import PACKS, write_pack
from tests.support.training_world import samples, train_config


def shards_of(folder, **networks):
    return tuple(write_shards(folder, samples(networks=networks), per_shard=6))


@pytest.mark.parametrize("name", PACKS)
def test_the_recognition_model_of_every_published_pack_can_be_trained_with(tmp_path, name):
    pack = write_pack(tmp_path / name, name)
    arcface = load_arcface(pack)
    assert arcface.name == PACKS[name][-1]
    faces = torch.zeros(2, 3, SIDE, SIDE, requires_grad=True)
    arcface(faces).square().sum().backward()
    assert faces.grad.isfinite().all()
    assert faces.grad.any()


@pytest.mark.parametrize("name", ["antelopev2", "buffalo_sc"])  # with and without further networks in the pack
def test_training_keeps_to_the_pack_that_it_began_with(world, tmp_path, name):
    pack = write_pack(tmp_path / name, name, seed=1)
    digest = network_hash("face_pack", pack)
    config = replace(
        train_config(world, tmp_path / "run"), face_pack=pack, shards=shards_of(tmp_path / "s", face_pack=digest)
    )
    result = train(config) / "facesnap.safetensors"
    info = facesnap_file.read_info(result)
    assert info.networks == {"face_pack": digest, "clip": network_hash("clip", config.clip)}
    assert info.recognition == PACKS[name][-1]
    with safe_open(result, "pt") as file:
        assert json.loads(file.metadata()["networks"]) == info.networks
    # training resumes from this file only with the same networks
    train(replace(config, start=result, out=tmp_path / "more"))
    other = write_pack(tmp_path / "other", name, seed=2)
    shards = shards_of(tmp_path / "t", face_pack=network_hash("face_pack", other))
    with pytest.raises(FaceSnapError, match="was trained with a different face recognition model than shard-000000"):
        train(replace(config, start=result, face_pack=other, shards=shards, out=tmp_path / "third"))


@pytest.mark.parametrize("id_rows", [1, 0])
@pytest.mark.parametrize("case", ["another pack", "not named"])
def test_shards_of_another_pack_are_refused(world, tmp_path, id_rows, case):
    pack = write_pack(tmp_path / "buffalo_l", "buffalo_l", seed=1)
    shards = shards_of(tmp_path / "s", **({"face_pack": "0" * 64} if case == "another pack" else {}))
    config = replace(train_config(world, tmp_path / "run"), face_pack=pack, shards=shards, id_rows=id_rows)
    if case == "another pack" and not id_rows:  # nothing else has features of a recognition model
        assert train(config)
        return
    message = (
        "come from a different recognition model" if case == "another pack" else "does not name the recognition model"
    )
    with pytest.raises(FaceSnapError, match=message):
        train(config)


def test_shards_made_with_different_networks_are_refused(tmp_path):
    names = {"face_pack": "1" * 64, "deca": "2" * 64, "flame": "3" * 64}
    first = shards_of(tmp_path / "a", **names)
    assert read_networks(read_shard_index(first)) == names
    for part, title in (("face_pack", "face recognition model"), ("deca", "DECA encoder"), ("flame", "FLAME")):
        other = shards_of(tmp_path / part, **{**names, part: "4" * 64})
        with pytest.raises(FaceSnapError, match=f"was made with a different {title}"):
            read_networks(read_shard_index((*first, *other)))


def test_an_embedding_with_a_changed_bit_is_reported(tmp_path):
    [shard, *_] = shards_of(tmp_path / "s", face_pack="1" * 64)
    index = read_shard_index([shard])
    embedding = read_sample(index, 0).embedding
    content = bytearray(shard.read_bytes())
    content[content.index(embedding.tobytes()) + 42] ^= 4
    shard.write_bytes(content)
    with pytest.raises(FaceSnapError, match="embedding has changed"):
        read_sample(index, 0)


@pytest.mark.parametrize("spare", ["1k3d68.onnx", "genderage.onnx"])
def test_a_broken_spare_file_does_not_stop_training(tmp_path, spare):
    pack = write_pack(tmp_path / "[antelopev2]" / "antelopev2", "antelopev2")
    (pack / spare).write_bytes(b"<html>")
    (pack / "._glintr100.onnx").write_bytes(b"\0\5\x16\7")
    assert load_arcface(pack).name == load_arcface(pack.parent).name == "glintr100.onnx"
    shutil.copy(pack / "2d106det.onnx", pack / "glintr100.onnx")
    with pytest.raises(FaceSnapError, match=rf"{spare} is not a valid ONNX file"):
        load_arcface(pack)
    with pytest.raises(FaceSnapError, match="is not a face recognition model"):
        load_arcface(pack / "2d106det.onnx")
