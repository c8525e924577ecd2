"""CLIP image tokens, compared with transformers and with a reference implementation of open_clip."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.clip import MEAN, STD, load_image_encoder, preprocess

transformers = pytest.importorskip("transformers")


def crops(count: int = 2, size: int = 40) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (size + i, size + i, 3), dtype=np.uint8) for i in range(count)]


def vision_config(**changes):
    values = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 12,
        "hidden_act": "gelu",
    }
    return transformers.CLIPVisionConfig(**{**values, **changes})


def randomise(network: torch.nn.Module) -> torch.nn.Module:
    """Randomise norms and biases as well, so that every parameter affects the result."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


@pytest.fixture(params=["gelu", "quick_gelu"])
def model(request):
    torch.manual_seed(0)
    return randomise(transformers.CLIPVisionModelWithProjection(vision_config(hidden_act=request.param)))


def penultimate(model, images: list[np.ndarray]) -> torch.Tensor:
    """Return `hidden_states[-2]`, as used by IP-Adapter and others."""
    with torch.no_grad():
        return model(preprocess(images, model.config.image_size), output_hidden_states=True).hidden_states[-2]


def open_clip_tower(width: int, layers: int, mlp: int, patch: int = 8, grid: int = 4) -> dict[str, torch.Tensor]:
    """Return random tensors with the names of open_clip's `VisionTransformer`."""
    generator = torch.Generator().manual_seed(width)

    def randn(*shape: int, scale: float = 0.1) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator)

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + randn(width), f"{name}.bias": randn(width)}

    scale = width**-0.5
    tower = {
        "class_embedding": randn(width),
        "positional_embedding": randn(grid**2 + 1, width),
        "proj": randn(width, 12),
        "conv1.weight": randn(width, 3, patch, patch),
    }
    tower |= norm("ln_pre") | norm("ln_post")
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        tower |= norm(f"{block}.ln_1") | norm(f"{block}.ln_2")
        tower |= {
            f"{block}.attn.in_proj_weight": randn(3 * width, width, scale=2 * scale),
            f"{block}.attn.in_proj_bias": randn(3 * width),
            f"{block}.attn.out_proj.weight": randn(width, width, scale=scale),
            f"{block}.attn.out_proj.bias": randn(width),
            f"{block}.mlp.c_fc.weight": randn(mlp, width, scale=scale),
            f"{block}.mlp.c_fc.bias": randn(mlp),
            f"{block}.mlp.c_proj.weight": randn(width, mlp, scale=scale),
            f"{block}.mlp.c_proj.bias": randn(width),
        }
    return tower


def open_clip_tokens(tower: dict[str, torch.Tensor], pixels: torch.Tensor, heads: int, layers: int, act):
    """Reference implementation of open_clip's forward pass through the first `layers` layers."""
    width, patch = tower["conv1.weight"].shape[0], tower["conv1.weight"].shape[-1]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (width,), tower[f"{name}.weight"], tower[f"{name}.bias"])

    x = F.conv2d(pixels, tower["conv1.weight"], stride=patch).flatten(2).permute(0, 2, 1)
    x = torch.cat([tower["class_embedding"].expand(len(x), 1, width), x], 1) + tower["positional_embedding"]
    x = norm("ln_pre", x).permute(1, 0, 2)
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        y = norm(f"{block}.ln_1", x)
        weights = [tower[f"{block}.attn.{name}"] for name in ("in_proj_weight", "in_proj_bias")]
        out = [tower[f"{block}.attn.out_proj.{name}"] for name in ("weight", "bias")]
        y, _ = F.multi_head_attention_forward(y, y, y, width, heads, *weights, None, None, False, 0.0, *out)
        x = x + y
        y = F.linear(norm(f"{block}.ln_2", x), tower[f"{block}.mlp.c_fc.weight"], tower[f"{block}.mlp.c_fc.bias"])
        x = x + F.linear(act(y), tower[f"{block}.mlp.c_proj.weight"], tower[f"{block}.mlp.c_proj.bias"])
    return x.permute(1, 0, 2)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def save(path, tensors: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)


