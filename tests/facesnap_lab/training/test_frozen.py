"""The frozen base, loaded from a folder and from a single file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.miniature.sdxl_layout import open_clip_tensors, unet_tensors, vae_tensors
from facesnap_lab.training import frozen
from facesnap_lab.training.frozen import TextEncoder, load_base, size_ids, text_y
from tests.support.training_world import sdxl


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    """The tiny SDXL in the layout of the original SDXL checkpoints."""
    pipe = sdxl()
    tensors = unet_tensors(pipe.unet.state_dict(), pipe.unet.config)
    tensors |= vae_tensors(pipe.vae.state_dict(), pipe.vae.config)
    for key, tensor in pipe.text_encoder.state_dict().items():
        key = key if key.startswith("text_model.") else f"text_model.{key}"  # omitted by transformers 5
        tensors[f"conditioner.embedders.0.transformer.{key}"] = tensor
    tensors |= open_clip_tensors(pipe.text_encoder_2.state_dict(), range(16), "conditioner.embedders.1.model.")
    path = tmp_path_factory.mktemp("one") / "sdxl.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def test_single_file_checkpoint_equals_the_folder(world, single_file):
    folder, file = load_base(world / "base", None, torch.float32), load_base(single_file, world / "base", torch.float32)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        expected, actual = (getattr(pipe, part).state_dict() for pipe in (folder, file))
        assert expected.keys() == actual.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, actual[key]), f"{part} {key}"
    caption = "a photo of a smiling man"
    for one, other in zip(TextEncoder(folder)([caption]), TextEncoder(file)([caption])):
        torch.testing.assert_close(one, other)


def test_error_for_single_file_without_configs_suggests_base_config(single_file, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FaceSnapError, match="'base_config'"):
        load_base(single_file, None, torch.float32)


def test_caption_cache_is_bounded_and_does_not_change_results(monkeypatch):
    pipe = sdxl()
    fresh, encoded = TextEncoder(pipe), []
    monkeypatch.setattr(frozen, "CACHED_TEXT", 2 * sum(4 * tensor.numel() for tensor in fresh.null))
    encoder = TextEncoder(pipe)
    encode = pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda prompt, **rest: encoded.append(prompt) or encode(prompt, **rest))
    captions = ["a man", "a woman", "a man", "red", "a woman"]  # by then, the last caption is no longer in the cache
    context, pooled = encoder(captions)
    assert encoded == ["a man", "a woman", "red", "a woman"]
    assert len(encoder._cache) == 2
    for i, caption in enumerate(captions):
        alone, pooled_alone = fresh([caption])
        assert torch.equal(context[i : i + 1], alone)
        assert torch.equal(pooled[i : i + 1], pooled_alone)


def test_text_y_equals_the_unets_embedding_of_text_and_sizes():
    unet = sdxl().unet
    pooled, sizes = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)), size_ids(32, 2, torch.device("cpu"))
    expected = torch.cat([pooled, unet.add_time_proj(sizes.flatten()).reshape(2, -1)], dim=-1)
    torch.testing.assert_close(text_y(pooled, sizes, 8), expected)
    assert sizes.tolist() == [[32, 32, 0, 0, 32, 32]] * 2
