"""The second edition's base: its VAE in a diffusers pipeline, the moving average, and a stage that resumes."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

from facesnap_lab.miniature import base_model, shipped
from facesnap_lab.miniature.base_model import save_pipeline
from facesnap_lab.miniature.perception import to_tensor
from facesnap_lab.miniature.second import autoencoder, base, dataset, facesnap, host_vae, lightning, loop, train, vae
from facesnap_lab.miniature.second.loop import CPU
from facesnap_lab.miniature.second.vae import Vae, VaeConfig
from tests.support.face_packs import write_pack

SIDE = 32


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with tiny images, and a VAE that is their PCA."""
    out = tmp_path_factory.mktemp("base")
    dataset.build(out / "data" / "train", "train", people=2, minutes=9, side=SIDE)
    model = Vae(VaeConfig(4, 4, (8, 8), (1, 1))).eval().requires_grad_(False)
    vae.start_from_pca(model, to_tensor(np.array(dataset.load(out / "data" / "train").pictures)))
    (out / "vae4").mkdir()
    vae.save_vae(model, out / "vae4" / "vae.safetensors")
    return out


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(base, "SIDE", SIDE)
    monkeypatch.setattr(base, "WIDTHS", (32, 32, 64))
    monkeypatch.setattr(base, "DEPTHS", (1, 1, 1))
    monkeypatch.setattr(base, "BATCH", 2)
    monkeypatch.setattr(base, "PICTURES", 40)
    monkeypatch.setattr(shipped, "STEPS", 2)
    monkeypatch.setattr(shipped, "FEW_STEPS", 2)


def test_the_moving_average_is_exponential_and_resumes(tmp_path):
    seen = []

    def run(steps, start):
        torch.manual_seed(start)  # the checkpoint replaces these weights
        module, average = nn.Linear(2, 1), nn.Linear(2, 1)
        average.load_state_dict(module.state_dict())

        def loss_of(step):
            seen.append(module.weight.detach().clone())
            x = torch.randn(8, 2, generator=torch.Generator().manual_seed(step))
            return (module(x) - x.sum(1, keepdim=True)).pow(2).mean()

        loop.fit(module, loss_of, tmp_path, steps=steps, minutes=9, rate=0.05, average=average, ema=0.7)
        return module, average

    run(20, 0)
    module, average = run(40, 1)
    weights = [*seen, module.weight.detach()]
    expected = weights[0]
    for step, weight in enumerate(weights[1:], 1):
        keep = min(0.7, step / (step + 20))
        expected = keep * expected + (1 - keep) * weight
    torch.testing.assert_close(average.weight.detach(), expected)


def test_a_new_base_passes_on_the_mean_of_its_input():
    """Otherwise, the mean of the noise colours the image."""
    torch.manual_seed(0)
    unet = base_model.new_unet(32, (64, 64, 128))
    assert max(base.mean_slopes(unet)) < 0.3
    base.preserve_input(unet, 0.8)
    assert base.mean_slopes(unet) == pytest.approx([0.8] * 4, abs=0.1)


def test_a_pipeline_keeps_the_vae(out, tmp_path):
    plain = vae.load_vae(out / "vae4" / "vae.safetensors")
    wrapped = autoencoder.from_file(out / "vae4" / "vae.safetensors")
    base.save_pipeline(base.new_base(), wrapped, tmp_path)
    loaded = shipped.load_sdxl(tmp_path)
    assert loaded.vae_scale_factor == 4
    pictures = to_tensor(np.array(dataset.load(out / "data" / "train").pictures[:3]))
    latents = loaded.vae.encode(pictures).latent_dist
    half = {key: tensor.half().float() for key, tensor in plain.state_dict().items()}  # as saved
    plain.load_state_dict(half)
    torch.testing.assert_close(latents.mean, plain.encode(pictures))
    assert latents.std.max() < 1e-6
    torch.testing.assert_close(loaded.vae.decode(latents.mean, return_dict=False)[0], plain.decode(latents.mean))


