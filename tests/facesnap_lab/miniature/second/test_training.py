"""The second edition's data, training loop, VAE and gates, at tiny sizes: above all, that every stage resumes."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from facesnap_lab.miniature.perception import to_tensor
from facesnap_lab.miniature.second import dataset, gates, loop, train, vae
from facesnap_lab.miniature.second.loop import CPU
from facesnap_lab.miniature.second.vae import Vae, VaeConfig, VaeRecipe

CONFIGS = {16: VaeConfig(16, 8, (8, 8), (1, 1)), 4: VaeConfig(4, 4, (8, 8), (1, 1)), 8: VaeConfig(8, 8, (8, 8), (1, 1))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    dataset.build(folder, "train", people=4, minutes=9, shots=6, side=32)
    return folder


@pytest.fixture(scope="module")
def pictures(folder):
    return np.array(dataset.load(folder).pictures)


def test_rendering_resumes_where_it_stopped(folder, tmp_path):
    options = {"people": 4, "shots": 6, "side": 32}
    assert dataset.build(tmp_path, "train", minutes=0, **options) == 1  # every call renders at least one person
    assert len(dataset.load(tmp_path).pictures) == 6
    assert dataset.build(tmp_path, "train", minutes=9, until=3, **options) == 3
    assert dataset.build(tmp_path, "train", minutes=9, workers=2, **options) == 4
    whole, resumed = dataset.load(folder), dataset.load(tmp_path)
    for name, values in vars(whole).items():
        assert np.array_equal(values, getattr(resumed, name)), name
    assert whole.looks.tolist() == [0, 0, 0, 1, 1, 1] * 4
    assert whole.people.tolist() == sorted([0, 1, 2, 3] * 6)


def test_every_split_has_images_when_the_minutes_are_over(tmp_path, monkeypatch):
    build = dataset.build
    monkeypatch.setattr(dataset, "build", lambda *a, **k: build(*a, **k, shots=1, side=32))
    train.run_data(tmp_path, 0, CPU)
    assert {split: len(dataset.load(tmp_path / "data" / split).pictures) for split in dataset.PEOPLE} == dict.fromkeys(
        dataset.PEOPLE, 1
    )


def test_rendering_refuses_a_folder_of_another_plan(folder):
    with pytest.raises(ValueError, match="choose another folder"):
        dataset.build(folder, "train", people=5, minutes=1, shots=6, side=32)


def test_missing_images_are_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the stage `data` first"):
        dataset.load(tmp_path)


def small_problem():
    torch.manual_seed(0)
    module = nn.Linear(4, 1)

    def loss_of(step):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (module(x) - x.sum(1, keepdim=True)).pow(2).mean()

    return module, loss_of


def test_interrupted_training_gives_the_same_weights(tmp_path):
    whole, loss_of = small_problem()
    assert loop.fit(whole, loss_of, tmp_path / "whole", steps=40, minutes=9, rate=0.05) == 40

    resumed, loss_of = small_problem()

    def interrupted(step):
        if step == 25:
            raise KeyboardInterrupt
        return loss_of(step)

    loop.CHECKPOINT_EVERY, every = 0.0, loop.CHECKPOINT_EVERY
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.fit(resumed, interrupted, tmp_path / "resumed", steps=40, minutes=9, rate=0.05)
    finally:
        loop.CHECKPOINT_EVERY = every
    resumed, loss_of = small_problem()
    nn.init.zeros_(resumed.weight)  # the checkpoint replaces this weight
    assert loop.fit(resumed, loss_of, tmp_path / "resumed", steps=40, minutes=9, rate=0.05) == 40
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)
    assert not list(tmp_path.rglob("*.part"))


def test_training_stops_when_the_minutes_are_over(tmp_path):
    module, loss_of = small_problem()
    assert loop.fit(module, loss_of, tmp_path, steps=40, minutes=0, rate=0.05) == 0
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize("channels", CONFIGS)
def test_pca_reconstructs_before_training_and_its_latents_are_white(pictures, channels):
    pictures = to_tensor(pictures)
    model = Vae(CONFIGS[channels]).eval().requires_grad_(False)
    vae.start_from_pca(model, pictures)
    latents = model.encode(pictures)
    factor = CONFIGS[channels].factor
    assert latents.shape[1:] == (channels, 32 // factor, 32 // factor)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert (torch.cov(latents.transpose(0, 1).flatten(1)) - torch.eye(channels)).abs().max() < 1e-2
    assert vae.psnr(model, pictures) > 21


def test_four_channels_keep_as_much_as_sixteen_and_belong_to_their_cells(pictures):
    pictures = to_tensor(pictures)
    models = {channels: Vae(CONFIGS[channels]).eval().requires_grad_(False) for channels in (4, 16)}
    for model in models.values():
        vae.start_from_pca(model, pictures)
    assert vae.psnr(models[4], pictures) == pytest.approx(vae.psnr(models[16], pictures), abs=0.01)
    # a change of one cell's pixels changes that cell's latents most
    changed = pictures.clone()
    changed[:, :, 8:12, 12:16] += 0.3
    moved = (models[4].encode(changed) - models[4].encode(pictures)).pow(2).sum(1).mean(0)
    assert moved.flatten().argmax() == 2 * 8 + 3


@pytest.mark.parametrize("channels", CONFIGS)
def test_whitening_keeps_reconstructions(pictures, channels):
    torch.manual_seed(1)
    pictures = to_tensor(pictures)
    model = Vae(CONFIGS[channels]).eval().requires_grad_(False)
    vae.start_from_pca(model, pictures)
    for part in (model.encoder.head, model.decoder.head, model.to_components):
        part.weight += 0.02 * torch.randn_like(part.weight)
    before = model.decode(model.encode(pictures))
    vae.whiten(model, pictures)
    latents = model.encode(pictures)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-2
    assert (torch.cov(latents.transpose(0, 1).flatten(1)) - torch.eye(channels)).abs().max() < 1e-2
    assert (model.decode(latents) - before).abs().max() < 0.05  # bfloat16 rounds differently


def test_vae_stage_trains_resumes_and_writes_its_gates(tmp_path, monkeypatch):
    for split in ("train", "test"):
        dataset.build(tmp_path / "data" / split, split, people=2, minutes=9, shots=6, side=32)
    np.savez(tmp_path / "data" / "trait_pairs.npz", **gates.trait_pairs(count=2, side=32))
    for steps in (20, 40):
        monkeypatch.setitem(vae.RECIPES, "vae4", VaeRecipe(CONFIGS[4], steps=steps, batch=4))
        train.run_vae("vae4", tmp_path, minutes=1, compute=CPU)
        figures = json.loads((tmp_path / "quality.json").read_text())["vae4"]
        assert figures["steps"] == steps
        assert figures["finished"]
    assert set(gates.TRAITS) <= set(figures)
    assert not figures["passed"]
    loaded = vae.load_vae(tmp_path / "vae4" / "vae.safetensors")
    test = to_tensor(np.array(dataset.load(tmp_path / "data" / "test").pictures[:480:2]))
    assert vae.psnr(loaded, test) == pytest.approx(figures["psnr"], abs=0.01)


def test_trait_figures():
    """A perfect VAE keeps and recognises everything; one that returns a constant keeps nothing."""
    before = torch.rand(6, 3, 8, 8)
    changed = before.clone()
    changed[:, :, 2:4] += 0.5
    assert gates.trait_figures(before, changed, before, changed) == (pytest.approx(1), 1)
    halfway = before + 0.4 * (changed - before)
    assert gates.trait_figures(before, changed, before, halfway) == (pytest.approx(0.4), 0.5)
    kept, _ = gates.trait_figures(before, changed, 0 * before, 0 * before)
    assert kept == 0
