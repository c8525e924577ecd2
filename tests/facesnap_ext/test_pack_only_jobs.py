"""Jobs with InstantID's files and a face model pack only: every pose works, and nothing asks for DECA or FLAME."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")

from facesnap_ext.hosts import a1111
from facesnap_ext.hosts.attention import cross_attentions
from facesnap_ext.identity.saved import save_identity
from facesnap_ext.landmarks.movements import SLIDERS
from facesnap_ext.landmarks.open_face import fit, load_basis, predict
from facesnap_ext.landmarks.points5 import draw_five
from facesnap_ext.landmarks.points72 import crop_and_resize, draw, five_points
from facesnap_ext.landmarks.poses import TEMPLATES, pose_landmarks
from facesnap_ext.landmarks.rigs import open_face_rig
from facesnap_ext.settings.pose import pose_from_unit
from facesnap_ext.settings.unit import Unit
from tests.facesnap_ext import test_instantid_jobs
from tests.facesnap_ext.hosts import test_a1111, test_attention
from tests.support import tiny
from tests.support.ldm_unet import inputs, ldm_unet
from tests.support.stand_in_pack import stand_in_faces68
from tests.support.stand_ins import randomise_outputs, write_instantid
from tests.support.units import changed

host = test_attention.host  # A1111's modules
engine, unit = test_instantid_jobs.engine, test_instantid_jobs.unit  # with the models below
the_pack_counts_as_antelopev2 = test_instantid_jobs.the_pack_counts_as_antelopev2


@pytest.fixture(scope="module")
def models(stand_ins, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack-only") / "facesnap"
    folder.mkdir()
    shutil.copytree(stand_ins / "stand-in-pack", folder / "antelopev2")
    stand_in_faces68(folder / "antelopev2" / "1k3d68.onnx")
    network = tiny.ffrnet(3)
    randomise_outputs(network)
    write_instantid(folder, network, [layer.to_q.out_features for layer in cross_attentions(ldm_unet())])
    return folder


def points_of(engine, *photos):
    encoders = engine.encoders()
    return [encoders.detected_landmarks(encoders.face(photo)).points for photo in photos]


def test_nothing_is_missing(engine):
    assert engine.files().missing() == {}


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_poses_the_persons_own_face(engine, unit, astronaut, template):
    posed = replace(unit, pose="template", template=template)
    prepared = engine.prepare(posed, 640, 512)
    assert prepared.notes == ()
    rig = open_face_rig(load_basis(), fit(load_basis(), points_of(engine, astronaut))[0])
    expected = pose_landmarks(rig, pose_from_unit(posed, 640, 512), 640, 512).points
    np.testing.assert_allclose(prepared.conditioning.landmarks.points, expected, atol=1e-3)


ENDS = [(name, end) for name, slider in SLIDERS.items() for end in slider.range if end]


@pytest.mark.parametrize(("name", "value"), [*ENDS, ("x", 0.3)])
def test_every_slider_changes_the_landmarks(engine, unit, name, value):
    neutral, moved = (
        engine.prepare(changed(unit, pose="sliders", **values), 512, 512).conditioning.landmarks
        for values in ({}, {name: value})
    )
    assert np.abs(draw(neutral, 512, 512).astype(int) - draw(moved, 512, 512)).max() > 100


def test_a_driving_photo_gives_its_pose_and_the_references_give_the_shape(
    engine, unit, astronaut, mirrored, grace_hopper
):
    asked = replace(unit, references=(astronaut, mirrored), driving=grace_hopper)
    prepared = engine.prepare(asked, 640, 512)
    *references, driving = points_of(engine, astronaut, mirrored, grace_hopper)
    basis = load_basis()
    predicted = predict(basis, fit(basis, references)[0], fit(basis, [driving])[1][0])
    landmarks = prepared.conditioning.landmarks
    encoders = engine.encoders()
    in_photo = replace(encoders.detected_landmarks(encoders.face(grace_hopper)), points=predicted.astype(np.float32))
    expected = crop_and_resize(in_photo, 640, 512, prepared.driving.box)
    np.testing.assert_allclose(landmarks.points, expected.points, atol=1e-2)
    assert prepared.notes == ()
    drawn = draw_five(landmarks, 640, 512)
    middle = five_points(landmarks.points).astype(int)
    assert all(drawn[y, x].any() for x, y in middle), "InstantID's five points are those of the 72"


def test_the_init_image_and_a_saved_identity_need_no_file_either(engine, unit, astronaut, mirrored, grace_hopper):
    prepared = engine.prepare(unit, 512, 512, init_image=grace_hopper)
    assert prepared.in_init_image
    assert len(prepared.conditioning.landmarks.points) == 72
    save_identity(engine.encoders(), (astronaut, mirrored), "Eileen")
    photos = replace(unit, references=(astronaut, mirrored))
    saved = replace(unit, references=(), identity="Eileen")
    for changes in ({"driving": grace_hopper}, {"pose": "template", "template": "profile left"}):
        first, second = (engine.prepare(replace(one, **changes), 512, 512) for one in (photos, saved))
        np.testing.assert_allclose(second.conditioning.landmarks.points, first.conditioning.landmarks.points, atol=1e-2)
        assert second.notes == ()


def test_two_people_with_a_template_and_a_driving_photo_run_in_a1111(engine, unit, grace_hopper, mirrored):
    two = (
        replace(unit, pose="template", template="three quarters left", x=0.3),
        Unit(enabled=True, references=(grace_hopper,), driving=mirrored, x=0.7),
    )
    people = tuple(engine.prepare(one, 128, 128).conditioning for one in two)
    rests = [engine.preview(one.references).rig.rest for one in two]
    assert np.abs(rests[0] - rests[1]).max() > 1e-3, "each person has their own shape"
    unet = ldm_unet()
    x, timesteps, context, y = inputs(2)
    outputs = []
    for who in (people, people[:1], people[1:]):
        job = test_a1111.Job(unet)
        a1111.attach(job, who)
        test_a1111.announce(job, x, 1)
        outputs.append(test_a1111.call(unet, x, timesteps, context, y, [0, 1]))
        a1111.detach(job)
    assert all(output.isfinite().all() for output in outputs)
    assert not any(torch.allclose(outputs[0], other, atol=1e-4) for other in outputs[1:])
