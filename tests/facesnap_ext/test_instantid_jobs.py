"""Jobs with InstantID's files, from the model folder to each host, with every loader."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from facesnap_ext import engine as engine_module
from facesnap_ext.cache import Cache
from facesnap_ext.cli.main import main
from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import sha256
from facesnap_ext.hosts import a1111, forge
from facesnap_ext.hosts.attention import cross_attentions
from facesnap_ext.hosts.diffusers import conditioned
from facesnap_ext.hosts.job import prepare as prepare_job
from facesnap_ext.identity import encoders as encoders_module
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.identity.saved import save_identity
from facesnap_ext.landmarks.points5 import draw_five
from facesnap_ext.landmarks.points72 import five_points
from facesnap_ext.residuals import Residuals
from facesnap_ext.settings.script_args import batches_by_photo
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights import facesnap_file, identity_file
from facesnap_ext.weights.instantid import ADAPTER, IDENTITYNET, RECOGNITION
from facesnap_ext.weights.search import find_models
from facesnap_ext.weights.source import recognition_of
from tests.facesnap_ext.hosts import test_a1111, test_attention, test_diffusers, test_forge
from tests.support import tiny
from tests.support.ldm_unet import inputs, ldm_unet
from tests.support.mixers import instantid_resampler
from tests.support.stand_in_pack import stand_in_arcface
from tests.support.stand_ins import cross_attention_widths, randomise_outputs, write_instantid
from tests.support.units import changed

host = test_attention.host  # A1111's modules


@pytest.fixture(scope="module")
def widths():
    return [layer.to_q.out_features for layer in cross_attentions(ldm_unet())]


def test_cross_attention_widths_are_read_from_a_checkpoint(widths, tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in ldm_unet().state_dict().items()}
    save_file(tensors, checkpoint)
    assert cross_attention_widths(checkpoint) == widths
    assert len(set(widths)) > 1


@pytest.fixture(scope="module")
def models(stand_ins, widths, tmp_path_factory):
    """A model folder with InstantID's files, a face model pack, DECA and FLAME, but without CLIP or a FaceSnap file."""
    folder = tmp_path_factory.mktemp("instantid") / "facesnap"
    folder.mkdir()
    shutil.copytree(stand_ins / "stand-in-pack", folder / "antelopev2")
    for part in ("deca", "flame"):
        shutil.copy(stand_ins / f"stand-in-{part}.safetensors", folder)
    network = tiny.ffrnet(3)
    randomise_outputs(network)
    write_instantid(folder, network, widths)
    return folder


@pytest.fixture(scope="module")
def engine(models):
    return Engine(lambda: find_models(models))


@pytest.fixture(autouse=True)
def the_pack_counts_as_antelopev2(models, monkeypatch):
    monkeypatch.setattr(encoders_module, "RECOGNITION_SHA256", sha256(models / "antelopev2" / "glintr100.onnx"))


@pytest.fixture
def unit(astronaut):
    return Unit(enabled=True, references=(astronaut,))


def test_another_recognition_model_is_refused_and_another_file_of_the_same_name_reported(
    models, unit, stand_ins, tmp_path
):
    """With embeddings from a different model, even of the same size, InstantID generates a different person."""
    folder = shutil.copytree(models, tmp_path / "facesnap")
    engine = Engine(lambda: find_models(folder))
    stand_in_arcface(folder / "antelopev2" / "glintr100.onnx", seed=9)
    [note] = engine.prepare(unit, 512, 512).notes
    assert "is not the antelopev2 file that InstantID is made for" in note
    (folder / "antelopev2" / "glintr100.onnx").rename(folder / "antelopev2" / "w600k_r50.onnx")
    (folder / "antelopev2").rename(folder / "buffalo_l")
    with pytest.raises(
        FaceSnapError, match=r"glintr100\.onnx of antelopev2, but the face model pack .*buffalo_l contains w600k_r50"
    ):
        engine.prepare(unit, 512, 512)
    shutil.copy(stand_ins / "random.safetensors", folder)  # other FaceSnap files accept any pack
    assert engine.encoders(engine.files()).check_recognition(recognition_of(folder / "random.safetensors")) == []
    shutil.copytree(models / "antelopev2", folder / "zebra")
    assert engine.prepare(replace(unit, model="InstantID"), 512, 512).notes == ()


def halves(models):
    tensors = torch.load(models / ADAPTER, weights_only=True)
    return tensors["image_proj"], tensors["ip_adapter"]


