"""Published files of rivals: recognised by their tensors, and applied like the published code or refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.clip import load_image_encoder
from facesnap_ext.identity.faces import Face
from facesnap_ext.networks.adapter import Adapter, AdapterConfig
from facesnap_ext.photos import Photo
from facesnap_ext.weights.model_files import ModelFiles
from facesnap_ext.weights.tensors import shapes_of
from facesnap_lab.rivals.attention import Injection, injected, keys_values, lora_name
from facesnap_lab.rivals.published.ip_adapter import (
    FACEID,
    FACEID_PLUS,
    PLUS,
    PORTRAIT,
    IPAdapterFile,
    aligned_face,
    attention_shapes,
    black_tokens,
)
from facesnap_lab.rivals.published.method import Sampling
from facesnap_lab.rivals.published.photomaker import PhotoMakerFile, photo_pixels
from tests.facesnap_lab.rivals import published_files
from tests.facesnap_lab.rivals.published_files import ID_DIM, VISION, write
from tests.facesnap_lab.rivals.test_ip_adapter import TOLERANCE, plus_names
from tests.facesnap_lab.rivals.test_ip_adapter import copy as copy_weights
from tests.support import tiny
from tests.support.weight_files import KINDS
from tests.support.weight_files import write as write_kind

PROMPT = "a photo of person red"
GUIDED = Sampling(steps=2, guided=True)


@pytest.fixture(scope="module")
def pipe():
    pipe = published_files.small_sdxl()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> ModelFiles:
    """A model folder with a CLIP."""
    folder = tmp_path_factory.mktemp("models")
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tiny.randomise(CLIPVisionModel(CLIPVisionConfig(**size, image_size=28, patch_size=14))).save_pretrained(folder)
    return ModelFiles(folder, clip=folder)


@pytest.fixture(scope="module")
def faces() -> list[Face]:
    random = np.random.default_rng(0)
    template = np.float32([[38, 52], [74, 52], [56, 72], [42, 92], [71, 92]])
    return [
        Face(
            photo=Photo(random.integers(0, 256, (120, 96, 3)).astype(np.uint8), "photo"),
            box=np.float32([20, 20, 80, 100]),
            keypoints=template * scale,
            embedding=(9 * random.standard_normal(ID_DIM)).astype(np.float32),
            score=1.0,
            padded=False,
            detector_size=640,
        )
        for scale in (0.8, 0.7)
    ]


def latents(pipe, steps: int = 2, scale: float = 2.0, **arguments) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = {"width": 32, "height": 32, "num_inference_steps": steps, "guidance_scale": scale}
    return pipe(**arguments, **sizes, generator=generator, output_type="latent").images


def identity_tokens(layout: str, path_name: str, faces, files) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [1,R×T,C] of the unconditional and the conditional row, computed one reference at a time."""
    module, rows = published_files.projection(layout), []
    clip = load_image_encoder(files.clip)
    for shown in (False, True):
        tokens = []
        for face in faces:
            embedding = torch.from_numpy(face.embedding)[None] * shown
            if "unnorm" not in path_name and shown:
                embedding = embedding / embedding.norm()
            crop = aligned_face(face) if layout == FACEID_PLUS else face.crop
            seen = clip([crop]) if shown else black_tokens(clip)
            if layout == PLUS:
                tokens.append(module(seen))
            elif layout == FACEID_PLUS:  # version 2: the perceiver's output is added to the embedding's tokens
                tokens.append(module.face(embedding) + module(embedding, seen))
            else:
                tokens.append(module(embedding))
        rows.append(torch.cat(tokens, dim=1))
    return rows[0], rows[1]