def test_transformers_folder_loads(model, tmp_path):
    model.save_pretrained(tmp_path)
    encoder = load_image_encoder(tmp_path)
    tokens = encoder(crops())
    assert tokens.shape == (2, 17, 24)
    assert (encoder.tokens, encoder.width, encoder.image_size) == (17, 24, 32)
    assert tokens.dtype == torch.float32
    assert not tokens.requires_grad
    torch.testing.assert_close(tokens, penultimate(model, crops()), rtol=1e-5, atol=1e-5)


def test_tokens_are_those_of_the_penultimate_layer(model, tmp_path):
    model.save_pretrained(tmp_path)
    tokens = load_image_encoder(tmp_path)(crops())
    with torch.no_grad():
        states = model(preprocess(crops(), 32), output_hidden_states=True).hidden_states
    assert len(states) == 4
    distances = [float((tokens - state).abs().max()) for state in states]
    assert np.argmin(distances) == 2
    assert min(distances[i] for i in (0, 1, 3)) > 0.1


def test_complete_clip_model_loads(tmp_path):
    text = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision_config().to_dict(), projection_dim=12
    )
    clip = randomise(transformers.CLIPModel(config))
    clip.save_pretrained(tmp_path)
    with torch.no_grad():
        vision = clip.vision_model(preprocess(crops(), 32), output_hidden_states=True)
    expected = vision.hidden_states[-2]
    torch.testing.assert_close(load_image_encoder(tmp_path)(crops()), expected, rtol=1e-5, atol=1e-5)
    # transformers before 4.35 writes a .bin file
    [file] = [path for path in tmp_path.iterdir() if "model" in path.name]
    torch.testing.assert_close(load_image_encoder(file)(crops()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["vision_model.", "", "image_encoder.vision_model."])
@pytest.mark.parametrize("name", ["clip_h.pth", "model.safetensors", "clip.bin", "clip.pt"])
def test_files_with_transformers_names_load(prefix, name, model, tmp_path):
    tensors = {key.removeprefix("vision_model."): value for key, value in model.state_dict().items()}
    tensors = {f"{prefix}{key}": value for key, value in tensors.items() if key.split(".")[0] != "visual_projection"}
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(17)[None]  # files of older versions contain this tensor
    save(tmp_path / name, tensors)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    tokens = load_image_encoder(tmp_path / name)(crops())
    torch.testing.assert_close(tokens, penultimate(model, crops()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["visual.", "", "model.visual."])
@pytest.mark.parametrize("name", ["clip_h.pth", "clip.safetensors"])
def test_files_with_open_clip_names_load(prefix, name, tmp_path):
    tower = open_clip_tower(width=128, layers=3, mlp=96)
    tensors = {f"{prefix}{key}": tensor for key, tensor in tower.items()}
    if prefix:  # complete open_clip files also contain the text encoder
        tensors |= {"token_embedding.weight": torch.zeros(5, 8), "positional_embedding": torch.zeros(7, 8)}
    save(tmp_path / name, tensors)
    encoder = load_image_encoder(tmp_path / name)
    expected = open_clip_tokens(tower, preprocess(crops(), 32), heads=2, layers=2, act=F.gelu)
    torch.testing.assert_close(encoder(crops()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "heads", "act"),
    [(1280, 16, F.gelu), (1408, 16, F.gelu), (1664, 16, F.gelu), (1024, 16, quick_gelu), (768, 12, quick_gelu)],
)
def test_heads_and_activation_of_known_widths(width, heads, act, tmp_path):
    """open_clip's ViT-H, ViT-g and ViT-bigG; OpenAI's ViT-L and ViT-B."""
    tower = open_clip_tower(width, layers=2, mlp=24, patch=8, grid=2)
    save(tmp_path / "clip.safetensors", tower)
    tokens = load_image_encoder(tmp_path / "clip.safetensors")(crops(1))
    expected = open_clip_tokens(tower, preprocess(crops(1), 16), heads, layers=1, act=act)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_config_of_another_model_is_ignored(tmp_path):
    tower = open_clip_tower(width=128, layers=3, mlp=96)
    save(tmp_path / "clip.safetensors", tower)
    expected = open_clip_tokens(tower, preprocess(crops(), 32), heads=2, layers=2, act=F.gelu)
    for config in (
        vision_config(hidden_size=256, num_attention_heads=8, hidden_act="quick_gelu").to_dict(),
        {"model_type": "t5", "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        tokens = load_image_encoder(tmp_path / "clip.safetensors")(crops())
        torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


def test_preprocessing_matches_transformers():
    name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    processor = getattr(transformers, name)(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images = [*crops(), np.asarray(Image.fromarray(crops()[0]).resize((9, 9)))]
    expected = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(preprocess(images, 32), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(MEAN, processor.image_mean)
    np.testing.assert_allclose(STD, processor.image_std)


def test_crops_must_be_square():
    with pytest.raises(ValueError, match="square"):
        preprocess([np.zeros((4, 5, 3), np.uint8)], 32)


def test_weights_are_converted_to_the_requested_type(model, tmp_path):
    model.half().save_pretrained(tmp_path)
    assert load_image_encoder(tmp_path)(crops()).dtype == torch.float32
    tokens = load_image_encoder(tmp_path, dtype=torch.bfloat16)(crops())
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), penultimate(model.float(), crops()), rtol=0.1, atol=0.1)


def test_no_tensor_is_left_on_the_meta_device(model, tmp_path):
    model.save_pretrained(tmp_path)
    encoder = load_image_encoder(tmp_path)
    assert not any(tensor.is_meta for tensor in [*encoder.parameters(), *encoder.buffers()])
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.training


@pytest.fixture
def forbid_building_models(monkeypatch):
    monkeypatch.setattr(transformers, "CLIPVisionModel", lambda *_: pytest.fail("a model was built"))


@pytest.mark.usefixtures("forbid_building_models")
@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"text_model.embeddings.token_embedding.weight": (9, 8)}, "a CLIP text encoder"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)}, "checkpoint"),
        (
            {"vision_model.embeddings.patch_embedding.weight": (8, 3, 2, 2)},
            "an image encoder with a different architecture",
        ),
        ({"class_embedding": (8,), "conv1.weight": (8, 3, 2, 2)}, "does not know"),
        ({"class_embedding": (8,), "conv1.weight": (8, 12), "positional_embedding": (5, 8)}, "does not know"),
        ({"something": (2, 2)}, "does not know"),
    ],
)
def test_other_files_are_rejected(tensors, what, tmp_path):
    save(tmp_path / "other.safetensors", {key: torch.zeros(shape) for key, shape in tensors.items()})
    with pytest.raises(FaceSnapError, match=rf"other\.safetensors is .*{what}.*CLIP-ViT-H-14") as error:
        load_image_encoder(tmp_path / "other.safetensors")
    assert str(error.value).count("CLIP image encoder") == 1


