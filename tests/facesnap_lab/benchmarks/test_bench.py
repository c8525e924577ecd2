"""FLOPs and weights at SDXL's size, and the methods that are timed."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from facesnap_ext.networks.ffrnet import FFRNet
from facesnap_lab.benchmarks import bench as benchmarks
from facesnap_lab.benchmarks import sampler as samplers
from facesnap_lab.benchmarks.sampler import (
    CONTROLNET,
    FACESNAP_VARIANTS,
    INSTANTID,
    INSTANTID_COND_ONLY,
    PLAIN,
    BenchSampler,
    Networks,
)
from facesnap_lab.cli.main import main

pytest.importorskip("diffusers", reason="diffusers is not installed")


@pytest.fixture(scope="module")
def full():
    return benchmarks.at_full_size()


# Most of the time of a small UNet is spent in its 10 innermost blocks. The light FFRNet keeps 2 of these 3.
SHALLOW = {**samplers.SHAPE, "transformer_layers_per_block": (1, 1, 3)}


@pytest.fixture(scope="module")
def networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "SHAPE", SHALLOW)
        return Networks.random((64, 64, 64), torch.float32, torch.device("cpu"))


def test_flops_at_sdxl_size(full):
    """A run of FFRNet costs 0.22 of a step of plain SDXL; a ControlNet on both rows costs twice as much."""
    ratios = {name: row["flop_ratio"] for name, row in full.items()}
    assert ratios[PLAIN] == 1
    assert ratios["FaceSnap"] == pytest.approx(1.217, abs=0.002)
    assert ratios[CONTROLNET] - 1 == pytest.approx(2 * (ratios["FaceSnap"] - 1), rel=0.03)  # embeds landmarks each step
    assert ratios[INSTANTID] > ratios[CONTROLNET]
    assert ratios[INSTANTID] == pytest.approx(1.445, abs=0.002)
    assert ratios[INSTANTID_COND_ONLY] < 1.23
    assert ratios["FaceSnap, light"] == pytest.approx(1.10, abs=0.002)
    for name, (light, interval) in FACESNAP_VARIANTS.items():
        if interval == 2:
            every_step = ratios["FaceSnap, light" if light else "FaceSnap"]
            assert ratios[name] - 1 == pytest.approx((every_step - 1) / 2, rel=0.02)


def test_weights_at_sdxl_size(full):
    """The parameters of SDXL's ControlNet and of IP-Adapter's projections, in half precision."""
    weights = {name: row["added_weights_GB"] for name, row in full.items()}
    assert weights[PLAIN] == 0
    assert weights["FaceSnap"] == weights[CONTROLNET] == pytest.approx(2 * 1.251014160, abs=1e-3)
    widths = 640 * 10 + 1280 * 60  # total width of SDXL's cross-attentions
    assert weights[INSTANTID] - weights[CONTROLNET] == pytest.approx(2 * 2 * 2048 * widths / 1e9, abs=1e-3)
    assert weights["FaceSnap, light"] < 1.0


def test_ffrnet_runs_once_per_image_and_interval(networks, monkeypatch):
    runs = []
    forward = FFRNet.forward
    monkeypatch.setattr(FFRNet, "forward", lambda self, x, *rest: runs.append(len(x)) or forward(self, x, *rest))
    methods = BenchSampler(networks, 64, pictures=2).methods(steps=4)
    counted = {}
    for name, draw in methods.items():
        runs.clear()
        draw()
        counted[name] = runs[:]
    assert counted == {
        PLAIN: [],
        **{name: [2] * (4 // interval) for name, (_, interval) in FACESNAP_VARIANTS.items()},
        CONTROLNET: [],
        INSTANTID: [],
        INSTANTID_COND_ONLY: [2] * 4,
    }
    runs.clear()
    BenchSampler(networks, 64).facesnap(2, people=3)
    assert runs == [1] * 6


def test_adapter_attention_changes_the_output_and_is_removed_afterwards(networks):
    sampler = BenchSampler(networks, 64)
    outputs = []
    handle = networks.unet.register_forward_hook(lambda module, args, output: outputs.append(output.sample))
    sampler.controlnet(1)
    sampler.instantid(1)
    sampler.controlnet(1)
    handle.remove()
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert torch.equal(outputs[0], outputs[2])


def test_ratios_are_taken_within_each_turn(monkeypatch):
    """A machine that slows down halfway changes both methods' times but not their ratio."""
    clock = iter([0, 1, 1, 3, 0, 1, 1, 3, 0, 10, 10, 30, 0, 2, 2, 6])
    monkeypatch.setattr(benchmarks.time, "perf_counter", lambda: next(clock))
    turns = {PLAIN: lambda: None, "FaceSnap": lambda: None}
    found = benchmarks.take_turns(turns, 3, torch.device("cpu"), "")
    assert found == {PLAIN: {"seconds": 2, "ratio": 1}, "FaceSnap": {"seconds": 4, "ratio": 2}}


