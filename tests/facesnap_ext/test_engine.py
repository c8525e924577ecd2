"""What the engine computes from photos and settings, what it caches, and what it refuses."""

from __future__ import annotations

import os
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity import encoders, faces
from facesnap_ext.identity.saved import save_identity
from facesnap_ext.landmarks.points72 import crop_and_resize
from facesnap_ext.landmarks.poses import TEMPLATES, placement, pose_landmarks, reposition
from facesnap_ext.landmarks.predictor import LandmarkPredictor
from facesnap_ext.landmarks.rigs import flame_rig
from facesnap_ext.networks.mixer import FacialAttributeMixer
from facesnap_ext.photos import Photo
from facesnap_ext.regions import around
from facesnap_ext.settings.pose import pose_from_unit
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.search import find_models
from tests.support.stand_in_pack import stand_in_arcface
from tests.support.units import changed


@pytest.fixture(scope="module")
def engine(stand_ins):
    return Engine(lambda: find_models(stand_ins))


@pytest.fixture
def unit(astronaut):
    return Unit(enabled=True, references=(astronaut,), model="random.safetensors")


@pytest.fixture
def copied(stand_ins, tmp_path):
    return shutil.copytree(stand_ins, tmp_path / "facesnap")


def grey(name="grey.png"):
    return Photo(np.full((256, 256, 3), 128, np.uint8), name)


def test_conditioning_equals_the_results_of_its_parts(engine, unit, stand_ins, mirrored):
    from facesnap_ext.identity import clip, faces
    from facesnap_ext.landmarks.predictor import load_predictor
    from facesnap_ext.weights import facesnap_file

    prepared = engine.prepare(changed(unit, driving=mirrored, weight=0.5, start=0.1, end=0.9), 640, 512)
    conditioning = prepared.conditioning
    pack = faces.load_pack(stand_ins / "stand-in-pack")
    face, driving = (faces.select_face(faces.find_faces(pack, photo)) for photo in (unit.references[0], mirrored))
    weights = facesnap_file.load(stand_ins / "random.safetensors")
    tokens = weights.mixer(
        torch.from_numpy(face.embedding)[None, None],
        clip.load_image_encoder(stand_ins / "stand-in-clip")([face.crop])[None],
    )
    torch.testing.assert_close(conditioning.tokens, tokens)
    predictor = load_predictor(stand_ins / "stand-in-deca.safetensors", stand_ins / "stand-in-flame.safetensors")
    points = predictor.predict(
        predictor.encode(face.photo.pixels, face.box), predictor.encode(mirrored.pixels, driving.box)
    )
    expected = crop_and_resize(points, 640, 512, driving.box).points
    np.testing.assert_allclose(conditioning.landmarks.points, expected, atol=1e-3)
    assert (conditioning.landmarks.width, conditioning.landmarks.height) == (640, 512)
    assert (
        conditioning.strength.weight,
        conditioning.strength.start,
        conditioning.strength.end,
        conditioning.text_free,
    ) == (0.5, 0.1, 0.9, True)
    assert conditioning.name == "random.safetensors"
    for key, tensor in weights.ffrnet.state_dict().items():
        assert torch.equal(conditioning.ffrnet.state_dict()[key], tensor)


def count_runs(monkeypatch):
    runs = []

    def counted(owner, name, label):
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: runs.append(label) or method(*args, **kwargs))

    counted(faces, "find_faces", "faces")
    counted(encoders, "load_image_encoder", "clip")
    counted(FacialAttributeMixer, "forward", "mixer")
    counted(LandmarkPredictor, "predict", "landmarks")
    return runs


def test_a_second_job_with_the_same_photos_computes_nothing(stand_ins, unit, mirrored, monkeypatch):
    engine = Engine(lambda: find_models(stand_ins))
    runs = count_runs(monkeypatch)
    first = engine.prepare(replace(unit, driving=mirrored), 512, 512)
    assert sorted(set(runs)) == ["clip", "faces", "landmarks", "mixer"]
    runs.clear()
    renamed = Photo(unit.references[0].pixels.copy(), "the same pixels.png")
    second = engine.prepare(changed(unit, references=(renamed,), driving=mirrored, weight=0.3), 512, 768)
    assert runs == []
    assert torch.equal(first.conditioning.tokens, second.conditioning.tokens)
    assert second.conditioning.strength.weight == 0.3
    assert second.conditioning.landmarks.height == 768


