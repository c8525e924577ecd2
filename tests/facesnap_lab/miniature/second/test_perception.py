"""The second edition's perception networks at tiny sizes: every stage resumes, and every figure means what it says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from facesnap_ext.landmarks.points72 import five_points
from facesnap_lab.miniature.second import (
    clip_pair,
    dataset,
    deca,
    details,
    detector,
    gates,
    gates_identity,
    identity,
    probes,
    train,
)
from facesnap_lab.miniature.second.loop import CPU
from facesnap_lab.miniature.second.render import landmarks, render
from facesnap_lab.miniature.second.world import dress, exchange, look, person, scene, subject
from facesnap_lab.training.arcface import load_arcface

SIDE, PEOPLE = 32, 3


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with tiny images of every split, and pairs."""
    out = tmp_path_factory.mktemp("second")
    for split in dataset.PEOPLE:
        dataset.build(out / "data" / split, split, PEOPLE, minutes=9, side=SIDE)
    np.savez(out / "data" / "trait_pairs.npz", **gates.trait_pairs(count=2, side=SIDE))
    return out


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, recipe in identity.RECIPES.items():
        small = dataclasses.replace(recipe, widths=(4, 4, 8), last=2, steps=3, batch=4)
        monkeypatch.setitem(identity.RECIPES, name, small)
    for module in (clip_pair, detector, deca):
        monkeypatch.setattr(module, "STEPS", 2)
        monkeypatch.setattr(module, "BATCH", 4)
    points = gates.trait_pair_points
    monkeypatch.setattr(gates, "trait_pair_points", lambda count: points(count, SIDE))


@pytest.fixture(scope="module")
def world(out):
    return dataset.load(out / "data" / "train")


def quality(out, name):
    return json.loads((out / "quality.json").read_text())[name]


def test_probe_finds_what_is_linear_and_nothing_in_noise():
    random = torch.Generator().manual_seed(0)
    x, noise = torch.randn(600, 20, generator=random), torch.randn(600, 1, generator=random)
    y = torch.cat([x[:, :1] - 2 * x[:, 1:2], x[:, 2:3] + noise, noise], 1)
    exact, half, nothing = probes.r_squared(x[:400], y[:400], x[400:], y[400:])
    assert exact > 0.99
    assert 0.35 < half < 0.6
    assert abs(nothing) < 0.1


def test_probe_of_more_features_than_images_gives_the_same_answers():
    """Both forms of ridge regression agree; the second one is used for fewer images than features."""
    random = torch.Generator().manual_seed(1)
    sizes = ((30, 30), (30, 2), (5, 30))
    x, y, new = (torch.randn(size, generator=random).double() for size in sizes)
    primal = probes._predict(x, y, new, 0.1)
    wide = [torch.cat([part, torch.zeros(len(part), 1).double()], 1) for part in (x, new)]
    dual = probes._predict(wide[0], y, wide[1], 0.1)
    torch.testing.assert_close(primal, dual)


def test_identification_needs_the_person_not_the_look():
    people, looks = torch.eye(5), torch.eye(4)
    assert probes.identification(people.repeat_interleave(4, 0), 4) == 1
    assert probes.identification(looks.repeat(5, 1), 4) == pytest.approx(0.2)  # everyone's first answer is person 0


def test_rows_of_looks_are_the_first_images_of_each_look(world):
    rows = probes.rows_of_looks(PEOPLE)
    assert world.people[rows].tolist() == sorted([0, 1, 2] * identity.LOOKS)
    assert world.looks[rows].tolist() == [0, 1, 2, 3] * PEOPLE


def test_properties_describe_the_visible_person(world):
    who = subject("train", 1, 4)
    values = probes.properties(who)
    assert len(values["shape"]) == 13
    assert sum(values["moles"]) == len(who.moles)
    shaved = dataclasses.replace(who, beard=0.0, glasses=None)
    assert probes.properties(shaved)["beard"] == probes.properties(shaved)["glasses"] == [0.0]


def test_landmarks_equal_the_renderers():
    subjects, scenes = [subject("test", i, 1) for i in range(2)], [scene(person("test", i), 1) for i in range(2)]
    np.testing.assert_array_equal(landmarks(subjects, scenes, SIDE), [r.points for r in render(subjects, scenes, SIDE)])


def test_white_balance_changes_colours_but_not_the_grey_pattern(world):
    recipe = dataclasses.replace(identity.RECIPES["identity"], degradation=0.0, colourless=0.0, blurred=0.0)
    pictures, points = np.array(world.pictures[:6]), five_points(np.array(world.points[:6]))
    plain = dataclasses.replace(recipe, gain=(1.0, 1.0))
    crops = [identity.training_crops(r, pictures.copy(), points, np.random.default_rng(3)) for r in (plain, recipe)]
    before, after = ((crop + 1).mean((2, 3)) for crop in crops)
    gains = after / before
    low, high = recipe.gain
    assert gains.min() > low - 0.01
    assert gains.max() < high + 0.01
    assert (gains.amax(1) / gains.amin(1)).median() > 1.1


