"""PhotoMaker finds the word for the person, stacks the references' embeddings there, and its LoRAs are LoRAs."""

from __future__ import annotations

import copy

import pytest
import torch

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.rivals.attention import Injection, install, lora_layers
from facesnap_lab.rivals.method import Text
from facesnap_lab.rivals.photomaker import FuseModule, PhotoMaker, PhotoMakerConfig
from facesnap_lab.training.rival_objective import call_unet
from tests.support import tiny
from tests.support.training_world import sdxl, tokenizer


def photomaker() -> PhotoMaker:
    return tiny.randomise(PhotoMaker(PhotoMakerConfig(6, 8, 1, ())), std=0.5)


def text(words: list[list[int]], length: int = 5) -> Text:
    mask = torch.zeros(len(words), length, dtype=torch.bool)
    for row, places in enumerate(words):
        mask[row, places] = True
    return Text(torch.randn(len(words), length, 8), torch.zeros(len(words), 4), mask)


def test_first_class_word_of_each_caption_is_found():
    """The tokens begin with <s>. Of the class words, the tokenizer knows person, man and woman."""
    captions = ["a photo of a red person", None, "woman of a man", "photo of a sad guy of a man"]
    found = PhotoMaker.class_words(tokenizer(), captions, 12)
    assert found.nonzero().tolist() == [[0, 6], [2, 1], [3, 8]]
    with pytest.raises(FaceSnapError, match="'a red photo' has no word for the person"):
        PhotoMaker.class_words(tokenizer(), ["a red photo"], 12)


@torch.no_grad()
def test_references_take_the_place_of_the_class_word():
    rival, before = photomaker(), text([[2], []])
    features = (torch.randn(2, 3, 6),)
    context = rival(features, before, None).context
    assert torch.equal(context[1], before.context[1])
    assert torch.equal(context[0, :2], before.context[0, :2])
    for i in range(3):  # the third reference pushes the last two tokens out
        identity = rival.visual_projection(rival.norm(features[0][0, i]))
        expected = fuse(rival.fuse_module, before.context[0, 2], identity)
        torch.testing.assert_close(context[0, 2 + i], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_text_without_a_person_is_unchanged():
    before = text([[2]])
    assert torch.equal(photomaker()((torch.zeros(1, 2, 6),), before, None).context, before.context)


def fuse(module: FuseModule, word: torch.Tensor, identity: torch.Tensor) -> torch.Tensor:
    """The paper's fusion, written out for one word [C] and one identity [C]."""

    def norm(layer, x):
        return (x - x.mean()) / (x.var(unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias

    def mlp(layers, x):
        hidden = layers.fc1.weight @ norm(layers.layernorm, x) + layers.fc1.bias
        return layers.fc2.weight @ (hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))) + layers.fc2.bias

    fused = mlp(module.mlp1, torch.cat([word, identity])) + word
    return norm(module.layer_norm, mlp(module.mlp2, fused) + fused)


@torch.no_grad()
def test_loras_act_like_a_change_of_the_unets_weights():
    unet = sdxl().unet
    changed, layers = copy.deepcopy(unet), lora_layers(unet)
    assert len(layers) == 4 * len(unet.attn_processors)
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for name, module in changed.named_modules():
        if (key := name.replace(".", "_")) in {layer for layer, *_ in layers}:
            rows, columns = module.weight.shape
            lora[key] = torch.randn(2, columns, generator=generator), 0.1 * torch.randn(rows, 2, generator=generator)
            module.weight += lora[key][1] @ lora[key][0]
    assert set(lora) == {layer for layer, *_ in layers}
    install(unet)
    x, pooled, sizes = torch.randn(2, 4, 8, 8), torch.randn(2, 20), torch.zeros(2, 6)
    context = torch.randn(2, 5, unet.config.cross_attention_dim)
    actual = call_unet(unet, x, torch.tensor([3, 700]), Injection(context, lora=lora), pooled, sizes)
    added = {"text_embeds": pooled, "time_ids": sizes}
    expected = changed(x, torch.tensor([3, 700]), context, added_cond_kwargs=added).sample
    assert (expected - unet(x, torch.tensor([3, 700]), context, added_cond_kwargs=added).sample).abs().max() > 0.01
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