def test_the_identity_of_an_earlier_job_is_never_reused(engine, unit, grace_hopper, astronaut):
    first = engine.prepare(unit, 512, 512).conditioning
    other = engine.prepare(replace(unit, references=(grace_hopper,)), 512, 512).conditioning
    again = engine.prepare(unit, 512, 512).conditioning
    assert not torch.allclose(first.tokens, other.tokens, atol=1e-4)
    assert torch.equal(first.tokens, again.tokens)
    one_pixel = astronaut.pixels.copy()
    one_pixel[60, 220] = 0
    altered = engine.prepare(replace(unit, references=(Photo(one_pixel, astronaut.name),)), 512, 512).conditioning
    assert not torch.equal(first.tokens, altered.tokens)


@pytest.mark.parametrize("part", ["random.safetensors", "stand-in-pack/glintr100.onnx", "stand-in-deca.safetensors"])
def test_a_file_replaced_between_two_jobs_is_loaded_again(copied, unit, part, monkeypatch):
    engine = Engine(lambda: find_models(copied))
    engine.prepare(unit, 512, 512)
    runs = count_runs(monkeypatch)
    os.utime(copied / part, ns=(1, 1))
    engine.prepare(unit, 512, 512)
    assert runs


@pytest.mark.parametrize(
    ("part", "stage"),
    [("random.safetensors", "encoding the face"), ("stand-in-pack/glintr100.onnx", "loading the FaceSnap file")],
)
def test_a_file_replaced_during_preparation_leaves_nothing_of_the_old_file(copied, unit, tmp_path, part, stage):
    """The current job may use either file; the next one uses only the new file."""
    new = tmp_path / "new"
    if part.endswith(".onnx"):
        stand_in_arcface(new, seed=9)
    else:
        weights = facesnap_file.load(copied / part)
        for parameter in weights.mixer.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        facesnap_file.save(new, weights.info, weights.mixer, weights.ffrnet)
    engine = Engine(lambda: find_models(copied))
    old = engine.prepare(unit, 512, 512).conditioning.tokens
    engine = Engine(lambda: find_models(copied))
    engine.prepare(unit, 512, 512, progress=lambda name: name == stage and new.exists() and new.replace(copied / part))
    assert not new.exists()
    tokens = engine.prepare(unit, 512, 512).conditioning.tokens
    assert torch.equal(tokens, Engine(lambda: find_models(copied)).prepare(unit, 512, 512).conditioning.tokens)
    assert not torch.allclose(tokens, old, atol=1e-3)


def test_an_identity_file_replaced_by_one_of_the_same_size_and_time_is_loaded_again(copied, unit, grace_hopper):
    """This happens when a zip file is unpacked, which sets the times of its files."""
    engine = Engine(lambda: find_models(copied))
    people = [(unit.references, "Anna"), ((grace_hopper,), "Bert")]
    paths = [save_identity(engine.encoders(engine.files()), photos, name) for photos, name in people]
    for path in paths:
        os.utime(path, ns=(1, 1))
    anna = replace(unit, references=(), identity="Anna", pose="sliders")
    before = engine.prepare(anna, 512, 512).conditioning.tokens
    assert len({path.stat().st_size for path in paths}) == 1
    paths[1].replace(paths[0])
    after = engine.prepare(anna, 512, 512).conditioning.tokens
    assert not torch.allclose(after, before, atol=1e-3)


def test_each_persons_file_is_loaded_once_and_only_the_jobs_files_are_kept(stand_ins, unit, monkeypatch):
    loads = []
    load = facesnap_file.load
    monkeypatch.setattr(facesnap_file, "load", lambda path: loads.append(path.stem) or load(path))
    engine = Engine(lambda: find_models(stand_ins))
    a, b = unit, replace(unit, model="init.safetensors")
    for person in (a, b, a, b):
        engine.prepare(person, 512, 512, files_kept=2)
    assert loads == ["random", "init"]
    engine.prepare(b, 512, 512)  # in a job with one person, only that person's file stays
    engine.prepare(a, 512, 512)
    assert loads == ["random", "init", "random"]


