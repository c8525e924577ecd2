"""Networks are named by content, the candidate that fits is used, and features of a different network are refused."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.saved import save_identity
from facesnap_ext.landmarks.predictor import load_predictor
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.clip_file import encoder_hash
from facesnap_ext.weights.networks import choose_fitting, network_hash
from facesnap_ext.weights.search import find_models
from tests.support.stand_in_pack import stand_in_arcface
from tests.support.stand_ins import write_stand_in_deca, write_stand_in_flame
from tests.support.weight_files import KINDS, write

PARTS = ("face_pack", "clip", "deca", "flame")


def scale(path, factor=0.5):
    tensors = load_file(path)
    metadata = {}
    save_file({key: t * factor if t.is_floating_point() else t for key, t in tensors.items()}, path, metadata or None)


def add_candidates(folder):
    """Add a second network of each part, which comes first by name."""
    shutil.copytree(folder / "stand-in-pack", folder / "a-pack")
    stand_in_arcface(folder / "a-pack" / "glintr100.onnx", seed=77)
    shutil.copytree(folder / "stand-in-clip", folder / "a-clip")
    scale(folder / "a-clip" / "model.safetensors")
    write_stand_in_deca(folder / "a-deca.safetensors", 77)
    write_stand_in_flame(folder / "a-flame.safetensors", 77)


@pytest.fixture
def copied(stand_ins, tmp_path):
    return shutil.copytree(stand_ins, tmp_path / "facesnap")


def name_networks(folder, **networks):
    path = folder / "random.safetensors"
    weights = facesnap_file.load(path)
    mixer, ffrnet = weights.mixer, weights.ffrnet
    facesnap_file.save(folder / "b.safetensors", replace(weights.info, networks=networks), mixer, ffrnet)
    for other in folder.glob("*.safetensors"):
        if other.name not in ("b.safetensors",) and "stand-in" not in other.name and not other.name.startswith("a-"):
            other.unlink()
    return folder / "b.safetensors"


@pytest.mark.parametrize("wanted", [*PARTS, "all"])
def test_of_several_candidates_the_one_that_fits_is_used(copied, astronaut, wanted):
    files = find_models(copied)
    parts = PARTS if wanted == "all" else (wanted,)
    hashes = {part: network_hash(part, getattr(files, part)) for part in parts}
    expected = {part: getattr(files, part) for part in parts}
    unit = Unit(enabled=True, references=(astronaut,))
    name_networks(copied, **hashes)
    alone = Engine(lambda: find_models(copied)).prepare(unit, 512, 512)
    add_candidates(copied)
    files = find_models(copied)
    choose_fitting(files, hashes)
    assert {part: getattr(files, part) for part in parts} == expected
    prepared = Engine(lambda: find_models(copied)).prepare(unit, 512, 512)
    if wanted == "all":
        assert torch.equal(prepared.conditioning.tokens, alone.conditioning.tokens)
        assert (prepared.conditioning.landmarks.points == alone.conditioning.landmarks.points).all()
    assert prepared.notes == ()


@pytest.mark.parametrize("part", PARTS)
def test_a_file_trained_with_another_network_is_refused_or_noted(copied, astronaut, part):
    """Embeddings and CLIP tokens of the wrong network show a different person; landmarks of the wrong network only
    change the pose."""
    name_networks(copied, **{part: "0" * 64})
    engine, unit = Engine(lambda: find_models(copied)), Unit(enabled=True, references=(astronaut,))
    if part in ("face_pack", "clip"):
        message = r"^b\.safetensors was trained with a .* other than .*a different person's face"
        with pytest.raises(FaceSnapError, match=message):
            engine.prepare(unit, 512, 512)
    else:
        [note] = engine.prepare(unit, 512, 512).notes
        assert re.match(r"b\.safetensors was trained with a .* other than ", note)


def test_the_networks_of_a_saved_identity_are_used_if_the_file_names_none(copied, mirrored, grace_hopper):
    engine = Engine(lambda: find_models(copied))
    save_identity(engine.encoders(engine.files()), (mirrored,), "Eileen")
    unit = Unit(enabled=True, identity="Eileen", driving=grace_hopper, model="random.safetensors")
    expected = engine.prepare(unit, 512, 512).conditioning
    add_candidates(copied)
    actual = Engine(lambda: find_models(copied)).prepare(unit, 512, 512).conditioning
    assert torch.equal(actual.tokens, expected.tokens)


@pytest.mark.parametrize("value", ["[]", '{"face_pack": "x"}', '{"other": "%s"}' % ("0" * 64), "{", "[" * 99999])
def test_invalid_names_of_networks_are_reported(copied, value):
    path = copied / "random.safetensors"
    info = facesnap_file.read_info(path)
    save_file(load_file(path), path, {**info.to_metadata(), "networks": value})
    with pytest.raises(FaceSnapError, match=r"^The metadata of random\.safetensors is damaged"):
        facesnap_file.read_info(path)
    find_models(copied)


# CLIP


@pytest.fixture(scope="module")
def clip(stand_ins):
    return load_file(stand_ins / "stand-in-clip" / "model.safetensors")


def open_clip(tensors):
    from facesnap_ext.weights.clip_file import _FROM_OPEN_CLIP

    joined = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("vision_model.")
        if "_proj" in name and ".out_proj" not in name:
            kind = name.rpartition(".")[2]
            stem = name.split(".self_attn.")[0]
            if ".q_proj." in name:
                parts = [tensors[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                joined[f"{stem}.self_attn.in_proj.{kind}"] = torch.cat(parts)
        else:
            joined[name] = tensor
    result = {}
    for name, tensor in joined.items():
        for old, new in reversed(_FROM_OPEN_CLIP):
            name = name.replace(new, old)
        result[f"visual.{name}"] = tensor.contiguous()
    return result


FORMS = {
    "half precision": lambda tensors: {key: t.half() if t.is_floating_point() else t for key, t in tensors.items()},
    "with a text encoder": lambda tensors: {**tensors, "text_model.x.bias": torch.ones(3)},
    "open_clip": open_clip,
    "with a prefix": lambda tensors: {f"clip.{key}": t for key, t in tensors.items()},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_one_clip_has_one_name_in_all_layouts(clip, tmp_path, form, container):
    save_file(clip, tmp_path / "a.safetensors")
    if container == "torch":
        torch.save(FORMS[form](clip), tmp_path / "b.bin")
    else:
        save_file(FORMS[form](clip), tmp_path / "b.bin")
    assert encoder_hash(tmp_path / "a.safetensors") == encoder_hash(tmp_path / "b.bin")


def test_another_clip_has_another_name(clip, tmp_path):
    save_file(clip, tmp_path / "a.safetensors")
    names = {encoder_hash(tmp_path / "a.safetensors")}
    vectors = [key for key, tensor in clip.items() if tensor.is_floating_point() and "post_" not in key]
    for i, key in enumerate(sorted(key for key in vectors if clip[key].ndim == 1)[:6]):
        save_file({**clip, key: clip[key] + 0.25}, tmp_path / f"{i}.safetensors")
        names.add(encoder_hash(tmp_path / f"{i}.safetensors"))
    assert len(names) == 7


@pytest.mark.parametrize("name", ["clip_g.pth", "CLIP-ViT-bigG.safetensors", "a.safetensors", "clip_l.pth"])
def test_vit_h_is_preferred_to_other_encoders(tmp_path, name):
    shapes = dict.fromkeys(KINDS["CLIP_VISION"], (1664, 3, 14, 14))
    write(tmp_path / name, shapes, "torch" if name.endswith("pth") else "safetensors")
    assert find_models(tmp_path).clip == tmp_path / name
    vit_h = write(tmp_path / "z.pth", KINDS["CLIP_VISION"], "torch")
    assert find_models(tmp_path).clip == vit_h


# FLAME


@pytest.mark.parametrize(
    "name", ["flame2023.pkl", "FLAME2023_Open.pkl", "flame2023_no_jaw.pkl", "flame2020_no_jaw.pkl", "flame_nojaw.pkl"]
)
@pytest.mark.parametrize("converted", [False, True])
def test_deca_is_used_with_flame_2020_only(tmp_path, name, converted):
    from facesnap_ext.convert import convert_originals

    folder = tmp_path / "facesnap"
    folder.mkdir()
    write_stand_in_deca(folder / "deca.safetensors", 0)
    if converted:
        write_stand_in_flame(folder / "head.safetensors", 0)
        metadata = {"format": "facesnap-flame", "source": name}
        save_file(load_file(folder / "head.safetensors"), folder / "a.safetensors", metadata)
        (folder / "head.safetensors").unlink()
    else:
        (folder / name).write_bytes(b"\x80\x04N.")
    files = find_models(folder)
    convert_originals(files, lambda message: None)
    assert files.flame is None
    assert [model.role for model in files.found].count("flame") == 1  # the model is listed, but not used
    with pytest.raises(FaceSnapError, match=r"no FLAME head model.*Skipped: .* is (FLAME 2023|a FLAME model wi)"):
        files.require("flame")
    if converted:
        with pytest.raises(FaceSnapError, match="use FLAME 2020's generic_model"):
            load_predictor(files.deca, folder / "a.safetensors")
    write_stand_in_flame(folder / "z.safetensors", 0)
    assert find_models(folder).flame == folder / "z.safetensors"


# Recognition models identified by file name


@pytest.mark.parametrize("expected", ["W600K_R50.onnx", "w600k_r50.onnx", "glintr100.onnx", "GLINTR100.ONNX"])
@pytest.mark.parametrize("installed", ["buffalo_l", "antelopev2"])
def test_a_mismatch_names_the_file_and_ignores_case(tmp_path, expected, installed):
    from facesnap_ext.cache import Cache
    from facesnap_ext.identity.encoders import Encoders
    from tests.support.face_packs import PACKS, write_pack

    write_pack(tmp_path / "models" / installed, installed)
    encoders = Encoders(Cache(), find_models(tmp_path / "models"))
    if PACKS[installed][-1] == expected.lower():
        encoders.check_recognition(expected, "mine.safetensors")
        return
    with pytest.raises(FaceSnapError, match=rf"^mine\.safetensors is made for {expected}") as error:
        encoders.check_recognition(expected, "mine.safetensors")
    assert ("antelopev2," in str(error.value)) == (expected.lower() == "glintr100.onnx")
    assert "InstantID" not in str(error.value)
