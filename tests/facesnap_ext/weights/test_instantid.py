"""InstantID's published files, and a FaceSnap file created from them, produce InstantID's tokens and residuals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from facesnap_ext.cli.main import main
from facesnap_ext.conditioning import Conditioning
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.points72 import Landmarks
from facesnap_ext.networks.adapter import AdapterConfig
from facesnap_ext.networks.ffrnet import sinusoid
from facesnap_ext.networks.mixer import MixerConfig
from facesnap_ext.networks.resampler import ResamplerConfig, ResamplerMixer
from facesnap_ext.residuals import Residuals, landmark_image
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.instantid import ADAPTER, IDENTITYNET, from_instantid, load
from facesnap_ext.weights.recognise import Kind, recognise
from facesnap_ext.weights.search import find_models
from facesnap_ext.weights.source import load_any
from tests.support import tiny
from tests.support.mixers import instantid_resampler
from tests.support.weight_files import KINDS, write

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

WIDTH, HEADS, LAYERS = 96, 2, 2


def image_proj(dim=tiny.CONTEXT):
    """The Resampler's half of `ip-adapter.bin`: real names, and tiny sizes except ArcFace's 512."""
    inner = 64 * HEADS
    shapes = {
        "latents": (1, 16, WIDTH),
        "proj_in.weight": (WIDTH, 512),
        "proj_in.bias": (WIDTH,),
        "proj_out.weight": (dim, WIDTH),
        "proj_out.bias": (dim,),
        "norm_out.weight": (dim,),
        "norm_out.bias": (dim,),
    }
    for layer in range(LAYERS):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{layer}.{norm}.weight": (WIDTH,), f"layers.{layer}.{norm}.bias": (WIDTH,)}
        shapes |= {
            f"layers.{layer}.0.to_q.weight": (inner, WIDTH),
            f"layers.{layer}.0.to_kv.weight": (2 * inner, WIDTH),
            f"layers.{layer}.0.to_out.weight": (WIDTH, inner),
            f"layers.{layer}.1.1.weight": (4 * WIDTH, WIDTH),
            f"layers.{layer}.1.3.weight": (WIDTH, 4 * WIDTH),
        }
    g = torch.Generator().manual_seed(1)
    is_scale = ("norm1.weight", "norm2.weight", ".1.0.weight", "norm_out.weight")
    return {key: key.endswith(is_scale) + 0.2 * torch.randn(shape, generator=g) for key, shape in shapes.items()}


def save_adapter(folder, tensors, **form):
    attention = {"1.to_k_ip.weight": torch.zeros(64, tiny.CONTEXT), "1.to_v_ip.weight": torch.zeros(64, tiny.CONTEXT)}
    torch.save({"image_proj": tensors, "ip_adapter": attention}, folder / "ip-adapter.bin", **form)


@pytest.fixture
def controlnet():
    return tiny.randomise(diffusers.ControlNetModel(**tiny.DIFFUSERS))


@pytest.fixture
def folder(tmp_path, controlnet):
    """InstantID in its published layout."""
    folder = tmp_path / "InstantID"
    controlnet.save_pretrained(folder / "ControlNetModel")
    save_adapter(folder, image_proj())
    return folder


@pytest.mark.parametrize("legacy", [False, True])
def test_tokens_and_residuals_equal_instantids(tmp_path, folder, controlnet, legacy):
    save_adapter(folder, image_proj(), _use_new_zipfile_serialization=not legacy)
    assert recognise(folder / "ip-adapter.bin") is Kind.INSTANTID_ADAPTER
    out = tmp_path / "facesnap.safetensors"
    assert main(["init", "--instantid", str(folder), "--out", str(out)]) == 0
    weights = facesnap_file.load(out)

    g = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 1, 512, generator=g)  # of length 23, like ArcFace's before normalisation
    tokens = weights.mixer(embeddings, torch.randn(2, 1, 257, 1280, generator=g))
    expected = instantid_resampler(image_proj(), embeddings)
    assert expected.shape == (2, 16, tiny.CONTEXT)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)

    x, timesteps = torch.randn(2, 4, 16, 16, generator=g), torch.tensor([3.0, 871.0])
    picture = torch.rand(2, 3, 128, 128, generator=g)
    text = torch.randn(2, tiny.ADM - 6 * 8, generator=g)
    sizes = torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2)
    with torch.no_grad():
        down, middle = controlnet(
            x,
            timesteps,
            expected,
            picture,
            added_cond_kwargs={"text_embeds": text, "time_ids": sizes},
            return_dict=False,
        )
    y = torch.cat([text, sinusoid(sizes.flatten(), 8).view(2, -1)], 1)
    residuals = weights.ffrnet(
        x, timesteps, weights.ffrnet.embed_tokens(tokens), weights.ffrnet.embed_landmarks(picture), y
    )
    for own, other in zip(residuals, [*down, middle], strict=True):
        assert other.abs().mean() > 1e-3
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


def test_metadata_describes_the_file(tmp_path, folder):
    out = tmp_path / "facesnap.safetensors"
    from_instantid(folder, out, clip_dim=10)
    info = facesnap_file.read_info(out)
    assert info == facesnap_file.load(out).info
    assert info.mixer == ResamplerConfig(512, 10, tiny.CONTEXT, WIDTH, 16, LAYERS, 4 * WIDTH, HEADS, 64)
    assert info.ffrnet == tiny.config()  # heads and size_dim from config.json
    assert not info.text_free
    assert "InstantID" in info.trained_on
    assert info.to_metadata()["mixer_kind"] == "resampler"


def test_each_half_keeps_its_dtype_unless_one_is_given(tmp_path, folder, controlnet):
    controlnet.half().save_pretrained(folder / "ControlNetModel")  # as published by InstantID
    out = tmp_path / "facesnap.safetensors"
    for given, dtypes in ((None, (torch.float32, torch.float16)), (torch.bfloat16, (torch.bfloat16, torch.bfloat16))):
        from_instantid(folder, out, dtype=given)
        weights = facesnap_file.load(out)
        for network, dtype in zip((weights.mixer, weights.ffrnet), dtypes):
            assert {parameter.dtype for parameter in network.parameters()} == {dtype}


def test_without_a_config_the_given_sizes_are_used(tmp_path, folder):
    (folder / "ControlNetModel" / "config.json").unlink()
    out = tmp_path / "facesnap.safetensors"
    assert main(["init", "--instantid", str(folder), "--out", str(out), "--head-dim", "16", "--size-dim", "8"]) == 0
    assert facesnap_file.read_info(out).ffrnet == tiny.config()


def test_equal_seeds_give_equal_files_and_keep_the_global_random_state(tmp_path, folder):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        from_instantid(folder, tmp_path / name, seed=seed)
    assert torch.equal(torch.rand(1), expected)
    a, b, c = (load_file(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert {key.split(".")[1] for key in a if not torch.equal(a[key], c[key])} == {"project_clip", "clip_layers"}


def test_files_without_a_mixer_kind_have_the_papers_mixer(tmp_path):
    config = MixerConfig(id_dim=12, clip_dim=10, dim=tiny.CONTEXT, id_tokens=5, layers=1, feedforward=64, heads=4)
    ffrnet, path = tiny.ffrnet(), tmp_path / "old.safetensors"
    info = facesnap_file.FaceSnapInfo(config, ffrnet.config)
    facesnap_file.save(path, info, facesnap_file.build_mixer(config), ffrnet)
    metadata = info.to_metadata()
    assert metadata.pop("mixer_kind") == "facial attributes"
    save_file(load_file(path), path, metadata)
    assert facesnap_file.load(path).info == info


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("facial attributes", r"metadata of facesnap\.safetensors is damaged"),
        ("id only, or not", r"facesnap\.safetensors has a Mixer of the unknown kind 'id only, or not'; .*resampler"),
    ],
)
def test_wrong_and_unknown_mixer_kinds_are_rejected(tmp_path, folder, kind, message):
    path = tmp_path / "facesnap.safetensors"
    from_instantid(folder, path)
    save_file(load_file(path), path, facesnap_file.read_info(path).to_metadata() | {"mixer_kind": kind})
    with pytest.raises(FaceSnapError, match=message):
        facesnap_file.load(path)


def adapter_without(*parts):
    return lambda folder: save_adapter(
        folder, {key: tensor for key, tensor in image_proj().items() if not key.endswith(parts)}
    )


def controlnet_without(*parts):
    def damage(folder):
        path = folder / "ControlNetModel" / "diffusion_pytorch_model.safetensors"
        save_file({key: tensor for key, tensor in load_file(path).items() if not key.startswith(parts)}, path)

    return damage


def config_with(**values):
    def damage(folder):
        path = folder / "ControlNetModel" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "ip-adapter.bin").unlink(), r"no file .*ip-adapter\.bin; enter InstantID's folder"),
        (
            lambda f: (f / "ControlNetModel").rename(f / "other"),
            r"no file .*ControlNetModel/.*; enter InstantID's folder",
        ),
        (
            lambda f: write(f / "ControlNetModel/diffusion_pytorch_model.safetensors", KINDS["SD15_CONTROLNET"]),
            r"diffusion_pytorch_model\.safetensors is an SD1\.5 ControlNet, not an SDXL ControlNet",
        ),
        (
            lambda f: write(f / "ip-adapter.bin", KINDS["IP_ADAPTER"], "torch"),
            r"ip-adapter\.bin is an IP-Adapter, not InstantID's adapter",
        ),
        (lambda f: save_adapter(f, image_proj(dim=56)), "tokens of width 56, but .* takes 48"),
        (adapter_without("1.0.norm2.bias"), r"ip-adapter\.bin is incomplete or damaged .*layers\.1\.0\.norm2\.bias"),
        (adapter_without("proj_out.weight"), r"ip-adapter\.bin is incomplete or damaged .*proj_out\.weight"),
        (controlnet_without("controlnet_mid_block"), r"diffusion_pytorch_model\.safetensors is incomplete or damaged"),
        (controlnet_without("conv_in.weight"), r"diffusion_pytorch_model\.safetensors is incomplete or damaged"),
        (lambda f: (f / "ControlNetModel/config.json").write_text("{"), r"config\.json is damaged"),
        (config_with(attention_head_dim=None, num_attention_heads=None), r"config\.json is damaged"),
        (config_with(num_attention_heads="many"), r"config\.json is damaged"),
    ],
)
def test_unusable_files_are_reported_in_one_sentence(tmp_path, folder, damage, message):
    damage(folder)
    with pytest.raises(FaceSnapError, match=message) as caught:
        from_instantid(folder, tmp_path / "out" / "facesnap.safetensors")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "other",
    [
        {"_class_name": "T2IAdapter", "channels": [320]},
        {"_class_name": "ControlNetModel", "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8},
        {"model_type": "clip_vision_model"},
    ],
    ids=["T2I-Adapter", "SD1.5 ControlNet", "CLIP"],
)
def test_config_of_another_network_is_ignored(tmp_path, folder, other):
    """A WebUI keeps all ControlNets in one flat folder."""
    (folder / "ControlNetModel" / "config.json").write_text(json.dumps(other))
    out = tmp_path / "facesnap.safetensors"
    from_instantid(folder, out, head_dim=16, size_dim=8)
    assert facesnap_file.read_info(out).ffrnet == tiny.config()


def test_pickle_with_code_is_rejected_and_not_executed(tmp_path, folder):
    class Boom:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"image_proj": image_proj(), "ip_adapter": {"1.to_k_ip.weight": Boom()}}, folder / "ip-adapter.bin")
    with pytest.raises(FaceSnapError, match=r"ip-adapter\.bin contains .* besides its tensors"):
        from_instantid(folder, tmp_path / "facesnap.safetensors")
    assert not (tmp_path / "executed").exists()


def test_init_requires_exactly_one_source(tmp_path, folder, capsys):
    for sources in ([], ["sdxl.safetensors", "--instantid", str(folder)]):
        with pytest.raises(SystemExit):
            main(["init", *sources, "--out", str(tmp_path / "x")])
    assert "--instantid" in capsys.readouterr().err


def test_trained_file_is_loaded(tmp_path, folder):
    out = tmp_path / "facesnap.safetensors"
    from_instantid(folder, out)
    weights = facesnap_file.load(out)
    trained = tiny.randomise(ResamplerMixer(weights.info.mixer))
    facesnap_file.save(out, weights.info, trained, weights.ffrnet)
    loaded = facesnap_file.load(out).mixer
    embeddings, clip_tokens = torch.randn(1, 2, 512), torch.randn(1, 2, 5, 1280)
    assert torch.equal(loaded(embeddings, clip_tokens), trained(embeddings, clip_tokens))


def layouts():
    """Where users put InstantID's files in the model folder: (folder of the ControlNet, folder of the adapter)."""
    return [
        ("ControlNetModel", "."),
        ("InstantID/ControlNetModel", "InstantID"),
        (".", "."),
        ("InstantID", "InstantID"),
    ]