@torch.no_grad()
@pytest.mark.parametrize(
    ("layout", "name", "scale"),
    [
        (FACEID, "a.bin", 2.0),
        (PORTRAIT, "a.bin", 2.0),
        (PORTRAIT, "ip-adapter-faceid-portrait_sdxl_unnorm.bin", 2.0),
        (FACEID_PLUS, "a.bin", 2.0),
        (PLUS, "a.safetensors", 2.0),
        (PLUS, "a.safetensors", 1.0),
    ],
)
def test_ip_adapter_is_the_labs_attention_with_the_files_weights(pipe, files, faces, layout, name, scale, tmp_path):
    tensors = published_files.ip_adapter(layout, pipe.unet)
    method = IPAdapterFile.recognise(write(tmp_path / name, tensors), pipe.unet)
    assert method.title == f"IP-Adapter {layout}"
    assert method.recognition == ("" if layout == PLUS else "w600k_r50.onnx")
    before = latents(pipe, scale=scale, prompt=PROMPT)
    with method.installed(pipe, files) as prepare:
        actual = latents(pipe, scale=scale, **prepare(faces, PROMPT, Sampling(2, scale > 1)))
    assert torch.equal(latents(pipe, scale=scale, prompt=PROMPT), before)

    attention = {key.removeprefix("ip_adapter."): tensor for key, tensor in tensors.items() if ".to_" in key}
    own = {key: tensor for key, tensor in attention.items() if key.endswith("_ip.weight")}
    adapter = Adapter(AdapterConfig.from_shapes(shapes_of(own)))
    adapter.load_state_dict(own)
    lora = {
        lora_name(layer.removesuffix(".processor"), {"to_out": "to_out.0"}.get(part, part)): (
            attention[f"{i}.{part}_lora.down.weight"],
            attention[f"{i}.{part}_lora.up.weight"],
        )
        for i, layer in enumerate(pipe.unet.attn_processors if method.rank else ())
        for part in ("to_q", "to_k", "to_v", "to_out")
    }
    null, conditional = (
        Injection(torch.zeros(1, 1, 1), keys_values(adapter, tokens), lora)
        for tokens in identity_tokens(layout, name, faces, files)
    )
    with injected(pipe, null, conditional):
        expected = latents(pipe, scale=scale, prompt=PROMPT)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
    assert (actual - before).abs().max() > 0.1


def test_attention_tensors_of_full_size_are_the_published_ones():
    """InstantID's adapter and ip-adapter-faceid-portrait_sdxl.bin (749,822,515 bytes in half precision) have them."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
    shapes = attention_shapes(unet, rank=0)
    numbers = sum(np.prod(shape) for shape in shapes.values())
    assert (len(shapes), numbers) == (140, 340_787_200)
    projection = sum(parameter.numel() for parameter in published_files.FaceProjection(512, 16, 2048).parameters())
    assert 0 < 749_822_515 - 2 * (numbers + projection) < 20_000  # names and sizes


def test_aligned_face_has_the_points_of_the_template_at_twice_its_size(faces):
    """insightface's template for 112 pixels, ARCFACE_DST. Its crop of 112 pixels has no offset."""
    template = 2 * np.float32([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655]])
    template = np.concatenate([template, [[141.4598, 184.4082]]]).round()
    photo = np.zeros((300, 300, 3), np.uint8)
    for x, y in template.astype(int) + 30:
        photo[y, x] = 255
    found = aligned_face(replace(faces[0], photo=Photo(photo, "dots"), keypoints=template + 30))
    assert found.shape == (224, 224, 3)
    for x, y in template.astype(int):
        assert found[y - 1 : y + 2, x - 1 : x + 2].max() > 60
    assert (found > 0).any(-1).sum() < 100


def stretched(pipe, prompt: str, times: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and pooled text of a prompt with a repeated class word."""
    context, _, pooled, _ = pipe.encode_prompt(prompt.replace("person", " ".join(["person"] * times)))
    return context, pooled


def fused(tensors, words: torch.Tensor, identities: torch.Tensor) -> torch.Tensor:
    """The fusion of PhotoMaker's section 3.2, with a residual connection around the second MLP."""

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], *(tensors[f"id_encoder.fuse_module.{name}.{part}"] for part in PARTS))

    def mlp(name, x):
        for layer in ("fc1", "fc2"):
            x = norm(f"{name}.layernorm", x) if layer == "fc1" else F.gelu(x)
            x = F.linear(x, *(tensors[f"id_encoder.fuse_module.{name}.{layer}.{part}"] for part in PARTS))
        return x

    x = words + mlp("mlp1", torch.cat([words, identities], dim=-1))
    return norm("layer_norm", x + mlp("mlp2", x))


