"""Saved identities produce the same results as the photos, contain no pixels, and are validated when loaded."""

from __future__ import annotations

import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from facesnap_ext.cache import Cache
from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.identity.saved import save_identity
from facesnap_ext.photos import Photo
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights import identity_file
from facesnap_ext.weights.identity_file import SavedShape, load, safe_name, save
from facesnap_ext.weights.identity_folder import choose_identity, find_identities
from facesnap_ext.weights.recognise import Kind, recognise
from facesnap_ext.weights.search import find_models
from facesnap_ext.weights.tensors import fingerprint
from tests.support.weight_files import KINDS, write


@pytest.fixture(scope="module")
def models(stand_ins, astronaut, mirrored, tmp_path_factory):
    """A model folder with the identity Eileen, saved from two photos."""
    folder = shutil.copytree(stand_ins, tmp_path_factory.mktemp("saved") / "facesnap")
    save_identity(Encoders(Cache(), find_models(folder)), (astronaut, mirrored), "Eileen")
    return folder


@pytest.fixture
def copied(models, tmp_path):
    return shutil.copytree(models, tmp_path / "facesnap")


@pytest.fixture(scope="module")
def engine(models):
    return Engine(lambda: find_models(models))


@pytest.fixture
def unit():
    return Unit(enabled=True, identity="Eileen", model="random.safetensors")


@pytest.fixture(scope="module")
def eileen(models):
    return models / "identities" / "Eileen.safetensors"


@pytest.mark.parametrize("mode", ["fused", "averaged"])
def test_saved_identity_is_bit_identical_to_the_photos(engine, unit, astronaut, mirrored, grace_hopper, mode):
    unit = replace(unit, driving=grace_hopper, reference_mode=mode)
    photos = replace(unit, identity="", references=(astronaut, mirrored))
    saved, direct = (engine.prepare(either, 640, 512) for either in (unit, photos))
    assert torch.equal(saved.conditioning.tokens, direct.conditioning.tokens)
    assert np.array_equal(saved.conditioning.landmarks.points, direct.conditioning.landmarks.points)
    assert torch.equal(saved.embeddings, direct.embeddings)
    assert saved.references == ()
    assert not torch.equal(
        direct.conditioning.tokens,
        engine.prepare(replace(photos, references=(mirrored,)), 640, 512).conditioning.tokens,
    )


def test_saved_identity_does_not_need_clip(copied, engine, unit, grace_hopper):
    unit = replace(unit, driving=grace_hopper)
    expected = engine.prepare(unit, 512, 512).conditioning.tokens
    shutil.rmtree(copied / "stand-in-clip")
    assert torch.equal(Engine(lambda: find_models(copied)).prepare(unit, 512, 512).conditioning.tokens, expected)


def test_photos_are_fused_with_a_saved_identity(copied, unit, astronaut, mirrored):
    engine = Engine(lambda: find_models(copied))
    save_identity(engine.encoders(engine.files()), (mirrored,), "second")
    both = engine.prepare(replace(unit, identity="second", references=(astronaut,)), 512, 512)
    photos = engine.prepare(replace(unit, identity="", references=(astronaut, mirrored)), 512, 512)
    assert torch.equal(both.conditioning.tokens, photos.conditioning.tokens)
    assert np.array_equal(both.conditioning.landmarks.points, photos.conditioning.landmarks.points)
    assert len(both.references) == 1
    assert len(both.embeddings) == 2


def test_saved_identity_has_no_pose(engine, unit, grace_hopper):
    grey = Photo(np.full((128, 128, 3), 128, np.uint8), "grey.png")
    for init_image in (None, grey):
        with pytest.raises(FaceSnapError, match="Eileen does not contain a pose; add a driving photo"):
            engine.prepare(unit, 512, 512, init_image=init_image)
    prepared = engine.prepare(unit, 512, 512, init_image=grace_hopper)
    assert prepared.in_init_image
    driven = engine.prepare(replace(unit, driving=grace_hopper), 512, 600)
    assert prepared.driving.photo is driven.driving.photo is grace_hopper


def test_the_open_face_models_shape_is_saved_beside_decas(eileen, tmp_path):
    identity = load(eileen)
    assert identity.open_shape is None, "the pack has no model for 68 landmarks"
    shape = SavedShape(torch.randn(40), torch.randn(72, 3), "1")
    save(tmp_path / "both.safetensors", replace(identity, open_shape=shape))
    saved = load(tmp_path / "both.safetensors")
    assert torch.equal(saved.open_shape.modes, shape.modes)
    assert torch.equal(saved.open_shape.residual, shape.residual)
    assert saved.open_shape.version == "1"
    assert torch.equal(saved.shapes, identity.shapes)
    assert saved.networks == identity.networks