def test_a_quarter_of_the_identity_networks_crops_have_no_colours(world):
    pictures, points = np.array(world.pictures[:6]).repeat(20, 0), five_points(np.array(world.points[:6])).repeat(20, 0)
    crops = identity.training_crops(identity.RECIPES["identity"], pictures, points, np.random.default_rng(3))
    grey = (crops == crops[:, :1]).flatten(1).all(1)
    assert 0.1 < grey.float().mean() < 0.4


def test_a_quarter_of_the_identity_networks_crops_have_no_details():
    recipe = dataclasses.replace(identity.RECIPES["identity"], degradation=0.0, colourless=0.0, gain=(1.0, 1.0))
    random = np.random.default_rng(3)
    noise = random.integers(0, 256, (100, 128, 128, 3), dtype=np.uint8)
    eyes_nose_mouth = np.array([(43.8, 59.2), (83.9, 58.9), (64.0, 82.0), (47.5, 105.5), (80.8, 105.3)])
    crops = identity.training_crops(recipe, noise, np.tile(eyes_nose_mouth, (100, 1, 1)), random)
    steps = (crops[..., 1:] - crops[..., :-1]).abs().flatten(1).mean(1)
    plain, blurred = steps[steps > 0.1], steps[steps <= 0.1]
    assert 10 < len(blurred) < 40
    assert plain.min() > 3 * blurred.max()


def test_zoom_shows_more_than_the_face(world):
    pictures, points = np.array(world.pictures[:2]), five_points(np.array(world.points[:2]))
    near, far = (identity.aligned(pictures, points, zoom) for zoom in (1.0, 0.75))
    middle = far[:, :, 14:98, 14:98]
    again = F.interpolate(middle, 112, mode="bilinear")
    assert (again - near).abs().mean() < 0.1 < (far - near).abs().mean()


def test_classes_of_details_are_looks(world):
    assert identity.classes(world, looks=False).unique().tolist() == [0, 1, 2]
    assert torch.bincount(identity.classes(world, looks=True)).tolist() == [3] * 12


@pytest.mark.parametrize("name", ["identity", "judge_inner", "details"])
def test_recognition_stage_resumes_and_writes_gate_and_model(out, tmp_path, name, monkeypatch):
    train.run_identity(name, out, 9, CPU)
    figures = quality(out, name)
    assert figures["steps"] == 3
    assert figures["finished"]
    assert not figures["passed"]
    assert {"shape R2", "glasses R2", "rank_1", "moles choice"} <= figures.keys()
    assert ("glasses choice" in figures) == (name == "details")

    recipe = identity.RECIPES[name]
    world = dataset.load(out / "data" / recipe.split)
    monkeypatch.setitem(identity.RECIPES, name, dataclasses.replace(recipe, steps=2))
    network, _ = identity.train(name, world, tmp_path, minutes=9, recipe=recipe)
    again, _ = identity.train(name, world, out / name, minutes=9, recipe=recipe)
    torch.testing.assert_close(network.state_dict(), again.state_dict())

    crops = identity.aligned(np.array(world.pictures[:4]), five_points(np.array(world.points[:4])), recipe.zoom)
    found = load_arcface(out / name / "recognition.onnx")((crops + 1) / 2)
    assert found.shape == (4, identity.SIZE if name == "identity" else identity.JUDGE_SIZE)
    if name == "identity":
        with torch.no_grad():
            assert F.cosine_similarity(found, network(crops)).min() > 0.999


def test_interrupted_recognition_network_ends_with_the_same_weights(out, tmp_path):
    world, recipe = dataset.load(out / "data" / "train"), identity.RECIPES["identity"]
    whole, _ = identity.train("identity", world, tmp_path / "whole", minutes=9)
    real, calls = identity.training_crops, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("facesnap_lab.miniature.second.loop.CHECKPOINT_EVERY", 0.0)
        patch.setattr(identity, "training_crops", interrupted)
        with pytest.raises(KeyboardInterrupt):
            identity.train("identity", world, tmp_path / "part", minutes=9)
    resumed, steps = identity.train("identity", world, tmp_path / "part", minutes=9)
    assert steps == recipe.steps
    torch.testing.assert_close(whole.state_dict(), resumed.state_dict(), rtol=0, atol=0)