PARTS = ("weight", "bias")


def identities_of(version: int, tensors, faces) -> torch.Tensor:
    """Identity tokens [R×T,C], computed by transformers and diffusers."""
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval()
    encoder = {key.removeprefix("id_encoder."): tensor for key, tensor in tensors.items()}
    clip.load_state_dict({key: encoder[key] for key in clip.state_dict()})
    pixels = torch.cat([photo_pixels(face.photo.pixels, 28) for face in faces])
    out = clip.vision_model(pixel_values=pixels)
    if version == 1:
        return torch.cat([clip(pixels).image_embeds, out.pooler_output @ encoder["visual_projection_2.weight"].T], -1)
    reference = IPAdapterFaceIDPlusImageProjection(
        tiny.CONTEXT, tiny.CONTEXT, 64, ID_DIM, dim_head=128, heads=1, num_tokens=2, ffproj_ratio=4
    )
    prefix = "qformer_perceiver.perceiver_resampler."
    names = {f"{prefix}{key}": name for key, name in plus_names(4).items()}
    token = "qformer_perceiver.token_"
    names |= {f"{token}proj.0.": "proj.net.0.proj.", f"{token}proj.2.": "proj.net.2.", f"{token}norm.": "norm."}
    own = torch.nn.Module()
    own.state_dict = lambda: {key: tensor for key, tensor in encoder.items() if key.startswith("qformer")}
    copy_weights(own, reference, names, split=".0.to_kv.", strip=prefix)
    reference.clip_embeds, reference.shortcut = out.last_hidden_state[:, None], True
    return reference(torch.from_numpy(np.stack([face.embedding for face in faces]))).flatten(0, 1)


def unet_texts(seen: list, module, args, kwargs) -> None:
    seen.append((kwargs["encoder_hidden_states"], kwargs["added_cond_kwargs"]["text_embeds"]))


@torch.no_grad()
@pytest.mark.parametrize(("version", "scale"), [(1, 2.0), (2, 2.0), (2, 1.0)])
def test_photomaker_fuses_the_class_word_after_a_fifth_of_the_steps(pipe, files, faces, version, scale, tmp_path):
    tensors = published_files.photomaker(version, pipe.unet)
    method = PhotoMakerFile.recognise(write(tmp_path / "a.bin", tensors), pipe.unet)
    assert (method.title, method.recognition) == (("PhotoMaker", ""), ("PhotoMaker V2", "w600k_r50.onnx"))[version - 1]
    before = latents(pipe, prompt=PROMPT)
    seen: list = []
    with method.installed(pipe, files) as prepare:
        handle = pipe.unet.register_forward_pre_hook(partial(unet_texts, seen), with_kwargs=True)
        arguments = prepare(faces, PROMPT, Sampling(6, scale > 1))
        actual = latents(pipe, steps=6, scale=scale, **arguments)
        handle.remove()
    assert torch.equal(latents(pipe, prompt=PROMPT), before)

    plain, null, plain_pooled, null_pooled = pipe.encode_prompt(PROMPT)
    count = len(faces) * version
    context, pooled = stretched(pipe, PROMPT, count)
    context[0, 4 : 4 + count] = fused(tensors, context[0, 4 : 4 + count], identities_of(version, tensors, faces))
    rows = [null, null_pooled] if scale > 1 else [null[:0], null_pooled[:0]]
    for step, found in enumerate(seen):
        expected = (plain, plain_pooled) if step <= 1 else (context, pooled)  # int(0.2 × 6) = 1
        for part, value, row in zip(found, expected, rows):
            torch.testing.assert_close(part, torch.cat([row, value]), **TOLERANCE)

    names = [name.removesuffix(".processor") for name in pipe.unet.attn_processors]
    lora = {
        lora_name(layer, {"to_out": "to_out.0"}.get(part, part)): tuple(
            [tensors[f"lora_weights.unet.{layer}.processor.{part}_lora.{way}.weight"] for way in ("down", "up")]
        )
        for layer in names
        for part in ("to_q", "to_k", "to_v", "to_out")
    }
    unchanged = Injection(torch.zeros(1, 1, 1), lora=lora)
    with injected(pipe, unchanged, unchanged):
        expected = latents(pipe, steps=6, scale=scale, **arguments)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("form", ["{}.lora.{}", "{}.{}"])