@pytest.mark.parametrize("version", ["1", "2"])
def test_files_of_earlier_versions_are_read(eileen, tmp_path, version):
    """They contain a name, which is not used."""
    identity = load(changed(eileen, tmp_path / "Old friend.safetensors", version=version, name="Eileen"))
    assert identity.name == "Old friend"
    assert identity.open_shape is None
    assert torch.equal(identity.embeddings, load(eileen).embeddings)


def test_file_contains_features_but_no_pixels(eileen, astronaut, mirrored):
    content = eileen.read_bytes()
    with safe_open(eileen, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert {key: tuple(t.shape)[:1] + tuple(t.shape)[1:2] for key, t in tensors.items()} == {
        "embeddings": (2, 512),
        "clip_tokens": (2, 257),
        "shapes": (2, tensors["shapes"].shape[1]),
    }
    assert len(content) < sum(tensor.numel() * 4 for tensor in tensors.values()) + 2048
    for photo in (astronaut, mirrored):
        for row in photo.pixels[60:180:10]:
            assert row[200:216].tobytes() not in content
            assert (row[200:216] / np.float32(255)).astype(np.float32).tobytes() not in content
        assert photo.name.encode() not in content
    assert b"Eileen" not in content, "the name of the file is the only place where the person's name is"
    assert json.loads(metadata["photos"]) == [astronaut.digest[:10], mirrored.digest[:10]]
    assert set(metadata) == {"format", "version", "photos", "networks", "digest", "facesnap"}


@pytest.mark.parametrize(
    ("part", "what"),
    [("face_pack", "face recognition model"), ("clip", "CLIP image encoder"), ("deca", "DECA encoder")],
)
def test_identity_saved_with_other_networks_is_rejected(copied, unit, grace_hopper, part, what):
    files = find_models(copied)
    if part == "face_pack":
        from tests.support.stand_in_pack import stand_in_arcface

        stand_in_arcface(copied / "stand-in-pack" / "glintr100.onnx", seed=99)
    else:
        path = files.clip / "model.safetensors" if part == "clip" else files.deca
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        next(t for t in tensors.values() if t.is_floating_point()).view(-1)[0] += 0.01
        save_file(tensors, path, metadata)
    unit = replace(unit, driving=grace_hopper)
    with pytest.raises(FaceSnapError, match=f"Eileen was saved with a {what} other than .*facesnap"):
        Engine(lambda: find_models(copied)).prepare(unit, 512, 512)


def test_same_networks_in_other_containers_are_accepted(copied, unit, grace_hopper):
    clip, deca = copied / "stand-in-clip", copied / "stand-in-deca.safetensors"
    tensors = load_file(clip / "model.safetensors")
    torch.save(dict(reversed(tensors.items())), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    with safe_open(deca, "pt") as file:
        metadata = {**file.metadata(), "source": "the same from elsewhere"}
    save_file(load_file(deca), copied / "renamed.safetensors", metadata)
    deca.unlink()
    Engine(lambda: find_models(copied)).prepare(replace(unit, driving=grace_hopper), 512, 512)


def test_fingerprint_covers_names_dtypes_shapes_and_values(tmp_path):
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}
    variants = [
        base,
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"a": base["a"].half(), "b": base["b"]},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"] + 1, "b": base["b"]},
        {"a": base["a"].bfloat16(), "b": base["b"]},
    ]
    fingerprints = []
    for i, tensors in enumerate(variants):
        save_file(tensors, tmp_path / f"{i}.safetensors", {"any": str(i)})
        torch.save({"state_dict": tensors}, tmp_path / f"{i}.pt")
        fingerprints.append(fingerprint(tmp_path / f"{i}.safetensors"))
        assert fingerprint(tmp_path / f"{i}.pt") == fingerprints[-1]
    assert len(set(fingerprints)) == len(variants)


def changed(eileen, path, tensors=None, drop=(), **metadata):
    with safe_open(eileen, "pt") as file:
        known = file.metadata()
    content = {key: tensor for key, tensor in {**load_file(eileen), **(tensors or {})}.items() if key not in drop}
    known = {key: value for key, value in {**known, **metadata}.items() if value is not None}
    save_file(content, path, {**known, "digest": identity_file._digest(content, known)})
    return path


