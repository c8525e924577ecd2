"""A compressed file holds the same network without some of its blocks, or with rounded weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from facesnap_ext.cli.main import main
from facesnap_ext.networks.adapter import Adapter, AdapterConfig
from facesnap_ext.networks.ffrnet import TransformerBlock
from facesnap_ext.networks.mixer import FacialAttributeMixer, MixerConfig
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.facesnap_file import FaceSnapInfo, load
from tests.support import tiny

DEPTHS = {"depths": ((0, 0), (3, 3), (5, 5)), "middle_depth": 4}
MIXER = MixerConfig(id_dim=8, clip_dim=6, dim=tiny.CONTEXT, id_tokens=2, queries=3, layers=1, feedforward=8, heads=2)


class RemovedBlock(nn.Module):
    """Replaces a removed block and returns its input."""

    def forward(self, x, identity):
        return x


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "whole.safetensors"
    ffrnet = tiny.ffrnet(2, **DEPTHS)
    info = FaceSnapInfo(MIXER, ffrnet.config, license="Apache-2.0", trained_on="faces")
    adapter = tiny.randomise(Adapter(AdapterConfig((32, 64), tiny.CONTEXT)))
    info = replace(info, adapter=adapter.config)
    facesnap_file.save(path, info, tiny.randomise(FacialAttributeMixer(MIXER)), ffrnet, adapter)
    return path


@pytest.mark.parametrize(
    ("blocks", "deepest", "middle"), [(3, [0, 1, 4], [0, 1, 3]), (2, [0, 4], [0, 3]), (1, [0], [0]), (0, None, [])]
)
def test_compressed_network_equals_original_without_the_middle_blocks(source, blocks, deepest, middle):
    out = source.with_name("light.safetensors")
    assert main(["compress", str(source), str(out), "--blocks", str(blocks)]) == 0
    whole, light = load(source), load(out)
    if deepest is None:
        whole.ffrnet.down_blocks[2].attentions = None
    for transformers, kept in (
        (whole.ffrnet.down_blocks[2].attentions or [], deepest),
        (whole.ffrnet.mid_block.attentions, middle),
    ):
        for transformer in transformers:
            for number in set(range(len(transformer.transformer_blocks))) - set(kept):
                transformer.transformer_blocks[number] = RemovedBlock()
    x, t, tokens = torch.randn(1, 4, 16, 16), torch.tensor([300.0]), torch.randn(1, 3, tiny.CONTEXT)
    features = whole.ffrnet.embed_landmarks(torch.rand(1, 3, 128, 128))
    identity = [
        None if isinstance(block, RemovedBlock) else block.attn2.keys_values(tokens)
        for block in whole.ffrnet.modules()
        if isinstance(block, TransformerBlock | RemovedBlock)
    ]
    assert None in identity
    with torch.no_grad():
        expected = whole.ffrnet(x, t, identity, features)
        actual = light.ffrnet(x, t, light.ffrnet.embed_tokens(tokens), features)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_compression_keeps_mixer_adapter_and_licence(source):
    out = source.with_name("light.safetensors")
    main(["compress", str(source), str(out), "--blocks", "2"])
    whole, light = load(source), load(out)
    for key, tensor in whole.mixer.state_dict().items():
        assert torch.equal(light.mixer.state_dict()[key], tensor)
    for one, other in zip(
        facesnap_file.load_adapter(out).parameters(), facesnap_file.load_adapter(source).parameters()
    ):
        assert torch.equal(one, other)
    assert (light.info.license, light.info.trained_on) == ("Apache-2.0", "faces; consecutive blocks: 2")
    assert light.info.ffrnet.depths == ((0, 0), (3, 3), (2, 2))


def test_nothing_to_remove_is_an_error(source, capsys):
    out = source.with_name("light.safetensors")
    assert main(["compress", str(source), str(out), "--blocks", "5"]) == 1
    assert (
        "no more than 5 consecutive transformer blocks at its deepest level; choose a lower number"
        in capsys.readouterr().err
    )
    assert not out.exists()


def test_fp8_rounds_the_weights(source):
    """Whatever dtype the network is moved to, these weights stay in 8 bits, and all others are converted to it."""
    out = source.with_name("light.safetensors")
    assert main(["compress", str(source), str(out), "--fp8"]) == 0
    whole, light = load(source).ffrnet, load(out).ffrnet
    eight = {name for name, tensor in light.state_dict().items() if tensor.dtype == torch.float8_e4m3fn}
    assert sum(light.state_dict()[name].numel() for name in eight) > 0.8 * sum(p.numel() for p in light.parameters())
    for name in eight:
        rounded = whole.state_dict()[name].to(torch.float8_e4m3fn)
        assert torch.equal(light.state_dict()[name].float(), rounded.float())
        whole.state_dict()[name].copy_(rounded)
    x, t, tokens, picture = (
        torch.randn(1, 4, 16, 16),
        torch.tensor([300.0]),
        torch.randn(1, 3, tiny.CONTEXT),
        torch.rand(1, 3, 128, 128),
    )
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for network in (whole, light.to("cpu", dtype)):
            network.to(dtype)
            with torch.no_grad():
                features, identity = network.embed_landmarks(picture), network.embed_tokens(tokens)
                results.append(network(x.to(dtype), t, identity, features))
        for expected, actual in zip(*results, strict=True):
            assert expected.dtype == dtype
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        assert {name for name, tensor in light.state_dict().items() if tensor.dtype == torch.float8_e4m3fn} == eight
        assert light.dtype == dtype


def test_blocks_and_fp8_combine_and_one_of_them_is_required(source, capsys):
    out = source.with_name("light.safetensors")
    assert main(["compress", str(source), str(out), "--blocks", "1", "--fp8"]) == 0
    assert load(out).info.trained_on == "faces; consecutive blocks: 1; 8-bit weights"
    assert out.stat().st_size < source.stat().st_size / 3
    assert main(["compress", str(source), str(out)]) == 1
    assert "--blocks 2, --fp8, or both" in capsys.readouterr().err