@pytest.mark.parametrize("layout", layouts(), ids=["repository", "folder", "flat", "flat folder"])
@pytest.mark.parametrize("renamed", [False, True])
def test_published_files_are_one_choice_in_any_layout(tmp_path, folder, layout, renamed):
    models = tmp_path / "facesnap"
    controlnet_folder, adapter_folder = (models / part for part in layout)
    for path in (controlnet_folder, adapter_folder):
        path.mkdir(parents=True, exist_ok=True)
    names = ("control.safetensors", "face.bin") if renamed else (IDENTITYNET.split("/")[1], ADAPTER)
    pair = (controlnet_folder / names[0], adapter_folder / names[1])
    shutil.copy(folder / IDENTITYNET, pair[0])
    shutil.copy(folder / "ControlNetModel" / "config.json", controlnet_folder)
    shutil.copy(folder / ADAPTER, pair[1])
    files = find_models(models)
    assert files.facesnap == {"InstantID": pair}
    assert files.choose_facesnap() == files.choose_facesnap("InstantID") == pair
    assert files.clip is None  # a CLIP folder has a config.json, too
    assert files.passed_over == []
    assert load_any(pair).info.ffrnet == tiny.config()


def test_none_of_several_controlnets_is_chosen(tmp_path, folder):
    for count, found in ((0, "none"), (2, r".*a\.safetensors, .*b\.safetensors")):
        models = tmp_path / str(count)
        models.mkdir()
        shutil.copy(folder / ADAPTER, models)
        for name in "ab"[:count]:
            shutil.copy(folder / IDENTITYNET, models / f"{name}.safetensors")
        files = find_models(models)
        assert files.facesnap == {}
        with pytest.raises(FaceSnapError, match=rf"ip-adapter\.bin is InstantID's adapter .*\(found: {found}\)"):
            files.choose_facesnap()