def test_the_file_is_loaded_while_faces_are_detected(stand_ins, unit, monkeypatch):
    """Each of the two waits until the other has begun; one after the other, they would wait forever."""
    both = threading.Barrier(2, timeout=30)
    load, find = facesnap_file.load, faces.find_faces
    monkeypatch.setattr(facesnap_file, "load", lambda path: both.wait() is not None and load(path))
    monkeypatch.setattr(faces, "find_faces", lambda *given: both.wait() is not None and find(*given))
    before = threading.active_count()
    with torch.inference_mode():  # as hosts run jobs
        prepared = Engine(lambda: find_models(stand_ins)).prepare(unit, 512, 512)
    assert prepared.conditioning.landmarks is not None
    assert threading.active_count() == before


@pytest.mark.parametrize("photo_is_wrong", [True, False], ids=["photo and file", "file"])
def test_no_thread_remains_after_an_error(copied, unit, monkeypatch, photo_is_wrong):
    """If the photo and the file are both unusable, the photo is reported, as it can be replaced at once."""
    ended = []

    def fail(path):
        time.sleep(0.3)
        ended.append(path)
        raise FaceSnapError("The file is damaged.")

    monkeypatch.setattr(facesnap_file, "load", fail)
    wrong = replace(unit, references=(grey("sky.jpg"),)) if photo_is_wrong else unit
    with pytest.raises(FaceSnapError, match="No face" if photo_is_wrong else "The file is damaged"):
        Engine(lambda: find_models(copied)).prepare(wrong, 512, 512)
    assert ended


def test_a_units_region_and_strength_are_passed_on(engine, unit):
    asked = changed(unit, region="face", region_scale=2.0, hires="second", block_weights=(0.5,) * 10, cond_only=True)
    conditioning = engine.prepare(asked, 512, 512).conditioning
    assert conditioning.region == around(conditioning.landmarks, 2.0)
    assert (conditioning.strength.hires, conditioning.strength.block_weights, conditioning.strength.cond_only) == (
        "second",
        (0.5,) * 10,
        True,
    )


def test_several_references_are_fused_or_averaged(engine, unit, astronaut, mirrored):
    one = engine.prepare(unit, 512, 512).conditioning.tokens
    both = replace(unit, references=(astronaut, mirrored))
    fused = engine.prepare(both, 512, 512).conditioning.tokens
    averaged = engine.prepare(replace(both, reference_mode="averaged"), 512, 512).conditioning.tokens
    assert one.shape == fused.shape == averaged.shape
    for a, b in ((one, fused), (one, averaged), (fused, averaged)):
        assert not torch.allclose(a, b, atol=1e-4)


def test_the_init_image_drives_by_default_in_its_own_pixels(engine, unit, mirrored):
    prepared = engine.prepare(unit, 768, 512, init_image=mirrored)
    assert prepared.in_init_image
    assert prepared.driving.photo is mirrored
    assert (prepared.conditioning.landmarks.width, prepared.conditioning.landmarks.height) == (512, 512)
    chosen = engine.prepare(replace(unit, driving=unit.references[0]), 768, 512, init_image=mirrored)
    assert not chosen.in_init_image
    assert chosen.driving.photo is unit.references[0]


def test_an_init_image_without_a_face_is_reported_and_a_driving_photo_without_one_stops_the_job(engine, unit):
    prepared = engine.prepare(unit, 512, 512, init_image=grey())
    assert not prepared.in_init_image
    assert prepared.driving.photo is unit.references[0]
    assert "init image has no face" in prepared.notes[0]
    with pytest.raises(FaceSnapError, match=r"No face .* drive me\.png"):
        engine.prepare(replace(unit, driving=grey("drive me.png")), 512, 512)


def test_another_face_index_is_another_person(engine, unit, group):
    photos = replace(unit, references=(group,))
    largest, second = (engine.prepare(replace(photos, face_index=which), 512, 512) for which in (0, 1))
    assert largest.references[0].box[0] != second.references[0].box[0]
    assert not torch.allclose(largest.conditioning.tokens, second.conditioning.tokens, atol=1e-4)
    assert not np.allclose(largest.conditioning.landmarks.points, second.conditioning.landmarks.points)
    with pytest.raises(FaceSnapError, match="has no face 6"):
        engine.prepare(replace(photos, face_index=6), 512, 512)


