"""The frozen base, from a folder and from one file."""

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
def one_file(tmp_path_factory):
    """The tiny SDXL in the layout of SDXL's own checkpoints."""
    pipe = sdxl()
    tensors = unet_tensors(pipe.unet.state_dict(), pipe.unet.config)
    tensors |= vae_tensors(pipe.vae.state_dict(), pipe.vae.config)
    for key, tensor in pipe.text_encoder.state_dict().items():
        key = key if key.startswith("text_model.") else f"text_model.{key}"  # transformers 5 leaves it out
        tensors[f"conditioner.embedders.0.transformer.{key}"] = tensor
    tensors |= open_clip_tensors(pipe.text_encoder_2.state_dict(), range(16), "conditioner.embedders.1.model.")
    path = tmp_path_factory.mktemp("one") / "sdxl.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def test_a_checkpoint_in_one_file_is_the_folder(world, one_file):
    folder, file = load_base(world / "base", None, torch.float32), load_base(one_file, world / "base", torch.float32)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        wanted, found = (getattr(pipe, part).state_dict() for pipe in (folder, file))
        assert wanted.keys() == found.keys()
        for key, tensor in wanted.items():
            assert torch.equal(tensor, found[key]), f"{part} {key}"
    caption = "a photo of a smiling man"
    for one, other in zip(TextEncoder(folder)([caption]), TextEncoder(file)([caption])):
        torch.testing.assert_close(one, other)


def test_without_its_configurations_one_file_asks_for_them(one_file, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FaceSnapError, match="'base_config'"):
        load_base(one_file, None, torch.float32)


def test_kept_captions_are_bounded_and_change_nothing(monkeypatch):
    pipe = sdxl()
    fresh, asked = TextEncoder(pipe), []
    monkeypatch.setattr(frozen, "CACHED_TEXT", 2 * sum(4 * tensor.numel() for tensor in fresh.null))
    encoder = TextEncoder(pipe)
    encode = pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda prompt, **rest: asked.append(prompt) or encode(prompt, **rest))
    captions = ["a man", "a woman", "a man", "red", "a woman"]  # the last has been forgotten by then
    context, pooled = encoder(captions)
    assert asked == ["a man", "a woman", "red", "a woman"]
    assert len(encoder._kept) == 2
    for i, caption in enumerate(captions):
        alone, pooled_alone = fresh([caption])
        assert torch.equal(context[i : i + 1], alone)
        assert torch.equal(pooled[i : i + 1], pooled_alone)


def test_y_is_what_the_unet_makes_of_text_and_sizes():
    unet = sdxl().unet
    pooled, sizes = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)), size_ids(32, 2, torch.device("cpu"))
    wanted = torch.cat([pooled, unet.add_time_proj(sizes.flatten()).reshape(2, -1)], dim=-1)
    torch.testing.assert_close(text_y(pooled, sizes, 8), wanted)
    assert sizes.tolist() == [[32, 32, 0, 0, 32, 32]] * 2
