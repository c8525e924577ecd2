"""Metadata and structures that no published file has are reported immediately, with a one-sentence error."""

from __future__ import annotations

import json
import time

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from facesnap_ext import convert
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.deca import CODE_SIZES
from facesnap_ext.landmarks.predictor import load_predictor
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.initialise import initialise
from tests.support import tiny
from tests.support.ldm_unet import ldm_unet

DECA = {
    "code_sizes": [
        *("[]", "{}", "null", "1", '"x"', "[" * 99999, "{", '{"shape": -1}', json.dumps({**CODE_SIZES, "shape": "a"})),
        *(json.dumps({**CODE_SIZES, "exp": value}) for value in (-50, 1e9, None, [], True, 10**30)),
        json.dumps({key: size for key, size in CODE_SIZES.items() if key != "cam"}),
        json.dumps({**CODE_SIZES, "more": 0}),
    ],
    "image_size": ["20000", "0", "-5", "abc", "1e9", "", "9" * 5000, "nan"],
    "version": ["abc", "99", "", "1.5", "9" * 5000],
}
FLAME = {"version": ["abc", "99", "", "1.5", "-1", "9" * 5000, "²"]}
FACESNAP = {
    "version": ["abc", "99", "", "9" * 5000],
    "mixer": ["[]", "{", "[" * 99999, '{"dim": 1e99}', "null"],
    "ffrnet": ["[]", "{}", "[" * 99999, "1"],
    "text_free": ["1", "maybe", "[" * 99999],
    "adapter": ["[]", "1", '{"widths": [1000000000]}', "[" * 99999],
}
CASES = [
    (part, field, value)
    for part, fields in (("stand-in-deca", DECA), ("stand-in-flame", FLAME), ("random", FACESNAP))
    for field, values in fields.items()
    for value in values
]


@pytest.mark.parametrize(("part", "field", "value"), CASES, ids=[f"{p}-{f}-{v[:20]}" for p, f, v in CASES])
def test_absurd_metadata_are_reported_with_the_file(stand_ins, tmp_path, part, field, value):
    source, path = stand_ins / f"{part}.safetensors", tmp_path / f"{part}.safetensors"
    with safe_open(source, "pt") as file:
        save_file(load_file(source), path, {**file.metadata(), field: value})
    loaders = {
        "stand-in-deca": lambda: load_predictor(path, stand_ins / "stand-in-flame.safetensors"),
        "stand-in-flame": lambda: load_predictor(stand_ins / "stand-in-deca.safetensors", path),
        "random": lambda: facesnap_file.load(path),
    }
    start = time.perf_counter()
    with pytest.raises(FaceSnapError) as error:
        loaders[part]()
    assert time.perf_counter() - start < 5
    assert f"{part}.safetensors" in str(error.value)
    assert len(str(error.value)) < 600


def checkpoint(**changes):
    state = {f"model.diffusion_model.{key}": tensor for key, tensor in ldm_unet().state_dict().items()}
    return {**state, **changes}


def without(part):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


STRUCTURES = {
    "no middle attention, as in SSD-1B": without("middle_block.1."),
    "no first convolution": without("input_blocks.0.0."),
    "no time embedding": without("time_embed.0"),
    "one weight missing": without("input_blocks.5.0.in_layers.2.weight"),
    "only a few tensors": lambda tensors: dict(list(tensors.items())[:12]),
    "packed weights": lambda tensors: {key: t.reshape(-1)[:4] for key, t in tensors.items()},
}


@pytest.mark.parametrize("case", STRUCTURES)
@pytest.mark.parametrize("kind", ["init", "convert"])
def test_other_structures_are_reported_in_one_sentence(tmp_path, case, kind):
    """Either the file is usable, or the message names it; nothing is left behind."""
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    if kind == "init":
        tensors = STRUCTURES[case](checkpoint())
        run = lambda: initialise(path, out, head_dim=16, size_dim=8)  # noqa: E731
    else:
        names = {"middle_block.1.": "mid_block.attentions", "input_blocks.0.0.": "conv_in.", "time_embed.0": "time_"}
        names["input_blocks.5.0.in_layers.2.weight"] = "down_blocks.1.resnets.1.conv1.weight"
        renamed = {name: without(names[name.split("'")[0]]) for name in names}
        keys = {"no middle attention, as in SSD-1B": "middle_block.1.", "no first convolution": "input_blocks.0.0."}
        keys |= {"no time embedding": "time_embed.0", "one weight missing": "input_blocks.5.0.in_layers.2.weight"}
        change = renamed[keys[case]] if case in keys else STRUCTURES[case]
        tensors = change(tiny.ffrnet().state_dict())
        run = lambda: convert.convert(path, out)  # noqa: E731
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()} or {"x": torch.ones(1)}, path)
    try:
        run()
    except FaceSnapError as error:
        assert str(error).startswith("model.safetensors is ")
        assert not out.exists()
    else:
        facesnap_file.load(out)