@pytest.mark.parametrize("pose", ["template", "sliders"])
def test_templates_and_sliders_pose_the_references_shape_without_another_photo(engine, unit, stand_ins, mirrored, pose):
    from facesnap_ext.landmarks.predictor import load_predictor

    posed = changed(unit, pose=pose, template="three quarters right", yaw=20, mouth=0.5, y=0.6)
    prepared = engine.prepare(replace(posed, driving=grey()), 640, 512, init_image=mirrored)
    predictor = load_predictor(stand_ins / "stand-in-deca.safetensors", stand_ins / "stand-in-flame.safetensors")
    face = prepared.references[0]
    rig = flame_rig(predictor.flame, predictor.encode(face.photo.pixels, face.box).shape)
    expected = pose_landmarks(rig, pose_from_unit(posed, 640, 512), 640, 512)
    np.testing.assert_allclose(prepared.conditioning.landmarks.points, expected.points, atol=1e-3)
    assert (prepared.conditioning.landmarks.width, prepared.conditioning.landmarks.height) == (640, 512)
    assert not prepared.in_init_image
    assert prepared.driving is None
    assert placement(expected)[1] != pytest.approx(TEMPLATES["front"].y, abs=0.05), "placed by the unit"


def test_moving_a_slider_runs_no_network(stand_ins, unit, monkeypatch):
    engine = Engine(lambda: find_models(stand_ins))
    engine.prepare(replace(unit, pose="sliders"), 512, 512)
    runs = count_runs(monkeypatch)
    monkeypatch.setattr(LandmarkPredictor, "encode", lambda *args: runs.append("deca"))
    engine.prepare(changed(unit, pose="sliders", yaw=30), 512, 768)
    engine.prepare(replace(unit, pose="template", template="far"), 512, 768)
    assert runs == []


def test_pose_own_uses_the_reference_even_if_there_are_other_photos(engine, unit, mirrored):
    alone = engine.prepare(unit, 640, 512)
    own = engine.prepare(replace(unit, pose="own", driving=mirrored), 640, 512, init_image=mirrored)
    np.testing.assert_array_equal(own.conditioning.landmarks.points, alone.conditioning.landmarks.points)
    assert own.driving.photo is unit.references[0]
    assert not own.in_init_image


def test_landmarks_of_photos_are_moved_to_the_units_place(engine, unit, mirrored):
    for changes, init, size in (
        ({"driving": mirrored}, None, (640, 768)),
        ({}, mirrored, (512, 512)),
        ({"pose": "own"}, None, (640, 768)),
    ):
        there, here = (
            engine.prepare(replace(unit, **changes, **place), 640, 768, init_image=init).conditioning.landmarks
            for place in ({"x": 0.3, "size": 0.2}, {})
        )
        assert (there.width, there.height) == size
        np.testing.assert_array_equal(there.points, reposition(here, x=0.3, size=0.2).points)
        np.testing.assert_allclose(placement(there), (0.3, placement(here)[1], 0.2), atol=1e-5)


def test_each_face_of_a_driving_photo_can_drive(engine, unit, group):
    drives = [replace(unit, driving=group, driving_face_index=which) for which in (0, 1)]
    boxes = [tuple(engine.prepare(one, 640, 512).driving.box) for one in drives]
    from_init = [replace(unit, driving_face_index=which) for which in (0, 1)]
    assert boxes == [tuple(engine.prepare(one, 640, 512, init_image=group).driving.box) for one in from_init]
    assert boxes[0] != boxes[1]
    with pytest.raises(FaceSnapError, match="has no face 6"):
        engine.prepare(replace(unit, driving=group, driving_face_index=6), 512, 512)


def test_threads_share_computed_results(stand_ins, unit, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    engine = Engine(lambda: find_models(stand_ins))
    runs = count_runs(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: engine.prepare(unit, 512, 512), range(4)))
    assert sorted(runs) == ["clip", "faces", "landmarks", "mixer"]
    assert all(torch.equal(result.conditioning.tokens, results[0].conditioning.tokens) for result in results)