@pytest.mark.usefixtures("forbid_building_models")
def test_unknown_number_of_heads_is_reported(tmp_path):
    save(tmp_path / "clip.safetensors", open_clip_tower(width=48, layers=2, mlp=8))
    with pytest.raises(FaceSnapError, match=r"heads of clip\.safetensors .* config\.json"):
        load_image_encoder(tmp_path / "clip.safetensors")


def test_missing_tensors_are_reported(tmp_path):
    tower = open_clip_tower(width=64, layers=3, mlp=8)
    del tower["transformer.resblocks.1.mlp.c_fc.bias"]
    save(tmp_path / "clip.safetensors", tower)
    with pytest.raises(FaceSnapError, match=r"clip\.safetensors is not a complete .*layers\.1\.mlp\.fc1\.bias"):
        load_image_encoder(tmp_path / "clip.safetensors")


def test_missing_and_damaged_files_are_reported(tmp_path):
    with pytest.raises(FaceSnapError, match=r"nothing\.safetensors"):
        load_image_encoder(tmp_path / "nothing.safetensors")
    with pytest.raises(FaceSnapError, match=str(tmp_path)):
        load_image_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    save(tmp_path / "model.safetensors", open_clip_tower(width=64, layers=2, mlp=8))
    with pytest.raises(FaceSnapError, match=r"config\.json"):
        load_image_encoder(tmp_path)


class MaliciousObject:
    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


def test_pickles_are_not_executed(tmp_path):
    torch.save({"visual.class_embedding": torch.zeros(8), "malicious": MaliciousObject()}, tmp_path / "clip.pth")
    with pytest.raises(FaceSnapError, match=r"clip\.pth"):
        load_image_encoder(tmp_path / "clip.pth")