def test_command_prints_a_table_or_json_and_plots_growth(full, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmarks, "at_full_size", lambda steps: full)
    monkeypatch.setattr(samplers, "SHAPE", SHALLOW)
    monkeypatch.setattr(benchmarks, "SMALL_WIDTHS", (64, 64, 64))
    monkeypatch.setattr(benchmarks, "SMALL_PIXELS", 128)
    monkeypatch.setattr(benchmarks, "GROWTH_STEPS", 1)
    monkeypatch.setattr(benchmarks, "GROWTH", {"people": (1, 2), "side": (0.5, 1.0), "pictures": (1, 2)})
    monkeypatch.setattr(benchmarks, "REFERENCES", (1, 4))
    picture = tmp_path / "deep" / "growth.png"
    assert main(["bench", "--repeats", "1", "--steps", "2", "--json", "--growth", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        list(found["methods"])
        == list(found["at_full_size"])
        == [
            PLAIN,
            *FACESNAP_VARIANTS,
            CONTROLNET,
            INSTANTID,
            INSTANTID_COND_ONLY,
        ]
    )
    assert all(row["seconds"] > 0 for row in found["methods"].values())
    assert found["methods"][PLAIN]["ratio"] == 1
    assert 0 < found["preparation"]["again"] < found["preparation"]["first"]
    assert {axis: list(curve) for axis, curve in found["growth"].items()} == {
        "people": ["1", "2"],
        "side": ["64", "128"],
        "pictures": ["1", "2"],
        "references": ["1", "4"],
    }
    assert Image.open(picture).width > 1000
    table = benchmarks.as_text(found).splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in found["methods"]]


def test_one_command_measures_one_and_several_images(full, monkeypatch, capsys):
    monkeypatch.setattr(benchmarks, "at_full_size", lambda steps: full)
    monkeypatch.setattr(benchmarks, "measure_preparation", lambda repeats: {})
    monkeypatch.setattr(samplers, "SHAPE", SHALLOW)
    monkeypatch.setattr(benchmarks, "SMALL_WIDTHS", (64, 64, 64))
    monkeypatch.setattr(benchmarks, "SMALL_PIXELS", 64)
    assert main(["bench", "gpu", "--repeats", "1", "--steps", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["size"]["pictures"] == 1
    assert list(found["batches"]) == ["4"]
    assert list(found["batches"]["4"]) == list(found["methods"]) == list(full)
    assert all(row["seconds"] > 0 for row in found["batches"]["4"].values())
    table = benchmarks.as_text(found)
    assert table.count(f"| {INSTANTID_COND_ONLY} |") == 2
    assert "4 images per batch:" in table


def test_flops_alone_are_printed_without_timing(full, monkeypatch, capsys):
    monkeypatch.setattr(benchmarks, "at_full_size", lambda steps: full)
    monkeypatch.setattr(benchmarks, "take_turns", None)
    assert main(["bench", "--flops", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"at_full_size": full}
    assert main(["bench", "--flops"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in full]


def test_more_references_cost_little_compared_with_an_image():
    ratios = [benchmarks.mixer_flop_ratio(count) for count in (1, 8)]
    assert ratios[0] < ratios[1] < 0.01