def test_conditioning_follows_instantids_formulas(engine, models, unit, mirrored):
    prepared = engine.prepare(replace(unit, driving=mirrored), 640, 512)
    conditioning = prepared.conditioning
    resampler, attention = halves(models)
    embedding = torch.from_numpy(prepared.references[0].embedding)[None, None]
    assert abs(embedding.norm() - 1) > 0.1, "not normalised"
    expected = instantid_resampler(resampler, torch.cat([embedding, torch.zeros(1, 1, 512)]))
    torch.testing.assert_close(
        torch.cat([conditioning.tokens, conditioning.uncond_tokens]), expected, atol=1e-4, rtol=1e-4
    )
    for i, (keys, values) in enumerate(conditioning.adapter()):
        for got, name in ((keys, "to_k_ip"), (values, "to_v_ip")):
            torch.testing.assert_close(got, expected @ attention[f"{2 * i + 1}.{name}.weight"].T, atol=1e-4, rtol=1e-4)
    assert len(conditioning.adapter()) == len(attention) // 2
    assert (conditioning.strength.adapter_weight, conditioning.text_free, conditioning.name) == (
        0.8,
        False,
        "InstantID",
    )

    # pose transfer keeps the reference's face shape: the five points come from the predicted 72, not from the photo
    assert len(conditioning.landmarks.points) == 72
    detected = engine.encoders(find_models(models)).face(mirrored).keypoints
    assert np.abs(five_points(conditioning.landmarks.points) / (640, 512) - detected / (512, 512)).max() > 0.01
    assert prepared.notes == ()
    y = torch.zeros(1, tiny.ADM)
    images = []
    embed = conditioning.ffrnet.embed_landmarks
    conditioning.ffrnet.embed_landmarks = lambda image: images.append(image) or embed(image)
    try:
        Residuals((conditioning,)).rows(torch.zeros(1, 4, 64, 80), torch.tensor([500.0]), [True], y)
    finally:
        del conditioning.ffrnet.embed_landmarks
    np.testing.assert_array_equal(
        np.rint(images[0][0].permute(1, 2, 0).numpy() * 255), draw_five(conditioning.landmarks, 640, 512)
    )


def test_several_references_are_averaged_or_fused(engine, models, unit, grace_hopper):
    both = replace(unit, references=(*unit.references, grace_hopper))
    averaged = engine.prepare(replace(both, reference_mode="averaged"), 512, 512)
    embeddings = torch.stack([torch.from_numpy(face.embedding) for face in averaged.references])
    expected = instantid_resampler(halves(models)[0], embeddings.mean(0)[None, None])
    torch.testing.assert_close(averaged.conditioning.tokens, expected, atol=1e-4, rtol=1e-4)
    fused = engine.prepare(both, 512, 512).conditioning.tokens
    one = engine.prepare(unit, 512, 512).conditioning.tokens
    assert not torch.allclose(fused, expected, atol=1e-3)
    assert not torch.allclose(fused, one, atol=1e-3)


def test_a_batch_is_prepared_without_clip(engine, models, unit, grace_hopper):
    each = [unit, replace(unit, references=(grace_hopper,))]
    batch = replace(unit, reference_mode="batch", references=tuple(one.references[0] for one in each))
    p = SimpleNamespace(width=512, height=512)
    jobs = prepare_job(p, batches_by_photo({1: batch}), engine, lambda *parts: None)
    for one, job in zip(each, jobs, strict=True):
        assert torch.equal(job.people[0].conditioning.tokens, engine.prepare(one, 512, 512).conditioning.tokens)


def test_an_identity_saved_without_clip_works_only_with_instantid(models, stand_ins, unit, mirrored, tmp_path):
    folder = shutil.copytree(models, tmp_path / "facesnap")
    engine = Engine(lambda: find_models(folder))
    path = save_identity(engine.encoders(engine.files()), unit.references, "Eileen")
    saved = identity_file.load(path)
    assert saved.clip_tokens is None
    assert set(saved.networks) == {"face_pack", "deca"}
    request = replace(unit, driving=mirrored)
    eileen = replace(request, references=(), identity="Eileen")
    assert torch.equal(*(engine.prepare(either, 512, 512).conditioning.tokens for either in (request, eileen)))

    # InstantID packed into one file does not need CLIP either
    assert main(["convert", "instantid", *map(str, (folder / IDENTITYNET, folder / ADAPTER, tmp_path / "one"))]) == 0
    packed = shutil.copytree(folder, tmp_path / "packed", ignore=shutil.ignore_patterns("ControlNetModel", ADAPTER))
    shutil.move(tmp_path / "one", packed / "one.safetensors")
    files = find_models(packed)
    assert list(files.facesnap) == ["one.safetensors"]
    assert files.missing() == {}
    save_identity(Encoders(Cache(), files), unit.references, "packed")

    # a FaceSnap file needs CLIP, both to save an identity and to use it
    shutil.copy(stand_ins / "random.safetensors", folder)
    with pytest.raises(FaceSnapError, match="There is no CLIP"):
        save_identity(engine.encoders(engine.files()), unit.references, "again")
    with pytest.raises(FaceSnapError, match=r"Eileen was saved without CLIP features, which random.* needs"):
        engine.prepare(replace(eileen, model="random.safetensors"), 512, 512)