HASH = "0" * 64
OPEN_SHAPE = {"open_face.modes": torch.zeros(40), "open_face.residual": torch.zeros(72, 3)}
HOSTILE = {
    "half precision": {"tensors": {"embeddings": torch.ones(2, 512).half()}},
    "integers": {"tensors": {"clip_tokens": torch.ones(2, 257, 64).int()}},
    "not a number": {"tensors": {"clip_tokens": torch.full((2, 257, 64), float("nan"))}},
    "infinite": {"tensors": {"embeddings": torch.full((2, 512), float("inf"))}},
    "zero embedding": {"tensors": {"embeddings": torch.zeros(2, 512)}},
    "an additional image": {"tensors": {"picture": torch.zeros(3, 64, 64)}},
    "one photo too many": {"tensors": {"embeddings": torch.ones(3, 512)}},
    "no photo": {"tensors": {"embeddings": torch.ones(0, 512)}, "photos": "[]"},
    "an axis too many": {"tensors": {"embeddings": torch.ones(2, 512, 1)}},
    "no CLIP tokens": {"drop": ("clip_tokens",)},
    "no version": {"version": None},
    "no photos": {"photos": None},
    "invalid photos": {"photos": '["../../etc", "0123456789"]'},
    "photos in a dictionary": {"photos": '{"0123456789": 1}'},
    "invalid networks": {"networks": "[]"},
    "a network without a hash": {"networks": json.dumps({"face_pack": HASH, "clip": HASH, "deca": "x"})},
    "a network missing": {"networks": json.dumps({"face_pack": HASH, "deca": HASH})},
    "modes without a residual": {"tensors": {"open_face.modes": torch.zeros(40)}},
    "a residual of other points": {"tensors": OPEN_SHAPE | {"open_face.residual": torch.zeros(68, 3)}},
    "modes with an axis too many": {"tensors": OPEN_SHAPE | {"open_face.modes": torch.zeros(2, 40)}},
    "a shape that is no face": {"tensors": OPEN_SHAPE | {"open_face.modes": torch.full((40,), 1e9)}, "open_face": "1"},
    "a shape without a version": {"tensors": OPEN_SHAPE},
    "a picture of another size": {"tensors": {"picture": torch.zeros(64, 64, 3, dtype=torch.uint8)}},
    "a picture of numbers": {"tensors": {"picture": torch.zeros(128, 128, 3)}},
    "deep brackets": {"networks": "[" * 100_000},
    "not JSON": {"photos": "\x00"},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_invalid_file_is_rejected_in_one_sentence(eileen, tmp_path, case):
    path = changed(eileen, tmp_path / "hostile.safetensors", **HOSTILE[case])
    with pytest.raises(FaceSnapError, match=r"^hostile\.safetensors is damaged \(.*\); save the person again from"):
        load(path)


def test_sizes_that_do_not_match_the_named_networks_are_rejected(copied, eileen, unit, grace_hopper):
    cases = {
        "embeddings": (torch.ones(2, 256), "expects 512 values per feature from the face model pack"),
        "clip_tokens": (torch.ones(2, 257, 32), "expects 64 values per feature from the CLIP image encoder"),
        "shapes": (torch.ones(2, 7), "face shape in the saved identity has 7 values"),
    }
    engine = Engine(lambda: find_models(copied))
    for key, (tensor, message) in cases.items():
        changed(eileen, copied / "identities" / f"{key}.safetensors", {key: tensor})
        with pytest.raises(FaceSnapError, match=message):
            engine.prepare(replace(unit, identity=key, driving=grace_hopper), 512, 512)


def test_newer_larger_and_foreign_files_are_rejected(eileen, tmp_path, monkeypatch):
    with pytest.raises(FaceSnapError, match="newer FaceSnap"):
        load(changed(eileen, tmp_path / "newer.safetensors", version="4"))
    with pytest.raises(FaceSnapError, match="is a LoRA, not a saved identity"):
        load(write(tmp_path / "lora.safetensors", KINDS["LORA"]))
    with pytest.raises(FaceSnapError, match="There is no file"):
        load(tmp_path / "none.safetensors")
    boom = tmp_path / "boom.safetensors"
    boom.write_bytes(b"\x80\x04cos\nsystem\n(S'touch executed'\ntR.")
    with pytest.raises(FaceSnapError, match="is a Python pickle"):
        load(boom)
    huge = tmp_path / "huge.safetensors"
    huge.write_bytes(struct.pack("<Q", 2**60) + b"{}")  # declares a huge header
    with pytest.raises(FaceSnapError, match="damaged"):
        load(huge)
    monkeypatch.setattr(identity_file, "MAX_BYTES", 1000)
    with pytest.raises(FaceSnapError, match="too large for an identity file"):
        load(eileen)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncated_or_modified_file_is_rejected_or_loads_completely(eileen, tmp_path, data):
    content = bytearray(eileen.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    path = tmp_path / "damaged.safetensors"
    if data.draw(st.booleans()):
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(FaceSnapError):
            load(path)
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        try:
            identity = load(path)
        except FaceSnapError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert identity.embeddings.isfinite().all()
            assert len(identity.embeddings) == len(identity.clip_tokens) == len(identity.photos) == 2


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(["header", "metadata", "tensors"]), position=st.floats(0, 1, exclude_max=True))
def test_a_file_with_any_bit_changed_is_never_used(eileen, tmp_path, place, position):
    content = bytearray(eileen.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    metadata = content.index(b"__metadata__")
    start, end = {
        "header": (0, header),
        "metadata": (metadata, content.index(b"}", metadata)),
        "tensors": (header, len(content)),
    }[place]
    bit = 8 * start + int(position * 8 * (end - start))
    content[bit // 8] ^= 1 << bit % 8
    path = tmp_path / "changed.safetensors"
    path.write_bytes(content)
    with pytest.raises(FaceSnapError, match=r"^changed\.safetensors [^\n]*\.$"):
        load(path)


@pytest.mark.parametrize("field", ["photos", "networks", "facesnap", "more"])
def test_metadata_of_another_identity_are_not_taken(eileen, tmp_path, field):
    """Each of these values is valid by itself."""
    with safe_open(eileen, "pt") as file:
        known = file.metadata()
    values = {
        "photos": '["0123456789", "abcdefabcd"]',
        "networks": json.dumps(dict.fromkeys(json.loads(known["networks"]), HASH)),
    }
    path = tmp_path / "changed.safetensors"
    save_file(load_file(eileen), path, {**known, field: values.get(field, "Ada")})
    with pytest.raises(FaceSnapError, match=r"^changed\.safetensors is damaged \(its contents have changed"):
        load(path)


def test_only_identities_are_overwritten_and_only_on_request(eileen, tmp_path):
    identity = load(eileen)
    path = tmp_path / "deep" / "Eileen.safetensors"
    save(path, identity)
    before = path.read_bytes()
    other = replace(identity, photos=("0" * 10,) * 2)
    with pytest.raises(FaceSnapError, match="already an identity named Eileen"):
        save(path, other)
    assert path.read_bytes() == before
    save(path, other, overwrite=True)
    assert load(path).photos == other.photos
    lora = write(tmp_path / "lora.safetensors", KINDS["LORA"])
    with pytest.raises(FaceSnapError, match="is a LoRA, not a saved identity; it is not overwritten"):
        save(lora, identity, overwrite=True)
    assert [file.name for file in path.parent.iterdir()] == ["Eileen.safetensors"]  # no temporary file is left


def test_identities_are_found_by_name_and_are_not_model_files(copied, eileen):
    identities = copied / "identities"
    write(identities / "lora.safetensors", KINDS["LORA"])
    (identities / "half.safetensors").write_bytes(b"half")
    shutil.copy(eileen, copied / "lost.safetensors")
    assert recognise(eileen) is Kind.IDENTITY
    assert find_identities(copied) == {"Eileen": identities / "Eileen.safetensors"}
    files = find_models(copied)
    assert "lost.safetensors" not in files.facesnap
    assert any("lost.safetensors is a saved identity; move it to" in reason for reason in files.passed_over)
    for name in ("Nobody", "../lost", str(copied / "lost"), "*", ""):
        with pytest.raises(FaceSnapError, match=r"There is no identity named .* choose one of Eileen"):
            choose_identity(copied, name)
    with pytest.raises(FaceSnapError, match="damaged"):
        load(choose_identity(copied, "half"))
    assert find_identities(copied / "none") == {}


@given(
    st.text(max_size=300)
    | st.sampled_from(["CON", "nul.txt", "Com1", "../../x", "a/b\\c", "...", "LPT¹ .a", "a" * 400])
)
def test_any_name_becomes_a_valid_file_name(name):
    try:
        safe = safe_name(name)
    except FaceSnapError:
        assert not any(letter.isalnum() for letter in name)
        return
    assert Path(f"{safe}.safetensors").name == f"{safe}.safetensors"
    assert not set(safe) & set('<>:"/\\|?*')
    assert safe.isprintable()
    assert safe[0] not in ". "
    assert safe[-1] not in ". "
    assert safe.split(".")[0].strip().upper() not in {"CON", "PRN", "AUX", "NUL", *(f"COM{i}" for i in range(10))}
    assert len(safe.encode()) <= 150
    assert safe_name(safe) == safe


def test_names_stay_readable():
    assert safe_name("  Jane\tDoe ") == "Jane Doe"
    assert safe_name("Zoë/Chloé") == "Zoë_Chloé"
    assert safe_name("con") == "_con"
    assert safe_name("a\u202eb") == "ab"
    with pytest.raises(FaceSnapError, match="choose a name"):
        safe_name("../..")


def test_preview_shows_the_shape_of_a_saved_identity(engine, astronaut, mirrored, grace_hopper):
    """It is that of all photos the person was saved from. Given photos take precedence over the name."""
    saved = engine.preview(identity="Eileen")
    assert saved.landmarks is None
    for references, name, alike in (
        ((astronaut, mirrored), "", True),
        ((astronaut,), "", False),
        ((mirrored,), "Eileen", False),
        ((), "", False),
    ):
        other = engine.preview(references, identity=name)
        assert np.array_equal(saved.rig.rest, other.rig.rest) == alike
    driven = engine.preview((), grace_hopper, (640, 512), identity="Eileen").landmarks
    for references, alike in (((astronaut, mirrored), True), ((), False)):
        other = engine.preview(references, grace_hopper, (640, 512)).landmarks
        assert np.array_equal(driven.points, other.points) == alike
    with pytest.raises(FaceSnapError, match="Nobody"):
        engine.preview(identity="Nobody")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o002])
@pytest.mark.parametrize("overwrite", [False, True])
def test_identity_files_are_private_from_the_first_byte(tmp_path, eileen, umask, overwrite, monkeypatch):
    """Other users can read neither the file nor the temporary file next to it."""
    path = tmp_path / "private.safetensors"
    if overwrite:
        path.write_bytes(eileen.read_bytes())
        path.chmod(0o644)
    modes = []
    touch = Path.touch

    def watched(self, *args, **values):
        touch(self, *args, **values)
        modes.append(self.stat().st_mode & 0o777)

    monkeypatch.setattr(Path, "touch", watched)
    before = os.umask(umask)
    try:
        save(path, load(eileen), overwrite)
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("pose", ["photo", "own", "template", "sliders"])
@pytest.mark.parametrize("with_deca", [True, False])
@pytest.mark.parametrize("shapeless", [True, False])
def test_messages_about_a_saved_identity_name_a_way_that_works(
    copied, unit, mirrored, grace_hopper, pose, with_deca, shapeless
):
    """Whatever is missing, following the advice makes the job possible and does not lead to another error."""
    deca = copied / "stand-in-deca.safetensors"

    def without_deca(on):
        if on == deca.exists():
            (deca if on else copied / "away").rename(copied / "away" if on else deca)

    without_deca(shapeless)
    save_identity(Encoders(Cache(), find_models(copied)), (mirrored,), "someone")
    without_deca(not with_deca)
    engine = Engine(lambda: find_models(copied))
    unit = replace(unit, identity="someone", pose=pose, driving=None)

    def attempt(changed):
        try:
            engine.prepare(changed, 512, 512)
        except FaceSnapError as error:
            return str(error)
        return ""

    message = attempt(unit)
    if not message:
        assert pose in ("template", "sliders")
        return
    if "put one there" in message:  # a model file; the panel says where to get it
        return
    advised = []
    if "driving photo" in message:
        advised.append(replace(unit, pose="photo", driving=grace_hopper))
    if "choose a template" in message:
        advised.append(replace(unit, pose="template"))
    assert advised, message
    for changed in advised:
        second = attempt(changed)
        assert second == "" or "put one there" in second or "put that file" in second


def test_a_picture_is_part_of_the_file_and_its_digest(eileen, tmp_path):
    picture = torch.randint(0, 256, (128, 128, 3), dtype=torch.uint8)
    path = tmp_path / "with picture.safetensors"
    save(path, replace(load(eileen), picture=picture))
    assert torch.equal(load(path).picture, picture)
    assert torch.equal(load(path).embeddings, load(eileen).embeddings)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), "picture": picture + 1}, path, metadata)
    with pytest.raises(FaceSnapError, match="its contents have changed"):
        load(path)
