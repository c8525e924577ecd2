"""The command for all stages, at tiny sizes: order, shares of the time, resuming, gates, devices and packed files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

for package in ("diffusers", "insightface", "onnxruntime", "peft", "accelerate", "webdataset"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights import facesnap_file
from facesnap_lab import statistics
from facesnap_lab.ablation.ablate import read_ablation
from facesnap_lab.ablation.editions import SECOND
from facesnap_lab.ablation.pictures import METRICS, compare, draw, limits
from facesnap_lab.ablation.rows import MIXER
from facesnap_lab.ablation.second import SecondSetup
from facesnap_lab.miniature import shipped
from facesnap_lab.miniature.second import (
    autoencoder,
    base,
    clip_pair,
    dataset,
    deca,
    detector,
    everything,
    facesnap,
    gates,
    host_vae,
    identity,
    lightning,
    loop,
    measure,
    pack,
    train,
    vae,
)
from facesnap_lab.miniature.second.everything import STAGES
from facesnap_lab.miniature.second.loop import Compute
from facesnap_lab.table1 import world
from facesnap_lab.table1.run import run
from facesnap_lab.table1.scores import read_scores

SIDE, PEOPLE = 32, 2
NAMES = [stage.name for stage in STAGES]


@pytest.fixture
def tiny(monkeypatch):
    """Networks, images and steps so small that all stages take seconds."""
    for module in (base, lightning, facesnap, measure, world):
        monkeypatch.setattr(module, "SIDE", SIDE)
    monkeypatch.setattr(dataset, "PEOPLE", dict.fromkeys(dataset.PEOPLE, PEOPLE))
    monkeypatch.setattr(dataset, "build", lambda *a, **k: BUILD(*a, **k, side=SIDE))
    pairs, points = gates.trait_pairs, gates.trait_pair_points
    monkeypatch.setattr(gates, "trait_pairs", lambda: pairs(2, SIDE))
    monkeypatch.setattr(gates, "trait_pair_points", lambda count: points(count, SIDE))
    for name, recipe in identity.RECIPES.items():
        small = dataclasses.replace(recipe, widths=(4, 4, 8), last=2, steps=2, batch=4)
        monkeypatch.setitem(identity.RECIPES, name, small)
    monkeypatch.setitem(vae.RECIPES, "vae4", vae.VaeRecipe(vae.VaeConfig(4, 4, (8, 8), (1, 1)), steps=2, batch=2))
    monkeypatch.setattr(base, "WIDTHS", (32, 32, 64))
    monkeypatch.setattr(base, "DEPTHS", (1, 1, 1))
    monkeypatch.setattr(base, "PICTURES", 40)
    monkeypatch.setattr(base, "detect_faces", lambda detector, bgr: [])
    monkeypatch.setattr(host_vae, "WIDTHS", (16, 16, 16))
    monkeypatch.setattr(detector, "IMAGES", 2)
    for module in (base, clip_pair, deca, detector, host_vae, lightning):
        monkeypatch.setattr(module, "STEPS", 2)
        monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(shipped, "STEPS", 1)
    monkeypatch.setattr(shipped, "FEW_STEPS", 1)
    monkeypatch.setattr(statistics, "RESAMPLES", 20)
    few = {"resolution": SIDE, "batch_size": 2, "id_rows": 1, "steps": 2, "lightning_grad_steps": 1, "sample_steps": 1}
    monkeypatch.setattr(facesnap, "CHANGES", facesnap.CHANGES | few)


BUILD = dataset.build


def with_trained_detector(out, minutes, compute):
    """Faces can be found only with a trained detector."""
    train.run_detector(out, minutes, compute)
    shutil.copyfile(shipped.MODELS / "identity" / "detector.onnx", out / "identity" / "detector.onnx")


def test_all_stages_run_and_the_packed_files_suffice_to_measure(tiny, tmp_path, monkeypatch, fresh_accelerate):
    """The measurement is interrupted, and repeated elsewhere with the packed files. The ablation uses them, too."""
    monkeypatch.setattr(everything.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(facesnap, "seconds_per_step", lambda config: 1e-3)
    monkeypatch.setattr(measure, "PEOPLE", 2)
    out, parts, again = tmp_path / "out", tmp_path / "parts", tmp_path / "again"

    def interrupt(*arguments):
        raise KeyboardInterrupt

    functions = {**train.STAGES, "detector": with_trained_detector, "measure": interrupt}
    with pytest.raises(KeyboardInterrupt):
        everything.run(out, 9.0, "cpu", parts, functions=functions)
    assert list(json.loads((out / "everything.json").read_text())) == NAMES[:-1]
    figures = json.loads((out / "quality.json").read_text())
    assert figures["facesnap"] == {"steps": 2, "finished": True}
    assert all(figures[name]["finished"] for name in NAMES if name not in ("data", "inputs", "measure"))

    pack.unpack(parts, again)
    only_measure = {"measure": partial(train.run_measure, seeds=1)}
    everything.run(again, 9.0, "cpu", tmp_path / "measured", functions=only_measure)
    assert json.loads((again / "measure.json").read_text())["people"] == 2
    assert "measure.json" in pack.unpack(tmp_path / "measured", tmp_path / "third")
    everything.run(again, 9.0, "cpu", parts, functions={})  # nothing is left to do

    config = read_ablation(out / "facesnap" / "ablation.yaml")
    assert config.edition is SECOND
    assert config.people == 200
    setup = SecondSetup(config.train, 2, tmp_path / "models", "cpu", out)
    subject, weights = setup.subject(0), facesnap_file.load(out / "facesnap" / facesnap.FILE)
    picture = draw(setup.sampler, MIXER, weights, subject, setup.features(0, subject))
    assert picture.shape == subject.driving.shape
    real = setup.real_photos(0)
    second = compare(real.second, real)
    assert second["clip_face"] == pytest.approx(float(real.second.clip_face @ real.reference.clip_face), abs=1e-5)
    others = [float(real.second.face @ one.face) for one in real.unseen]
    assert second["face_sim_unseen"] == pytest.approx(np.mean(others), abs=1e-5)
    assert set(compare(setup.judges.features_of(picture), real)) == set(METRICS)
    assert set(limits([real])["photos of two people"]) == set(METRICS)

    table = world.second_edition(out, tmp_path / "world", people=2, per_person=2, steps=1)
    assert len(table.protocol.cases()) == 4
    assert run(table, tmp_path / "table", [0], minutes=0) is None  # the time is over before the first training
    copies = read_scores(tmp_path / "table", "copy", 0).by_person
    assert copies["face_sim"][0] == pytest.approx(compare(real.reference, real)["face_sim_unseen"], abs=1e-5)
    assert copies["clip_face"][0] == pytest.approx(second["clip_face"], abs=1e-5)


def record(calls, finish=True, passed=True):
    """Functions that note what they are given, and write figures."""

    def function(name):
        def stage(out, minutes, compute):
            calls.append((name, minutes, compute))
            if name in ("data", "inputs", "measure"):
                return
            file = out / "quality.json"
            figures = json.loads(file.read_text()) if file.exists() else {}
            figures[name] = {"finished": finish, "passed": passed if isinstance(passed, bool) else name not in passed}
            file.write_text(json.dumps(figures))

        return stage

    return {name: function(name) for name in NAMES}


@pytest.fixture
def rendered(tmp_path):
    for split in dataset.PEOPLE:
        (tmp_path / "out" / "data" / split).mkdir(parents=True)
        (tmp_path / "out" / "data" / split / "progress.json").write_text("{}")
    return tmp_path / "out"


def test_time_is_shared_and_what_is_left_benefits_later_stages(rendered, tmp_path):
    calls = []
    everything.run(rendered, 10.0, "cuda", tmp_path, functions=record(calls))
    assert [name for name, *_ in calls] == NAMES
    shares = np.array([stage.share for stage in STAGES])
    left = np.cumsum(shares[::-1])[::-1]
    expected = 10 * everything.TRAINING * shares / left  # nothing is used, so each call shares the whole time
    np.testing.assert_allclose([minutes for _, minutes, _ in calls], expected, rtol=0.01)
    assert sum(everything.minutes_for(i, 10 * left[i] / left[0]) for i in range(len(STAGES))) == pytest.approx(10)
    assert everything.minutes_for(3, -1) == 0
    machines = {name: compute for name, _, compute in calls}
    assert all(compute.device == "cuda" and compute.anneal for compute in machines.values())
    assert machines["base"].batch > 1
    assert machines["base"].threads > 0


def test_stages_that_have_ended_are_skipped_and_an_interrupted_one_is_repeated(rendered, tmp_path):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    calls = []
    functions = record(calls, finish=False, passed=False)
    with pytest.raises(KeyboardInterrupt):
        everything.run(rendered, 10.0, "cpu", tmp_path, functions={**functions, "clip": interrupt})
    position = NAMES.index("clip")
    assert [name for name, *_ in calls] == NAMES[:position]
    calls.clear()
    everything.run(rendered, 10.0, "cpu", tmp_path, functions=functions)
    assert [name for name, *_ in calls] == NAMES[position:]


def test_images_are_rendered_again_if_a_training_needs_them(tmp_path):
    calls = []
    functions = record(calls, finish=False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "everything.json").write_text(json.dumps({name: {} for name in NAMES[:-3]}))  # as unpacked elsewhere
    everything.run(out, 1.0, "cpu", tmp_path, functions=functions)
    assert [name for name, *_ in calls] == ["data", *NAMES[-3:]]


def test_stages_that_the_single_command_has_trained_are_skipped(rendered, tmp_path):
    figures = {
        "vae4": {"finished": False, "passed": True},
        "identity": {"finished": True, "passed": False},
        "judge": {"finished": False, "passed": True},
    }
    (rendered / "quality.json").write_text(json.dumps(figures))
    assert not everything.has_ended(rendered, "vae4")  # improves the pictures after it has passed, too
    assert everything.has_ended(rendered, "identity")
    assert everything.has_ended(rendered, "judge")
    assert not everything.has_ended(rendered, "details")


def test_missed_gates_are_reported_or_stop_the_command(rendered, tmp_path):
    calls = []
    functions = record(calls, finish=False, passed=("identity", "clip"))
    missed = everything.run(rendered, 1.0, "cpu", tmp_path, functions=functions, stop_at_gates=True)
    assert missed == ["identity"]
    assert calls[-1][0] == "identity"
    calls.clear()
    assert everything.run(rendered, 1.0, "cpu", tmp_path, functions=functions) == ["identity", "clip"]
    assert [name for name, *_ in calls] == NAMES[NAMES.index("identity") :]  # it gets more time


@pytest.fixture
def trained(tmp_path):
    """A folder with files that are packed, and others that are not."""
    files = ("quality.json", "base/sheet.png", "base/pipeline/unet/config.json", "clip/model/config.json")
    for name in (*files, "base/latents.pt", "base/state.pt", "data/train/pictures.npy", "facesnap/train.yaml"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(np.random.default_rng(len(name)).bytes(3000))
    return tmp_path / "out", files


def test_packed_files_come_back_unchanged_in_small_parts(trained, tmp_path, monkeypatch):
    out, files = trained
    monkeypatch.setattr(pack, "PART_BYTES", 2500)
    parts = tmp_path / "parts"
    written = pack.pack(out, parts)
    assert 4 < len(written) <= pack.MOST_PARTS
    assert all(part.stat().st_size <= 2500 for part in written)
    assert sorted(pack.unpack(parts, tmp_path / "again")) == sorted(files)
    assert all((tmp_path / "again" / name).read_bytes() == (out / name).read_bytes() for name in files)
    (out / "base" / "sheet.png").unlink()
    shorter = pack.pack(out, parts)
    assert sorted(parts.iterdir()) == shorter  # parts of the earlier call are gone
    monkeypatch.setattr(pack, "MOST_PARTS", 2)
    with pytest.raises(FaceSnapError, match="at most 0 MiB can be packed"):
        pack.pack(out, parts)


@pytest.mark.parametrize(
    "name", ["../quality.json", "/quality.json", "base/../../x/sheet.png", "c:/sheet.png", "base/.hidden/x", "other"]
)
def test_unexpected_files_are_not_unpacked(tmp_path, name):
    with zipfile.ZipFile(tmp_path / f"{pack.NAME}.0", "w") as archive:
        archive.writestr("quality.json", "{}")
        archive.writestr(name, "x")
    with pytest.raises(FaceSnapError, match="contains the unexpected file"):
        pack.unpack(tmp_path, tmp_path / "out" / "deep")
    assert not (tmp_path / "out").exists()


def test_damaged_and_missing_parts_are_reported(trained, tmp_path, monkeypatch):
    out, _ = trained
    monkeypatch.setattr(pack, "PART_BYTES", 2500)
    written = pack.pack(out, tmp_path / "parts")
    content = written[1].read_bytes()
    written[1].write_bytes(bytes(len(content)))
    with pytest.raises(FaceSnapError, match="is damaged"):
        pack.unpack(tmp_path / "parts", tmp_path / "again")
    written[1].unlink()
    with pytest.raises(FaceSnapError, match="does not contain all parts"):
        pack.unpack(tmp_path / "parts", tmp_path / "again")


class Done(Exception):
    """Raised after the first step."""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("device")
    for split in dataset.PEOPLE:
        BUILD(out / "data" / split, split, PEOPLE, minutes=9, side=SIDE)
    return out


def _teacher():
    return vae.Vae(vae.RECIPES["vae4"].config)


DEVICE = {
    "vae4": lambda w, o, c: vae.train_vae("vae4", w.pictures, w.pictures, o, minutes=1, compute=c),
    "identity": lambda w, o, c: identity.train("identity", w, o, minutes=1, compute=c),
    "judge_inner": lambda w, o, c: identity.train("judge_inner", w, o, minutes=1, compute=c),
    "clip": lambda w, o, c: clip_pair.train(w, o, minutes=1, compute=c),
    "detector": lambda w, o, c: detector.train(w, o, minutes=1, compute=c),
    "deca": lambda w, o, c: deca.train(w, o, minutes=1, compute=c),
    "base": lambda w, o, c: base.train(w, autoencoder.Autoencoder(), o, minutes=1, compute=c),
    "host_vae": lambda w, o, c: host_vae.train(_teacher(), w.pictures, o, minutes=1, compute=c),
    "lightning": lambda w, o, c: lightning.train(_pipeline(o), torch.randn(24, 4, 8, 8), o, minutes=1, compute=c),
}


def _pipeline(folder):
    base.save_pipeline(base.new_base(), autoencoder.Autoencoder(), folder)
    return shipped.load_sdxl(folder)


@pytest.mark.parametrize("name", DEVICE)
def test_a_step_stays_on_its_device(tiny, out, tmp_path, monkeypatch, name):
    """The meta device stands in for a GPU: it computes nothing, but refuses tensors of the CPU like one."""

    def one_step(module, loss_of, folder, **plan):
        assert plan["compute"].batch == 2
        loss = loss_of(0)
        assert loss.device.type == "meta"
        loss.backward()
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        assert gradients
        assert {gradient.device.type for gradient in gradients} == {"meta"}
        raise Done

    for module in (base, clip_pair, deca, detector, host_vae, identity, lightning, vae):
        monkeypatch.setattr(module, "fit", one_step)
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **settings: contextlib.nullcontext())
    monkeypatch.setattr(base, "cached_latents", lambda *arguments: torch.randn(24, 4, 8, 8))
    monkeypatch.setattr(torch, "unique", lambda ids, **settings: (ids, torch.arange(len(ids), device=ids.device)))
    with pytest.raises(Done):
        DEVICE[name](dataset.load(out / "data" / "train"), tmp_path, Compute("meta", batch=2))


def test_threads_prepare_the_same_batches():
    drawn = []

    def draw(step):
        drawn.append(step)
        return np.random.default_rng(step).normal()

    batch_of = loop.prepared(draw, 3)
    assert [batch_of(step) for step in range(5, 12)] == [np.random.default_rng(step).normal() for step in range(5, 12)]
    assert sorted(drawn) == sorted(set(drawn))  # each one once
    assert loop.prepared(draw, 0) is draw


@pytest.mark.parametrize(("anneal", "last"), [(True, loop.LAST_RATE), (False, 1.0)])
def test_the_learning_rate_falls_within_the_minutes(tmp_path, monkeypatch, anneal, last):
    clock, rates = iter(range(10**6)), []
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(loop, "WARMUP", 1)
    module = nn.Linear(2, 1)
    real = torch.optim.AdamW.step

    def step(self, *arguments, **settings):
        rates.append(self.param_groups[0]["lr"])
        return real(self, *arguments, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)

    def train_for(minutes):
        rates.clear()
        compute = Compute(batch=4, anneal=anneal)
        loop.fit(module, lambda step: module(torch.ones(1, 2)).sum(), tmp_path, steps=10_000, minutes=minutes, rate=0.5,
                 compute=compute)  # fmt: skip
        return list(rates)

    first = train_for(2)
    assert first[0] == pytest.approx(1.0, rel=0.01)  # twice the rate for four times the batch
    assert first[-1] == pytest.approx(last, rel=0.5 if anneal else 0.01)
    again = train_for(2)
    assert again[0] == pytest.approx(1.0, rel=0.05)  # the next call raises it
    assert again == sorted(again, reverse=True)
