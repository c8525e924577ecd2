"""FaceSnap files are written, read and rejected, and created from a checkpoint or a ControlNet."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from facesnap_ext.convert import convert
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.networks.ffrnet import LandmarkEmbedding
from facesnap_ext.networks.mixer import FacialAttributeMixer, MixerConfig
from facesnap_ext.residuals import landmark_image
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.initialise import HINT_WIDTHS, initialise, preserve_landmarks
from tests.support import tiny
from tests.support.weight_files import KINDS, write

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

MIXER = MixerConfig(id_dim=12, clip_dim=10, dim=tiny.CONTEXT, id_tokens=5, queries=4, layers=1, feedforward=64, heads=4)
UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")


@pytest.fixture
def saved(tmp_path):
    mixer, ffrnet = tiny.randomise(FacialAttributeMixer(MIXER)), tiny.ffrnet()
    info = facesnap_file.FaceSnapInfo(MIXER, ffrnet.config, True, "CC0-1.0", "three drawings")
    path = tmp_path / "facesnap.safetensors"
    facesnap_file.save(path, info, mixer, ffrnet)
    return path, info, mixer, ffrnet


def test_saved_weights_are_loaded(saved):
    path, info, mixer, ffrnet = saved
    weights = facesnap_file.load(path)
    assert weights.info == info
    for written, loaded in ((mixer, weights.mixer), (ffrnet, weights.ffrnet)):
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        for key, tensor in written.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor), key


def test_metadata_is_readable_without_this_package(saved):
    from safetensors import safe_open

    with safe_open(saved[0], framework="pt") as file:
        metadata = file.metadata()
        assert {key.split(".")[0] for key in file.keys()} == {"mixer", "ffrnet"}  # noqa: SIM118
    assert metadata["format"] == "facesnap"
    assert metadata["version"] == "1"
    assert metadata["text_free"] == "true"
    assert metadata["license"] == "CC0-1.0"
    assert metadata["trained_on"] == "three drawings"
    assert json.loads(metadata["mixer"])["queries"] == 4
    assert json.loads(metadata["ffrnet"])["widths"] == list(tiny.WIDTHS)


def test_file_is_loaded_in_another_dtype(saved):
    weights = facesnap_file.load(saved[0], torch.bfloat16)
    assert weights.ffrnet.dtype is torch.bfloat16
    assert weights.mixer.queries.dtype is torch.bfloat16


def test_file_of_another_kind_is_rejected_before_its_data_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "sd15.safetensors", KINDS["SD15_CONTROLNET"])
    monkeypatch.setattr(facesnap_file, "read_tensors", lambda *args, **kwargs: pytest.fail("data was read"))
    with pytest.raises(FaceSnapError, match=r"sd15\.safetensors is an SD1\.5 ControlNet, not a FaceSnap file"):
        facesnap_file.load(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, m: t.pop("ffrnet.conv_in.bias"), r"incomplete or damaged: tensor ffrnet\.conv_in\.bias does not"),
        (lambda t, m: t.update({"mixer.foreign": torch.zeros(1)}), r"mixer\.foreign"),
        (lambda t, m: t.update({"ffrnet.conv_in.bias": torch.zeros(7)}), r"ffrnet\.conv_in\.bias"),
        (lambda t, m: m.update(version="2"), "newer FaceSnap"),
        (lambda t, m: m.update(version="?"), "metadata .* damaged"),
        (lambda t, m: m.pop("mixer"), "metadata .* damaged"),
        (lambda t, m: m.update(ffrnet="{"), "metadata .* damaged"),
        (lambda t, m: m.update(mixer='{"unknown": 1}'), "metadata .* damaged"),
    ],
)
def test_damaged_file_is_rejected_by_name(saved, damage, message):
    path, info, *_ = saved
    tensors, metadata = load_file(path), info.to_metadata()
    damage(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(FaceSnapError, match=message) as caught:
        facesnap_file.load(path)
    assert path.name in str(caught.value)


def test_failed_save_keeps_the_old_file_and_leaves_no_temporary_file(saved, monkeypatch):
    path, info, mixer, ffrnet = saved
    before = path.read_bytes()

    def fail(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(FaceSnapError, match=r"facesnap\.safetensors cannot be written .No space"):
        facesnap_file.save(path, info, mixer, ffrnet)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def unet_checkpoint(tmp_path):
    torch.manual_seed(0)
    unet = tiny.randomise(diffusers.UNet2DConditionModel(sample_size=16, up_block_types=UP, **tiny.DIFFUSERS))
    path = tmp_path / "unet.safetensors"
    save_file(unet.state_dict(), path)
    return unet, path


# diffusers' block names and LDM's, for this UNet with three levels of two ResNet blocks
LDM_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.resnets.1": "input_blocks.2.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0": "input_blocks.4.0",
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.resnets.1": "input_blocks.5.0",
    "down_blocks.1.attentions.1": "input_blocks.5.1",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "down_blocks.2.resnets.0": "input_blocks.7.0",
    "down_blocks.2.attentions.0": "input_blocks.7.1",
    "down_blocks.2.resnets.1": "input_blocks.8.0",
    "down_blocks.2.attentions.1": "input_blocks.8.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
LDM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def as_ldm(state):
    renamed = {
        "conditioner.embedders.1.model.ln_final.weight": torch.zeros(4),
        "first_stage_model.decoder.conv_in.weight": torch.zeros(4, 4, 3, 3),
        "model.diffusion_model.out.2.weight": torch.zeros(4, 32, 3, 3),
        "model.diffusion_model.output_blocks.0.0.in_layers.0.weight": torch.zeros(4),
    }
    for key, tensor in state.items():
        for block, ldm in LDM_BLOCKS.items():
            if key.startswith(block + "."):
                inner = key[len(block) + 1 :]
                if ".resnets." in f".{block}.":
                    module, name = inner.rsplit(".", 1)
                    inner = f"{LDM_RESNET[module]}.{name}"
                renamed[f"model.diffusion_model.{ldm}.{inner}"] = tensor.contiguous()
    return renamed


@pytest.mark.parametrize("layout", ["diffusers", "single file"])
def test_initial_file_has_the_checkpoints_encoder_and_zero_convolutions(tmp_path, layout):
    unet, path = unet_checkpoint(tmp_path)
    if layout == "single file":
        save_file(as_ldm(unet.state_dict()), path)
    out = tmp_path / "init.safetensors"
    initialise(path, out, head_dim=16, size_dim=8, dtype=torch.float32)
    weights = facesnap_file.load(out)
    assert weights.info.text_free
    assert weights.info.ffrnet.heads == (2, 4, 6)
    assert (weights.info.mixer.dim, weights.info.mixer.queries) == (tiny.CONTEXT, 16)

    reference = diffusers.ControlNetModel.from_unet(unet)
    state = weights.ffrnet.state_dict()
    assert state.keys() == reference.state_dict().keys()
    for key, tensor in reference.state_dict().items():
        if key.startswith("controlnet_cond_embedding.") and "conv_out" not in key:
            assert state[key].shape == tensor.shape  # randomly initialised in both
        else:
            assert torch.equal(state[key], tensor), key

    x, tokens = torch.randn(1, 4, 16, 16), torch.randn(1, 16, tiny.CONTEXT)
    features = weights.ffrnet.embed_landmarks(torch.rand(1, 3, 128, 128))
    assert all(
        (residual == 0).all()
        for residual in weights.ffrnet(x, torch.tensor([500.0]), weights.ffrnet.embed_tokens(tokens), features)
    )


@pytest.mark.parametrize("widths", [(16, 32, 64), HINT_WIDTHS])
def test_differences_between_landmark_images_reach_the_landmark_embeddings_last_layer(widths):
    torch.manual_seed(0)
    embedding = LandmarkEmbedding(widths, 8)
    preserve_landmarks(embedding)
    points = np.random.default_rng(0).uniform(64, 192, (2, 72, 2))
    images = [landmark_image(Landmarks(face, 256, 256), 256, 256) for face in points]
    seen = []
    embedding.conv_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for image in images:
            embedding(image)
    before, after = ((one - other).square().mean().sqrt() for one, other in (images, seen))
    assert 0.3 < after / before < 30


def test_equal_seeds_give_equal_files_and_keep_the_global_random_state(tmp_path):
    _, path = unet_checkpoint(tmp_path)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        initialise(path, tmp_path / name, size_dim=8, seed=seed)
    assert torch.equal(torch.rand(1), expected)
    a, b, c = (load_file(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_additional_channels_of_an_inpainting_checkpoint_are_dropped(tmp_path):
    unet, path = unet_checkpoint(tmp_path)
    state = as_ldm(unet.state_dict())
    key = "model.diffusion_model.input_blocks.0.0.weight"
    state[key] = torch.cat([state[key], torch.ones(tiny.WIDTHS[0], 5, 3, 3)], dim=1)
    save_file(state, path)
    initialise(path, tmp_path / "init.safetensors", size_dim=8, dtype=torch.float32)
    weights = facesnap_file.load(tmp_path / "init.safetensors")
    assert torch.equal(weights.ffrnet.conv_in.weight, unet.conv_in.weight)


def test_only_sdxl_checkpoints_are_accepted(tmp_path):
    path = write(tmp_path / "old.safetensors", KINDS["SD15"])
    with pytest.raises(FaceSnapError, match=r"old\.safetensors is an SD1\.5 checkpoint"):
        initialise(path, tmp_path / "init.safetensors")
    assert not (tmp_path / "init.safetensors").exists()


def test_diffusers_controlnet_folder_is_converted_to_a_facesnap_file(tmp_path):
    controlnet = tiny.randomise(diffusers.ControlNetModel(**tiny.DIFFUSERS))
    folder = tmp_path / "IdentityNet"
    controlnet.save_pretrained(folder)
    out = convert(folder)
    assert out == tmp_path / "IdentityNet-facesnap.safetensors"
    weights = facesnap_file.load(out)
    assert not weights.info.text_free
    assert weights.info.ffrnet == replace(tiny.config(depths=((0, 0), (1, 1), (2, 2)), middle_depth=2))
    for key, tensor in controlnet.state_dict().items():
        assert torch.equal(weights.ffrnet.state_dict()[key], tensor)


@pytest.mark.parametrize("kind", ["SD15_CONTROLNET", "LORA", "SDXL", "UNKNOWN"])
def test_unconvertible_file_is_rejected_by_kind(tmp_path, kind):
    from facesnap_ext.weights.recognise import Kind

    path = write(tmp_path / "x.safetensors", KINDS[kind])
    with pytest.raises(FaceSnapError, match=f"x.safetensors is {Kind[kind].value}"):
        convert(path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_folder_without_a_controlnet_is_reported(tmp_path):
    with pytest.raises(FaceSnapError, match="enter the folder of a ControlNet in diffusers' layout"):
        convert(tmp_path)