def test_photomakers_lora_may_have_any_of_diffusers_names(pipe, files, form, tmp_path):
    path = write(tmp_path / "a.safetensors", published_files.photomaker(1, pipe.unet, form))
    with PhotoMakerFile.recognise(path, pipe.unet).installed(pipe, files):
        assert pipe.get_active_adapters() == ["photomaker"]
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())


@pytest.mark.parametrize("shape", [(40, 30, 3), (31, 57, 3), (28, 28, 3), (300, 200, 3)])
def test_photos_are_preprocessed_like_transformers(shape):
    photo = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    expected = processor(photo, return_tensors="pt").pixel_values
    torch.testing.assert_close(photo_pixels(photo, 28), expected, atol=1e-5, rtol=1e-5)


def test_prompt_needs_a_word_for_the_person_and_room_for_the_photos(pipe, files, faces, tmp_path):
    path = write(tmp_path / "a.bin", published_files.photomaker(2, pipe.unet))
    method = PhotoMakerFile.recognise(path, pipe.unet)
    method.check_prompt(pipe, PROMPT)
    with pytest.raises(FaceSnapError, match="'a photo of red' has no word for the person"):
        method.check_prompt(pipe, "a photo of red")
    with (
        method.installed(pipe, files) as prepare,
        pytest.raises(FaceSnapError, match="no room for 5 reference photos"),
    ):
        prepare([faces[0]] * 5, PROMPT, GUIDED)


def without(tensors, end: str):
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(end)}


def test_photomaker_with_a_lora_for_other_layers_is_refused(pipe, files, tmp_path):
    tensors = published_files.photomaker(1, pipe.unet)
    moved = {key.replace(".mid_block.", ".down_blocks.7."): tensor for key, tensor in tensors.items()}
    method = PhotoMakerFile.recognise(write(tmp_path / "a.bin", moved), pipe.unet)
    with pytest.raises(FaceSnapError, match=r"a.bin is incomplete or damaged \(the LoRA changes 32 layers, of which"):
        method.installed(pipe, files).__enter__()