@pytest.mark.parametrize("noise", [0.35, 1.0])
def test_noise_replaces_the_zero_embedding_of_the_unconditional_rows_only(engine, models, unit, noise):
    plain, noisy, again = (
        engine.prepare(replace(unit, uncond_noise=amount), 512, 512).conditioning for amount in (0.0, noise, noise)
    )
    assert torch.equal(plain.tokens, noisy.tokens)
    assert torch.equal(noisy.uncond_tokens, again.uncond_tokens), "the noise does not change from job to job"
    uniform = torch.rand(1, 1, 512, generator=torch.Generator().manual_seed(0))
    expected = instantid_resampler(halves(models)[0], noise * uniform)
    torch.testing.assert_close(noisy.uncond_tokens, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(noisy.uncond_tokens, plain.uncond_tokens, atol=1e-2)
    for (keys, values), (other_keys, other_values) in zip(plain.adapter(), noisy.adapter(), strict=True):
        assert torch.equal(keys[:1], other_keys[:1])
        assert torch.equal(values[:1], other_values[:1])
        assert not torch.allclose(keys[1:], other_keys[1:], atol=1e-4)


def test_the_packed_file_is_bit_identical_to_the_pair(engine, models, unit, mirrored, tmp_path, capsys):
    folder = tmp_path / "facesnap"
    shutil.copytree(models, folder, ignore=shutil.ignore_patterns("ControlNetModel", ADAPTER))
    out = folder / "instantid.safetensors"
    for controlnet in (models / IDENTITYNET, models / "ControlNetModel"):
        assert main(["convert", "instantid", str(controlnet), str(models / ADAPTER), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n" * 2
    packed = Engine(lambda: find_models(folder))
    assert list(packed.files().facesnap) == ["instantid.safetensors"]
    request = replace(unit, driving=mirrored)
    one, other = (which.prepare(request, 512, 512).conditioning for which in (engine, packed))
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.uncond_tokens, other.uncond_tokens)
    for a, b in zip(one.adapter(), other.adapter(), strict=True):
        assert all(torch.equal(*pair) for pair in zip(a, b))
    x, y = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.ones(2, tiny.ADM)
    residuals = [
        Residuals((conditioning,)).rows(x, torch.tensor([7.0, 7.0]), [True, False], y) for conditioning in (one, other)
    ]
    assert all(torch.equal(*pair) for pair in zip(*residuals, strict=True))
    assert (
        packed.encoders(packed.files()).check_recognition(recognition_of(out)),
        facesnap_file.read_info(out).recognition,
    ) == (
        [],
        RECOGNITION,
    )
    assert (one.text_free, one.hint, one.strength) == (other.text_free, other.hint, other.strength)
    published = {f"ffrnet.{key}": tensor for key, tensor in load_file(models / IDENTITYNET).items()}
    stored = load_file(out)
    assert all(torch.equal(stored[key], tensor) for key, tensor in published.items())


def test_convert_reports_wrong_arguments_and_overwrites_nothing(models, tmp_path, capsys):
    cases = [
        (["instantid", "a"], "instantid CONTROLNET ADAPTER OUT"),
        (["instantid", str(models / ADAPTER), str(models / ADAPTER), str(tmp_path / "x")], "not an SDXL ControlNet"),
        (["instantid", str(models / IDENTITYNET), str(models / IDENTITYNET), str(tmp_path / "x")], "not InstantID's"),
    ]
    for arguments, message in cases:
        assert main(["convert", *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    controlnet, adapter = shutil.copytree(models, tmp_path / "own") / IDENTITYNET, tmp_path / "own" / ADAPTER
    (tmp_path / "letter.txt").write_text("mine")
    for out in (controlnet, adapter, tmp_path / "letter.txt", tmp_path):
        before = out.read_bytes() if out.is_file() else None
        assert main(["convert", "instantid", str(controlnet), str(adapter), str(out)]) == 1
        message = capsys.readouterr().err
        expected = "is a folder; enter the name" if before is None else "already exists and is not a FaceSnap file"
        assert expected in message
        assert before is None or out.read_bytes() == before


def test_an_adapters_keys_and_values_are_computed_when_sampling_begins(engine, models, unit, monkeypatch):
    """InstantID's keys and values take 21 MB per person, and a batch can have many people."""
    calls = []
    monkeypatch.setattr(
        engine_module, "load_any_adapter", lambda source: lambda *tokens: calls.append(tokens) or object()
    )
    engine = Engine(lambda: find_models(models))
    conditionings = [engine.prepare(unit, 512, 512).conditioning for _ in range(2)]
    assert calls == []
    assert conditionings[0].has_adapter
    assert conditionings[0].adapter() is conditionings[1].adapter()
    assert len(calls) == 1


def test_replacing_the_adapter_changes_the_next_job(models, unit, widths, tmp_path):
    folder = shutil.copytree(models, tmp_path / "facesnap")
    engine = Engine(lambda: find_models(folder))
    before = engine.prepare(unit, 512, 512).conditioning
    write_instantid(tmp_path / "other", tiny.ffrnet(3), widths, seed=9)
    shutil.copy(tmp_path / "other" / ADAPTER, folder)
    after = engine.prepare(unit, 512, 512).conditioning
    assert not torch.allclose(before.tokens, after.tokens, atol=1e-3)
    assert not torch.allclose(before.adapter()[0][0], after.adapter()[0][0], atol=1e-3)


def test_a_job_runs_in_a1111_and_every_weight_has_an_effect(engine, unit):
    unet = ldm_unet()
    x, timesteps, context, y = inputs(2)
    outputs = []
    for changes in ({}, {"adapter_weight": 0.0}, {"adapter_weight": 1.5}, {"weight": 0.5}):
        conditioning = engine.prepare(changed(unit, **changes), 128, 128).conditioning
        job = test_a1111.Job(unet)
        a1111.attach(job, (conditioning,))
        test_a1111.announce(job, x, 1)
        outputs.append(test_a1111.call(unet, x, timesteps, context, y, [0, 1]))
        # conditional and unconditional rows in separate calls
        test_a1111.announce(job, x, 1)
        separate = [test_a1111.call(unet, x, timesteps, context, y, [row]) for row in (0, 1)]
        torch.testing.assert_close(torch.cat(separate), outputs[-1], atol=1e-4, rtol=1e-4)
        a1111.detach(job)
    outputs.append(test_a1111.call(unet, x, timesteps, context, y, [0, 1]))
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert not torch.allclose(a, b, atol=1e-4)


def test_a_job_in_forge_gives_the_output_of_a1111(engine, unit):
    unet = ldm_unet()
    x, _, context, y = inputs(2)
    conditioning = engine.prepare(unit, 128, 128).conditioning
    sigma = torch.full((2,), 2.0)
    scaled, timesteps = test_forge.Predictor().calculate_input(sigma, x), test_forge.Predictor().timestep(sigma)
    job = test_a1111.Job(unet)
    a1111.attach(job, (conditioning,))
    test_a1111.announce(job, scaled, 1)
    expected = test_a1111.call(unet, scaled, timesteps, context, y, [0, 1])
    a1111.detach(job)
    job = test_forge.make_job(test_attention.ForgeUNet(unet))
    forge.attach(job, (conditioning,))
    got = test_attention.forge_step(job, x, sigma[:1], context, y, [[(0, 0)], [(1, 1)]])
    forge.detach(job)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_job_runs_in_diffusers(models, unit, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    pipe = diffusers.StableDiffusionXLPipeline(**test_diffusers.parts(), add_watermarker=False)
    folder = shutil.copytree(models, tmp_path / "facesnap")
    write_instantid(folder, tiny.ffrnet(3), [layer.to_q.out_features for layer in cross_attentions(pipe.unet)])
    conditioning = Engine(lambda: find_models(folder)).prepare(unit, 128, 128).conditioning
    plain = test_diffusers.run(pipe)
    with conditioned(pipe, conditioning):
        whole = test_diffusers.run(pipe)
    with conditioned(pipe, changed(conditioning, adapter_weight=0.0)):
        half = test_diffusers.run(pipe)
    assert not torch.allclose(whole, half, atol=1e-4)
    assert not torch.allclose(half, plain, atol=1e-4)
    assert torch.equal(test_diffusers.run(pipe), plain)