def test_a_padded_close_up_is_reported(engine, unit, astronaut):
    close_up = Photo(np.ascontiguousarray(astronaut.pixels[70:165, 178:273]), "close-up.png")
    prepared = engine.prepare(replace(unit, references=(close_up,)), 512, 512)
    assert prepared.references[0].padded
    assert "close-up.png fills the photo" in prepared.notes[0]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("stand-in-pack", "no face model pack"),
        ("stand-in-clip", "no CLIP-ViT-H image encoder"),
        ("*.safetensors", "neither InstantID nor a FaceSnap file"),
    ],
)
def test_missing_files_are_reported_with_the_folder_for_them(copied, unit, part, message):
    for path in copied.glob(part):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    unit = replace(unit, model="" if "*" in part else unit.model)
    with pytest.raises(FaceSnapError, match=message) as caught:
        Engine(lambda: find_models(copied)).prepare(unit, 512, 512)
    assert str(copied) in str(caught.value)
    advice = "put one there" if part == "stand-in-clip" else "download InstantID and antelopev2 with the button"
    assert advice in str(caught.value)


def test_the_original_files_of_deca_and_flame_are_converted_once(copied, unit, monkeypatch):
    import pickle

    from safetensors.torch import load_file

    deca, flame = copied / "stand-in-deca.safetensors", copied / "stand-in-flame.safetensors"
    expected = Engine(lambda: find_models(copied)).prepare(unit, 512, 512).conditioning.landmarks
    torch.save({"E_flame": load_file(deca)}, copied / "deca_model.tar")
    arrays = {key: tensor.numpy() for key, tensor in load_file(flame).items()}
    shapes, expressions = arrays["shapedirs"], arrays.pop("expressiondirs")
    # as in FLAME: 300 shape directions, then 100 expression directions
    directions = np.zeros((*shapes.shape[:2], 400), np.float32)
    directions[..., : shapes.shape[2]] = shapes
    directions[..., 300 : 300 + expressions.shape[2]] = expressions
    parents = arrays.pop("parents")
    arrays |= {"shapedirs": directions, "f": arrays.pop("faces"), "kintree_table": np.stack([parents, parents])}
    (copied / "generic_model.pkl").write_bytes(pickle.dumps(arrays, protocol=2))
    deca.unlink()
    flame.unlink()
    messages = []
    got = Engine(lambda: find_models(copied)).prepare(unit, 512, 512, progress=messages.append).conditioning.landmarks
    np.testing.assert_allclose(got.points, expected.points, atol=1e-3)
    assert messages[:2] == ["converting deca_model.tar (only once)", "converting generic_model.pkl (only once)"]
    messages.clear()
    Engine(lambda: find_models(copied)).prepare(unit, 512, 512, progress=messages.append)
    assert not any("converting" in line for line in messages)


def test_missing_photos_faces_and_models_and_ambiguous_models_are_reported(engine, unit):
    cases = [
        (replace(unit, references=()), "without a reference photo"),
        (replace(unit, references=(grey("sky.jpg"),)), "No face .* sky.jpg"),
        (replace(unit, model="none.safetensors"), "no FaceSnap file none.safetensors .* choose one of init"),
        (replace(unit, model=""), "several FaceSnap files .* choose one"),
    ]
    for wrong, message in cases:
        with pytest.raises(FaceSnapError, match=message):
            engine.prepare(wrong, 512, 512)


def test_encoders_that_do_not_fit_the_file_are_reported(engine, unit, monkeypatch):
    monkeypatch.setattr(encoders.Encoders, "clip_tokens", lambda self, faces: [torch.zeros(257, 1024)])
    with pytest.raises(FaceSnapError, match=r"expects 64 values per feature from the CLIP .* returns 1024"):
        engine.prepare(replace(unit, reference_mode="averaged"), 512, 512)


def test_progress_names_each_stage(stand_ins, unit):
    messages = []
    Engine(lambda: find_models(stand_ins)).prepare(unit, 512, 512, progress=messages.append)
    assert messages == [
        "detecting the face",
        "loading the FaceSnap file",
        "encoding the face",
        "predicting landmarks",
    ]