def test_stage_resumes_and_writes_its_gate(out, monkeypatch):
    monkeypatch.setattr(base, "STEPS", 2)
    train.run_base(out, minutes=0, compute=CPU)  # at least the pipeline can be measured
    train.run_base(out, minutes=9, compute=CPU)
    quality = json.loads((out / "quality.json").read_text())["base"]
    assert len(quality.pop("mean slopes")) == 4
    assert quality == {"steps": 2, "finished": True, "passed": False}  # there is no detector yet
    assert (out / "base" / "sheet.png").stat().st_size > 1000
    latents = torch.load(out / "base" / "latents.pt", weights_only=True)["latents"]
    assert latents.shape == (2 * dataset.SHOTS, 4, SIDE // 4, SIDE // 4)
    assert latents.float().std() == pytest.approx(1, abs=0.1)


def test_latents_are_encoded_again_with_another_vae_or_more_images(tmp_path, monkeypatch):
    encoded = []
    monkeypatch.setattr(
        base, "encode_all", lambda vae, pictures: encoded.append(len(pictures)) or torch.ones(len(pictures), 1)
    )
    first, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    for network, count in ((first, 2), (first, 2), (first, 3), (other, 3), (other, 3)):
        assert len(base.cached_latents(network, np.zeros((count, 4)), tmp_path / "latents.pt")) == count
    assert encoded == [2, 3, 3]


def test_faces_are_counted_by_the_detector(out, tmp_path, monkeypatch):
    base.save_pipeline(base.new_base(), autoencoder.from_file(out / "vae4" / "vae.safetensors"), tmp_path)
    sampler = shipped.with_base_scheduler(shipped.load_sdxl(tmp_path))
    answers: list[list[str]] = []

    def detect(detector, bgr):
        assert detector == "detector"
        assert bgr.shape == (SIDE, SIDE, 3)
        return answers.pop()

    monkeypatch.setattr(base, "detect_faces", detect)
    answers[:] = [["face"]] * 39 + [[]]
    measured = base.measure(sampler, "detector", tmp_path / "sheet.png")
    assert (measured["faces"], measured["passed"]) == (39 / 40, False)
    monkeypatch.setattr(base, "FACES", 0.97)
    answers[:] = [["face"]] * 39 + [[]]
    assert base.measure(sampler, "detector", tmp_path / "sheet.png")["passed"]


def test_training_loads_the_base_in_a_process_that_has_not_imported_its_vae(out, tmp_path, monkeypatch):
    from facesnap_lab.training.frozen import load_base

    save_pipeline(base.new_base(), autoencoder.from_file(out / "vae4" / "vae.safetensors"), tmp_path)
    monkeypatch.delitem(sys.modules, autoencoder.__name__)
    pipe = load_base(tmp_path, None, torch.bfloat16)
    assert pipe.unet.dtype is torch.bfloat16
    assert pipe.vae.dtype is torch.float32  # it casts itself
    images = torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    assert pipe.vae.decode(pipe.vae.encode(images).latent_dist.mean).sample.dtype is torch.float32


def test_few_steps_are_distilled_into_a_lora(out, monkeypatch):
    monkeypatch.setattr(lightning, "STEPS", 3)
    monkeypatch.setattr(lightning, "BATCH", 2)
    monkeypatch.setattr(lightning, "SIDE", SIDE)
    pipeline = out / "base" / "pipeline"
    plain = shipped.load_sdxl(pipeline).unet.state_dict()
    train.run_lightning(out, minutes=9, compute=CPU)
    assert json.loads((out / "quality.json").read_text())["lightning"]["steps"] == 3
    sampler = shipped.with_lora(shipped.load_sdxl(pipeline), out / "lightning" / lightning.FILE)
    merged = sampler.pipe.unet.state_dict()
    assert merged.keys() == plain.keys()
    changed = {key for key in plain if not torch.equal(plain[key], merged[key])}
    assert {key.rpartition(".")[2] for key in changed} == {"weight"}
    assert any("attn2.to_q" in key for key in changed)
    assert any("conv1" in key for key in changed)


def test_facesnap_is_trained_with_these_networks(out, monkeypatch, fresh_accelerate):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from facesnap_lab.training.config import read_config
    from facesnap_lab.training.shards import read_sample, read_shard_index
    from facesnap_lab.training.trainer import train as train_facesnap

    monkeypatch.setattr(facesnap, "SIDE", SIDE)
    monkeypatch.setitem(facesnap.CHANGES, "resolution", SIDE)
    write_pack(out / "identity", "buffalo_l")
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**size, image_size=28, patch_size=14)).save_pretrained(out / "clip" / "model")
    file = facesnap.write_inputs(out)
    settings = json.loads(file.read_text())
    few = {"steps": 1, "batch_size": 2, "id_rows": 1, "lightning_grad_steps": 1, "sample_every": 0}
    file.write_text(json.dumps(settings | few))
    config = read_config(file)
    index = read_shard_index(config.shards)
    assert len(index) == 2 * dataset.SHOTS
    looks = {read_sample(index, number).person for number in range(len(index))}
    assert looks == {f"{person:06d}-{look}" for person in range(2) for look in range(4)}
    assert (train_facesnap(config) / "facesnap.safetensors").exists()


def test_an_autoencoder_for_webuis_learns_the_latents_and_the_pictures(out, monkeypatch):
    monkeypatch.setattr(host_vae, "WIDTHS", (16, 16, 16))
    monkeypatch.setattr(host_vae, "BATCH", 2)
    monkeypatch.setattr(host_vae, "STEPS", 60)
    monkeypatch.setattr(host_vae, "RATE", 6e-3)
    monkeypatch.setattr(loop, "WARMUP", 5)
    teacher = vae.load_vae(out / "vae4" / "vae.safetensors")
    pictures = dataset.load(out / "data" / "train").pictures
    before = host_vae.measure(host_vae.new_autoencoder(SIDE), teacher, pictures[::3])
    student, steps = host_vae.train(teacher, pictures, out / "host_vae", minutes=9)
    after = host_vae.measure(student, teacher, pictures[::3])
    assert steps == 60
    assert after["psnr"] > before["psnr"] + 3
    assert after["latents R2"] > before["latents R2"] + 0.1
    assert not after["passed"]
    assert (out / "host_vae" / "model" / "config.json").exists()