def test_published_pair_gives_instantids_tokens_residuals_and_null_tokens(folder, controlnet):
    weights = load(folder / IDENTITYNET, folder / ADAPTER)
    assert (weights.info.text_free, weights.info.hint, weights.info.null_identity) == (False, "5 points", True)
    assert weights.info.mixer.clip_dim == 0
    assert weights.info.adapter == AdapterConfig((64,), tiny.CONTEXT)
    g = torch.Generator().manual_seed(0)
    embedding = torch.randn(1, 1, 512, generator=g)
    tokens, null = (weights.mixer(value) for value in (embedding, torch.zeros(1, 1, 512)))
    # as in the pipeline: image_proj of zeros and the embedding in one batch, the unconditional row first
    both = instantid_resampler(image_proj(), torch.cat([torch.zeros(1, 1, 512), embedding]))
    torch.testing.assert_close(torch.cat([null, tokens]), both, atol=1e-5, rtol=1e-5)

    points = Landmarks(np.random.default_rng(0).uniform(20, 100, (72, 2)).astype(np.float32), 128, 128)
    conditioning = Conditioning(
        weights.ffrnet,
        tokens,
        points,
        text_free=weights.info.text_free,
        hint=weights.info.hint,
        uncond_tokens=null,
    )
    x, timesteps = torch.randn(1, 4, 16, 16, generator=g).repeat(2, 1, 1, 1), torch.tensor([871.0, 871.0])
    text, sizes = torch.randn(2, tiny.ADM - 48, generator=g), torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2)
    picture = landmark_image(points, 128, 128, "5 points").repeat(2, 1, 1, 1)
    with torch.no_grad():
        down, middle = controlnet(
            x, timesteps, both, picture, added_cond_kwargs={"text_embeds": text, "time_ids": sizes}, return_dict=False
        )
    y = torch.cat([text, sinusoid(sizes.flatten(), 8).view(2, -1)], 1)
    expected = [*down, middle]
    assert (expected[-1][0] - expected[-1][1]).abs().max() > 1e-3
    # rows together, separately, and in reverse order
    for calls in ([[0, 1]], [[1], [0]], [[1, 0]], [[0], [1], [0, 1]]):
        residuals = Residuals((conditioning,))
        for rows in calls:
            got = residuals.rows(x[rows], timesteps[rows], [row == 1 for row in rows], y[rows])
            for own, other in zip(got, expected, strict=True):
                torch.testing.assert_close(own, other[rows], atol=1e-4, rtol=1e-4)