@pytest.mark.parametrize(
    ("method", "kind", "told"),
    [
        (IPAdapterFile, "IP_ADAPTER", "an IP-Adapter for CLIP's final embedding, which is not supported; use one of"),
        (
            IPAdapterFile,
            "INSTANTID_ADAPTER",
            r"is InstantID's adapter \(.*\), not an IP-Adapter; use one of",
        ),
        (IPAdapterFile, "UNKNOWN", "is a kind of file that FaceSnap does not know, not an IP-Adapter"),
        (PhotoMakerFile, "IP_ADAPTER", "is an IP-Adapter, not PhotoMaker; use photomaker-v1.bin or"),
        (PhotoMakerFile, "UNKNOWN", "is not PhotoMaker; use"),
    ],
)
def test_other_files_are_refused(pipe, method, kind, told, tmp_path):
    with pytest.raises(FaceSnapError, match=f"^ip-adapter-faceid_sdxl.bin .*{told}"):
        method.recognise(write_kind(tmp_path / "ip-adapter-faceid_sdxl.bin", KINDS[kind], "torch"), pipe.unet)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: without(tensors, "3.to_v_ip.weight"), r"ip_adapter.3.to_v_ip.weight is missing, expected \("),
        (lambda tensors: without(tensors, "0.to_q_lora.up.weight"), "0.to_q_lora.up.weight is missing"),
        (lambda tensors: tensors | {"ip_adapter.99.to_k_ip.weight": torch.zeros(3, 4)}, r"\(3, 4\), expected none"),
        (lambda tensors: tensors | {"ip_adapter.1.to_k_ip.weight": torch.zeros(64, 7)}, r"is \(64, 7\), expected \("),
    ],
)
def test_ip_adapter_for_a_different_base_is_refused(pipe, change, told, tmp_path):
    path = write(tmp_path / "a.bin", change(published_files.ip_adapter(FACEID, pipe.unet)))
    with pytest.raises(FaceSnapError, match=f"a.bin does not fit the base model .*{told}"):
        IPAdapterFile.recognise(path, pipe.unet)


@pytest.mark.parametrize(
    ("method", "make", "lacks"),
    [
        (IPAdapterFile, partial(published_files.ip_adapter, FACEID), "image_proj.proj.0.bias"),
        (IPAdapterFile, partial(published_files.ip_adapter, PLUS), "layers.2.1.3.weight"),
        (PhotoMakerFile, partial(published_files.photomaker, 1), "visual_projection_2.weight"),
        (PhotoMakerFile, partial(published_files.photomaker, 1), "pre_layrnorm.bias"),
        (PhotoMakerFile, partial(published_files.photomaker, 2), "token_norm.bias"),
        (PhotoMakerFile, partial(published_files.photomaker, 2), "attn2.processor.to_v_lora.up.weight"),
    ],
)
def test_incomplete_files_are_refused_and_leave_the_pipeline_as_before(pipe, files, method, make, lacks, tmp_path):
    before = latents(pipe, prompt=PROMPT)
    opened = method.recognise(write(tmp_path / "a.bin", without(make(pipe.unet), lacks)), pipe.unet)
    with (
        pytest.raises(FaceSnapError, match=r"a.bin is incomplete or damaged .*; download it again"),
        opened.installed(pipe, files),
    ):
        pass
    assert torch.equal(latents(pipe, prompt=PROMPT), before)


def test_clip_of_a_different_width_is_refused(pipe, files, tmp_path):
    tensors = published_files.ip_adapter(PLUS, pipe.unet)
    tensors["image_proj.proj_in.weight"] = torch.zeros(tiny.CONTEXT, 40)
    method = IPAdapterFile.recognise(write(tmp_path / "a.bin", tensors), pipe.unet)
    with pytest.raises(FaceSnapError, match=r"takes CLIP tokens of width 40, but .* computes 32; put CLIP-ViT-H"):
        method.installed(pipe, files).__enter__()


def test_photomaker_for_a_different_base_is_refused(pipe, tmp_path):
    tensors = published_files.photomaker(1, pipe.unet) | {"id_encoder.fuse_module.layer_norm.weight": torch.ones(32)}
    with pytest.raises(FaceSnapError, match=r"a.bin does not fit the base model .* use an SDXL model as the base"):
        PhotoMakerFile.recognise(write(tmp_path / "a.bin", tensors), pipe.unet)


@pytest.mark.parametrize(
    ("method", "make"),
    [
        (IPAdapterFile, partial(published_files.ip_adapter, FACEID)),
        (PhotoMakerFile, partial(published_files.photomaker, 1)),
    ],
)
def test_a_lora_is_not_left_out_without_peft(pipe, method, make, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.USE_PEFT_BACKEND", False)
    with pytest.raises(FaceSnapError, match=r"a.bin contains a LoRA, which diffusers loads with peft; run"):
        method.recognise(write(tmp_path / "a.bin", make(pipe.unet)), pipe.unet)
