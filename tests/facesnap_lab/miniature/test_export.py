"""The exported checkpoint compared with diffusers' converters, LDM's UNet and VAE, and open_clip's text tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights.initialise import encoder_key
from facesnap_ext.weights.recognise import Kind, recognise
from facesnap_ext.weights.tensors import read_tensors
from facesnap_lab.miniature import words
from facesnap_lab.miniature.captions import WORDS
from facesnap_lab.miniature.export import CLIP_BEGIN, CLIP_END, CLIP_IDS, CLIP_PAD, export
from facesnap_lab.miniature.sdxl_layout import vae_tensors
from tests.support import tiny

PROMPT = "portrait of a smiling person , red background"
TEXT = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "max_position_embeddings": words.LENGTH}


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    ids, special = words.vocabulary()[0], words.vocabulary_ids()
    text = TEXT | {"vocab_size": len(ids), "bos_token_id": special[words.BEGIN], "eos_token_id": special[words.END]}
    networks = {
        "unet": UNet2DConditionModel(
            **{**tiny.DIFFUSERS, "transformer_layers_per_block": 1, "cross_attention_dim": 64},
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            sample_size=16,
        ),
        "vae": AutoencoderKL(
            block_out_channels=(32, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=8,
            scaling_factor=0.7,
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text, num_hidden_layers=2)),
        "text_encoder_2": CLIPTextModelWithProjection(
            CLIPTextConfig(**text, num_hidden_layers=3, hidden_act="gelu", projection_dim=20)
        ),
    }
    return {name: tiny.randomise(network, seed) for seed, (name, network) in enumerate(networks.items())}


@pytest.fixture(scope="module")
def miniature(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    for name, network in parts.items():
        network.save_pretrained(folder / name)
    words.write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def checkpoint(miniature: Path) -> Path:
    path = miniature.parent / "small.safetensors"
    export(miniature, path)
    return path


@pytest.fixture(scope="module")
def settings(checkpoint: Path) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.load(checkpoint.with_suffix(".yaml")).model.params


def test_export_is_recognised_as_an_sdxl_checkpoint(checkpoint: Path) -> None:
    assert recognise(checkpoint) is Kind.SDXL


def same(converted: dict[str, Tensor], network: nn.Module) -> None:
    expected = network.state_dict()
    assert converted.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(converted[key], tensor, rtol=0, atol=0, msg=key)


def test_diffusers_converters_restore_the_tensors(checkpoint: Path, parts: dict[str, Any]) -> None:
    from diffusers.loaders import single_file_utils as diffusers

    same(diffusers.convert_ldm_unet_checkpoint(read_tensors(checkpoint), parts["unet"].config), parts["unet"])
    vae = tiny.randomise(type(parts["vae"]).from_config(parts["vae"].config, norm_num_groups=32))
    same(diffusers.convert_ldm_vae_checkpoint(vae_tensors(vae.state_dict(), vae.config), vae.config), vae)


def test_training_can_start_from_the_exported_encoder(checkpoint: Path, parts: dict[str, Any]) -> None:
    rename = encoder_key({key: tuple(tensor.shape) for key, tensor in read_tensors(checkpoint).items()})
    unet = parts["unet"].state_dict()
    encoder = read_tensors(checkpoint, rename)
    assert len(encoder) > 100
    assert all(torch.equal(tensor, unet[key]) for key, tensor in encoder.items())


@torch.no_grad()
def test_ldm_unet_gives_the_same_prediction(checkpoint: Path, settings: Any, parts: dict[str, Any]) -> None:
    ldm = pytest.importorskip("ldm.modules.diffusionmodules.openaimodel", reason="stable-diffusion-sdkit is missing")
    sizes = dict(settings.network_config.params)
    assert set(sizes.pop("transformer_depth")) == {1}, "this older UNet accepts only one depth for all levels"
    added, _ = sizes.pop("adm_in_channels"), sizes.pop("spatial_transformer_attn_type")
    unet = ldm.UNetModel(image_size=32, **sizes | {"num_classes": 1}).eval()
    width = unet.time_embed[2].out_features
    unet.label_emb = nn.Sequential(nn.Sequential(nn.Linear(added, width), nn.SiLU(), nn.Linear(width, width)))
    unet.load_state_dict(under("model.diffusion_model.", checkpoint))

    g = torch.Generator().manual_seed(0)
    x, context, pooled = (torch.randn(shape, generator=g) for shape in ((2, 4, 16, 16), (2, 77, 64), (2, 20)))
    timesteps, time_ids = torch.tensor([40.0, 700.0]), torch.tensor([[128.0, 96, 0, 8, 128, 96]]).repeat(2, 1)
    sizes = parts["unet"].add_time_proj(time_ids.flatten()).reshape(2, -1)
    predicted = unet(x, timesteps, context, torch.cat([pooled, sizes], 1))
    added_cond = {"text_embeds": pooled, "time_ids": time_ids}
    expected = parts["unet"](x, timesteps, context, added_cond_kwargs=added_cond).sample
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_ldm_vae_encodes_and_decodes_identically(checkpoint: Path, settings: Any, parts: dict[str, Any]) -> None:
    """LDM's VAE has 32 normalisation groups, the miniature's has 8."""
    ldm = pytest.importorskip("ldm.modules.diffusionmodules.model", reason="stable-diffusion-sdkit is missing")
    sizes = {**settings.first_stage_config.params.ddconfig, "attn_type": "vanilla"}
    vae = nn.ModuleDict(
        {
            "encoder": ldm.Encoder(**sizes),
            "decoder": ldm.Decoder(**sizes),
            "quant_conv": nn.Conv2d(8, 8, 1),
            "post_quant_conv": nn.Conv2d(4, 4, 1),
        }
    ).eval()
    vae.load_state_dict(under("first_stage_model.", checkpoint))
    g = torch.Generator().manual_seed(0)
    picture, latent = torch.rand(1, 3, 64, 64, generator=g) * 2 - 1, torch.randn(1, 4, 16, 16, generator=g)
    moments = vae["quant_conv"](vae["encoder"](picture))
    torch.testing.assert_close(moments, parts["vae"].encode(picture).latent_dist.parameters, rtol=1e-4, atol=1e-5)
    decoded = vae["decoder"](vae["post_quant_conv"](latent))
    torch.testing.assert_close(decoded, parts["vae"].decode(latent).sample, rtol=1e-4, atol=1e-5)
    assert settings.scale_factor == 0.7


def test_config_takes_its_sizes_from_diffusers_configs(settings: Any) -> None:
    unet, conditioner = settings.network_config.params, settings.conditioner_config.params.emb_models
    assert (unet.model_channels, unet.channel_mult, unet.num_res_blocks) == (32, [1, 2, 3], 2)
    assert (unet.attention_resolutions, unet.num_head_channels) == ([2, 4], 16)
    assert (unet.context_dim, unet.adm_in_channels) == (64, tiny.ADM)
    assert conditioner[0].params.layer_idx == 1
    assert [embedder.params.outdim for embedder in conditioner[2:]] == [8, 8, 8]


def test_files_of_the_first_text_encoder_are_complete(miniature: Path, settings: Any) -> None:
    folder = Path(settings.conditioner_config.params.emb_models[0].params.version)
    assert json.loads((folder / "config.json").read_text()) == json.loads(
        (miniature / "text_encoder" / "config.json").read_text()
    )
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert vocabulary == words.vocabulary_ids(), "complete words and special tokens only"
    assert (folder / "merges.txt").read_text() == (miniature / "tokenizer" / "merges.txt").read_text()


def test_tensors_of_the_first_text_encoder_are_unchanged(checkpoint: Path, parts: dict[str, Any]) -> None:
    tensors = under("conditioner.embedders.0.transformer.text_model.", checkpoint)
    same(tensors, getattr(parts["text_encoder"], "text_model", parts["text_encoder"]))


@torch.no_grad()
def test_second_text_encoder_accepts_clip_ids(checkpoint: Path, settings: Any, parts: dict[str, Any]) -> None:
    known = words.vocabulary_ids()
    prompt = PROMPT.split()
    own = [known[words.BEGIN], *(known[f"{word}</w>"] for word in prompt), known[words.END]]
    clips = [CLIP_BEGIN, *(CLIP_IDS[word] for word in prompt), CLIP_END]
    own += [known[words.END]] * (words.LENGTH - len(own))
    clips += [CLIP_PAD] * (words.LENGTH - len(clips))
    expected = parts["text_encoder_2"](torch.tensor([own]), output_hidden_states=True)

    arch = json.loads(Path(settings.sampler_config.params.path).read_text())["text_cfg"]
    tensors = under("conditioner.embedders.1.model.", checkpoint)
    context, pooled = open_clip_text(tensors, torch.tensor(clips), arch["layers"], arch["heads"])
    torch.testing.assert_close(context, expected.hidden_states[-2][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, expected.text_embeds[0], rtol=1e-4, atol=1e-5)


def test_second_text_encoder_treats_other_words_as_unknown(checkpoint: Path, parts: Any) -> None:
    table = under("conditioner.embedders.1.model.", checkpoint)["token_embedding.weight"]
    unknown = parts["text_encoder_2"].get_input_embeddings().weight[words.vocabulary_ids()[words.UNKNOWN]]
    assert table.shape[0] == 49408
    assert torch.equal(table[2368], unknown), "cat"


def test_clip_has_a_token_for_every_word() -> None:
    assert set(WORDS) <= set(CLIP_IDS)
    assert len(set(CLIP_IDS.values())) == len(CLIP_IDS)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", {"block_out_channels": [64, 96, 128]}),
        ("unet", {"attention_head_dim": [2, 4, 4]}),
        ("unet", {"cross_attention_dim": 32}),
        ("unet", {"addition_embed_type": None}),
        ("unet", {"addition_time_embed_dim": 16}),
        ("vae", {"latent_channels": 8}),
        ("text_encoder", {"max_position_embeddings": 32}),
        ("text_encoder_2", {"intermediate_size": 64}),
    ],
)
def test_settings_that_the_layout_cannot_express_are_rejected(
    miniature: Path, tmp_path: Path, part: str, change: dict[str, Any]
) -> None:
    for folder in miniature.iterdir():
        (tmp_path / folder.name).mkdir()
        for file in folder.iterdir():
            (tmp_path / folder.name / file.name).symlink_to(file)
    config = tmp_path / part / "config.json"
    settings = json.loads(config.read_text()) | change
    config.unlink()
    config.write_text(json.dumps(settings))
    with pytest.raises(FaceSnapError, match=r"^The miniature cannot be written as an SDXL checkpoint: [^\n]*\.$"):
        export(tmp_path, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("out*"))


def test_missing_part_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FaceSnapError, match=r"unet.config\.json"):
        export(tmp_path, tmp_path / "out.safetensors")


def under(prefix: str, checkpoint: Path) -> dict[str, Tensor]:
    return read_tensors(checkpoint, lambda key: key.removeprefix(prefix) if key.startswith(prefix) else None)


def open_clip_text(tensors: dict[str, Tensor], ids: Tensor, layers: int, heads: int) -> tuple[Tensor, Tensor]:
    """Compute the text embedding like generative-models' FrozenOpenCLIPEmbedder2.

    Returns:
        The input of the last layer, and the projected output at the position of the largest id.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    x = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"]
    for layer in range(layers):
        before, block = x, f"transformer.resblocks.{layer}"
        attended = norm(x, f"{block}.ln_1")
        joint = F.linear(attended, tensors[f"{block}.attn.in_proj_weight"], tensors[f"{block}.attn.in_proj_bias"])
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in joint.chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        x = x + linear(mixed, f"{block}.attn.out_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return before, norm(x, "ln_final")[ids.argmax()] @ tensors["text_projection"]