GOOD = {"shape R2": 0.31, "glasses R2": 0.2, "beard R2": 0.29, "rank_1": 0.85}


@pytest.mark.parametrize(
    ("name", "value"), [("shape R2", 0.29), ("glasses R2", 0.31), ("beard R2", 0.4), ("rank_1", 0.7)]
)
def test_each_part_of_the_gate_counts(name, value):
    assert gates_identity.passes(GOOD)
    assert not gates_identity.passes(GOOD | {name: value})


def test_judge_of_details_must_see_every_trait():
    choices = dict.fromkeys(gates.TRAITS, 0.95)
    assert gates_identity.passes({}, choices)
    assert not gates_identity.passes({}, choices | {"moles": 0.6})
    assert not gates_identity.passes({}, dict.fromkeys(gates.TRAITS, 0.8))


def test_every_word_occurs_and_traits_change_their_own_words():
    parts = list(details.PARTS)
    seen = np.array([details.describe(subject("test", i, 0), scene(person("test", i), 0)) for i in range(300)])
    for index, (_, words) in enumerate(details.PARTS.values()):
        assert set(seen[:, index]) == set(range(len(words))), parts[index]
    named = {
        "brows": "brow",
        "moles": "mole",
        "glasses": "frames",
        "make-up": "lipstick eye shadow",
        "skin": "skin brow",
    }
    for trait in ("skin", "iris", "brows", "moles", "hair", "glasses", "beard", "make-up"):
        changed = set()
        for i in range(40):
            who, other = subject("test", i, 0), dress(person("test", i + 50), look(person("test", i + 50), 1))
            what = scene(person("test", i), 0)
            pair = np.array([details.describe(one, what) for one in (who, exchange(who, other, trait))])
            changed |= {parts[index] for index in np.flatnonzero(pair[0] != pair[1])}
        assert changed, trait
        expected = named.get(trait, trait).split()
        assert all(any(word in part or part in named.get(trait, trait) for word in expected) for part in changed), (
            changed
        )


def test_captions_consist_of_known_words():
    random = np.random.default_rng(0)
    everything = [details.caption(range(1), [0])]
    answers = details.describe(subject("test", 0, 0), scene(person("test", 0), 0))
    everything += [details.caption(answers, random.permutation(len(details.PARTS))[:8]) for _ in range(50)]
    rows = details.token_ids(everything)
    assert len({len(row) for row in rows}) == 1
    assert all(details.IDS["<unk>"] not in row for row in rows)
    assert max(map(len, rows)) <= details.TEXT_LENGTH
    assert all(row[-1] == details.IDS["<|endoftext|>"] for row in rows)
    assert details.caption([0] * 18, [5, 15]) == "brown iris no glasses"


def test_clip_stage_resumes_and_is_compared_with_the_identity_network(out, monkeypatch):
    pytest.importorskip("transformers")
    (out / "quality.json").write_text(
        json.dumps({"identity": {f"{trait} R2": -99.0 for trait in probes.properties(subject("test", 0, 0))}})
    )
    monkeypatch.setattr(clip_pair, "STEPS", 1)
    train.run_clip(out, 9, CPU)
    assert quality(out, "clip")["finished"]
    monkeypatch.setattr(clip_pair, "STEPS", 2)
    train.run_clip(out, 9, CPU)
    figures = quality(out, "clip")
    assert figures["steps"] == 2
    assert figures["passed"]
    assert len(figures["ahead"]) == len(probes.properties(subject("test", 0, 0)))
    assert all(0 <= figures[f"{part} words"] <= 1 for part in details.PARTS)
    loaded = clip_pair.new_clip(SIDE).from_pretrained(out / "clip" / "model").eval()
    found = clip_pair.tokens(loaded, dataset.load(out / "data" / "test"), np.arange(2))
    assert found.shape == (2, (SIDE // clip_pair.PATCH) ** 2 + 1, 96)


def test_detector_and_deca_stages_resume_and_write_their_gates(out, monkeypatch):
    pytest.importorskip("insightface")
    monkeypatch.setattr(detector, "IMAGES", 2)
    world = dataset.load(out / "data" / "train")
    identity.export("identity", identity.Embedder(identity.RECIPES["identity"]).eval(), world, out / "identity")
    for steps in (1, 2):
        for module, run in ((detector, train.run_detector), (deca, train.run_deca)):
            monkeypatch.setattr(module, "STEPS", steps)
            run(out, 9, CPU)
    for name in ("detector", "deca"):
        figures = quality(out, name)
        assert figures["steps"] == 2
        assert figures["finished"]
        assert not figures["passed"]
    assert (out / "identity" / "detector.onnx").exists()
    assert (out / "deca" / "deca.safetensors").exists()
