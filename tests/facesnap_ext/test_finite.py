"""Finite weights that are too large compute values that are not finite: the message names the network, not the host."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from facesnap_ext.engine import Engine
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.residuals import Residuals
from facesnap_ext.settings.unit import Unit
from facesnap_ext.weights.search import find_models
from tests.support import tiny

CASES = {
    "stand-in-deca.safetensors": ("layers.2.weight", "DECA computes codes that are not finite"),
    "stand-in-flame.safetensors": ("shapedirs", "FLAME computes points that are not finite"),
    "stand-in-clip/model.safetensors": ("layers.0.mlp.fc1.weight", "model.safetensors|stand-in-clip computes CLIP"),
    "random.safetensors": ("mixer.", "The Mixer of random.safetensors computes values that are not finite"),
}


@pytest.mark.parametrize("file", CASES)
@pytest.mark.parametrize("pose", ["photo", "template"])
def test_networks_that_overflow_are_named(stand_ins, tmp_path, astronaut, file, pose):
    folder = shutil.copytree(stand_ins, tmp_path / "facesnap")
    part, message = CASES[file]
    with safe_open(folder / file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(folder / file)
    for key in [key for key in tensors if part in key]:
        tensors[key] = torch.full_like(tensors[key], 3e38)
    save_file(tensors, folder / file, metadata)
    unit = Unit(enabled=True, references=(astronaut,), model="random.safetensors", pose=pose)
    with pytest.raises(FaceSnapError, match=message):
        Engine(lambda: find_models(folder)).prepare(unit, 256, 256)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_residuals_that_are_not_finite_stop_the_first_evaluation(value):
    ffrnet = tiny.ffrnet()
    ffrnet.controlnet_mid_block.weight.data.fill_(value)
    person = replace(tiny.conditioning(network=ffrnet), name="x.safetensors")
    x, timesteps, y = torch.ones(2, 4, 16, 16), torch.tensor([5, 5]), torch.ones(2, tiny.ADM)
    with pytest.raises(
        FaceSnapError, match=r"^FFRNet of x\.safetensors computes values that are not finite in float32"
    ):
        Residuals([person]).rows(x, timesteps, [True, False], y)
    ffrnet.controlnet_mid_block.weight.data.zero_()
    Residuals([person]).rows(x.fill_(torch.nan), timesteps, [True, False], y)  # not FFRNet's fault
