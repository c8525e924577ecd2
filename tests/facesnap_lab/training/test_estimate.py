"""`facesnap train --estimate`: measure a few steps, leave nothing behind, and extrapolate."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from facesnap_lab.cli.main import main
from facesnap_lab.training import estimate, trainer
from facesnap_lab.training.estimate import Rates, as_text, extrapolate
from tests.facesnap_lab.training.test_trainer import write_yaml

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_command_prints_rates_and_leaves_nothing_behind(config, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "MEASURED", 2)
    monkeypatch.setattr(estimate, "WARM_UP", 1)
    path = write_yaml(replace(config, sample_every=4), config.out.parent / "t.yaml")
    before = sorted(config.out.parent.rglob("*"))
    assert main(["train", str(path), "--estimate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(config.out.parent.rglob("*")) == before
    rates = found["rates"]
    assert 0 < rates["waiting"] < rates["step"]
    assert rates["checkpoint"] > 0
    assert rates["samples"] > 0
    assert [row["images"] for row in found["runs"]] == [15, *estimate.SIZES]
    assert found["epochs"] == pytest.approx(config.steps * config.batch_size / 15)
    # the estimated files are those that a run writes
    trainer.train(replace(config, sample_every=0, save_every=2))
    written = sum(file.stat().st_size for file in config.out.glob("step-*/**/*") if file.is_file())
    assert found["runs"][0]["checkpoints_GB"] * 1e9 == pytest.approx(config.keep * written / 2, rel=0.05)


@pytest.mark.parametrize("processes", [1, 8])
def test_a_run_costs_its_steps_checkpoints_and_samples(config, processes):
    rates = Rates(step=2, waiting=0.5, checkpoint=30, samples=90, checkpoint_bytes=2 * 10**9, memory_bytes=0)
    config = replace(config, steps=1000, save_every=100, sample_every=250, keep=3, gradient_accumulation=2)
    accelerator = SimpleNamespace(num_processes=processes, device=SimpleNamespace(type="cpu"))
    found = extrapolate(
        config, rates, SimpleNamespace(accelerator=accelerator, images=SimpleNamespace(index=range(10**4)))
    )
    assert found["images_per_step"] == 2 * config.batch_size * processes
    own, larger, *_ = found["runs"]
    assert own["hours"] == pytest.approx((1000 * 2 + 10 * 30 + 4 * 90) / 3600)
    assert own["device_hours"] == pytest.approx(processes * own["hours"])
    assert own["checkpoints_GB"] == 6
    assert (larger["images"], larger["steps"]) == (10**5, 10_000)
    assert larger["hours"] == pytest.approx(10 * own["hours"])
    shards = sum(shard.stat().st_size for shard in config.shards)
    assert own["shards_GB"] == pytest.approx(shards / 1e9)
    assert larger["shards_GB"] == pytest.approx(10 * shards / 1e9)
    text = as_text({"rates": vars(rates), **found})
    assert "For 25 % of a step, the main process waits for images." in text
    assert "| 100,000 images | 10,000 | 7.39 |" in text


def test_whole_cycles_of_the_identity_loss_are_measured(config, monkeypatch):
    """With L_id in every fourth step, two cycles are measured after one; the clock counts 1 s per step, 5 with L_id."""
    now = {"time": 0.0}
    counted = []

    def steps(run, first):
        for number in range(first + 1, run.config.steps + 1):
            now["time"] += 5 if (number - 1) % 4 == 0 else 1
            counted.append(number)
            yield SimpleNamespace(number=number, waiting=0.25)

    monkeypatch.setattr(estimate, "steps", steps)
    monkeypatch.setattr(estimate, "save_checkpoint", lambda run, step: None)
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now["time"])
    accelerator = SimpleNamespace(device=SimpleNamespace(type="cpu"))
    run = trainer.Run(replace(config, id_rows=1, id_every=4, sample_every=0), accelerator, *[None] * 9)
    rates = estimate.measure(run)
    assert counted == list(range(1, 13))
    assert rates.step == pytest.approx((5 + 1 + 1 + 1) / 4)
    assert rates.waiting == 0.25
