"""What is counted at SDXL's size, and that everything that is timed runs as it should."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from facesnap_ext.networks.ffrnet import FFRNet
from facesnap_lab.benchmarks import bench as benchmarks
from facesnap_lab.benchmarks.sampler import BOTH_ROWS, INSTANTID, OWN, PLAIN, BenchSampler, Networks
from facesnap_lab.cli.main import main

pytest.importorskip("diffusers", reason="diffusers is not installed")


@pytest.fixture(scope="module")
def full():
    return benchmarks.at_full_size()


@pytest.fixture(scope="module")
def networks():
    return Networks.random((64, 64, 64), torch.float32, torch.device("cpu"))


def test_flops_at_sdxls_size(full):
    """A run of FFRNet is 0.22 of a step of plain SDXL; a ControlNet on both rows costs twice that."""
    ratios = {name: row["flop_ratio"] for name, row in full.items()}
    assert ratios[PLAIN] == 1
    assert ratios["FaceSnap"] == pytest.approx(1.217, abs=0.002)
    assert ratios[BOTH_ROWS] - 1 == pytest.approx(2 * (ratios["FaceSnap"] - 1), rel=0.03)  # its landmarks each step
    assert ratios[INSTANTID] > ratios[BOTH_ROWS]
    assert ratios["FaceSnap, light"] < 1.11
    for name, (light, every) in OWN.items():
        if every == 2:
            whole = ratios["FaceSnap, light" if light else "FaceSnap"]
            assert ratios[name] - 1 == pytest.approx((whole - 1) / 2, rel=0.02)


def test_weights_at_sdxls_size(full):
    """Parameters of SDXL's ControlNet and of IP-Adapter's projections, in half precision."""
    weights = {name: row["added_weights_GB"] for name, row in full.items()}
    assert weights[PLAIN] == 0
    assert weights["FaceSnap"] == weights[BOTH_ROWS] == pytest.approx(2 * 1.251014160, abs=1e-3)
    widths = 640 * 10 + 1280 * 60  # of SDXL's cross-attentions
    assert weights[INSTANTID] - weights[BOTH_ROWS] == pytest.approx(2 * 2 * 2048 * widths / 1e9, abs=1e-3)
    assert weights["FaceSnap, light"] < 1.0


def test_ffrnet_runs_as_often_as_it_is_said_to(networks, monkeypatch):
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
        **{name: [2] * (4 // every) for name, (_, every) in OWN.items()},
        BOTH_ROWS: [],
        INSTANTID: [],
    }
    runs.clear()
    BenchSampler(networks, 64).facesnap(2, people=3)
    assert runs == [1] * 6


def test_the_adapters_attention_changes_what_the_unet_says_and_goes_again(networks):
    easel = BenchSampler(networks, 64)
    said = []
    handle = networks.unet.register_forward_hook(lambda module, args, output: said.append(output.sample))
    easel.both_rows(1)
    easel.instantid(1)
    easel.both_rows(1)
    handle.remove()
    assert not torch.allclose(said[0], said[1], atol=1e-5)
    assert torch.equal(said[0], said[2])


def test_turns_are_compared_one_with_another(monkeypatch):
    """A machine that gets slower halfway moves the seconds of both and not their ratio."""
    clock = iter([0, 1, 1, 3, 0, 1, 1, 3, 0, 10, 10, 30, 0, 2, 2, 6])
    monkeypatch.setattr(benchmarks.time, "perf_counter", lambda: next(clock))
    turns = {PLAIN: lambda: None, "FaceSnap": lambda: None}
    found = benchmarks.take_turns(turns, 3, torch.device("cpu"), "")
    assert found == {PLAIN: {"seconds": 2, "ratio": 1}, "FaceSnap": {"seconds": 4, "ratio": 2}}


def test_the_command_prints_a_table_or_json_and_draws_how_cost_grows(full, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmarks, "at_full_size", lambda steps: full)
    monkeypatch.setattr(benchmarks, "SMALL_WIDTHS", (64, 64, 64))
    monkeypatch.setattr(benchmarks, "SMALL_PIXELS", 128)
    picture = tmp_path / "deep" / "growth.png"
    assert main(["bench", "--repeats", "1", "--steps", "2", "--json", "--growth", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["methods"]) == list(found["at_full_size"]) == [PLAIN, *OWN, BOTH_ROWS, INSTANTID]
    assert all(row["seconds"] > 0 for row in found["methods"].values())
    assert found["methods"][PLAIN]["ratio"] == 1
    assert 0 < found["preparation"]["again"] < found["preparation"]["first"]
    assert {axis: list(curve) for axis, curve in found["growth"].items()} == {
        "people": ["1", "2", "4"],
        "side": ["64", "128", "192"],
        "pictures": ["1", "2", "4", "8"],
        "references": ["1", "2", "4", "8"],
    }
    assert Image.open(picture).width > 1000
    table = benchmarks.as_text(found).splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in found["methods"]]


def test_more_references_cost_the_mixer_more_and_a_picture_next_to_nothing():
    ratios = [benchmarks.mixer_flop_ratio(count) for count in (1, 8)]
    assert ratios[0] < ratios[1] < 0.01
