"""Training in two processes, with DDP and with FSDP, equals training in one with twice the batch size."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights import facesnap_file
from facesnap_lab.training import checkpoints, prepare, trainer
from tests.facesnap_lab.training.test_trainer import scalars, write_yaml
from tests.support.training_world import train_config

ROOT = Path(__file__).parents[3]
STEPS = 4


@dataclass(frozen=True)
class Runs:
    """The folder of all runs, and the configuration of the run in one process."""

    folder: Path
    alone: trainer.TrainConfig

    def scalars(self, name: str) -> dict[str, list[float]]:
        return scalars(self.folder / name / "logs")

    def vector(self, name: str, step: int = STEPS) -> torch.Tensor:
        file = self.folder / name / f"step-{step:07d}" / checkpoints.WEIGHTS
        return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(file).items())])


@pytest.fixture(scope="module")
def runs(world, random_start, tmp_path_factory) -> Runs:
    """Runs in one process ("alone") and in two ("ddp", and "fsdp", which is resumed), and "one to two", which resumes
    the run in one process."""
    folder = tmp_path_factory.mktemp("runs")
    base = replace(train_config(world, folder / "two"), start=random_start, steps=STEPS, id_rows=2)
    alone = replace(base, out=folder / "alone", batch_size=4, id_rows=4)
    train_alone(alone)
    names = ("ddp", "fsdp", "one to two")
    paths = {name: write_yaml(base, folder / f"{name}.yaml", out=folder / name) for name in names}
    half = write_yaml(base, folder / "half.yaml", out=folder / "fsdp", steps=STEPS // 2)
    copy_checkpoint(folder / "alone", folder / "one to two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    runs = [
        f"ddp:{paths['ddp']}",
        f"fsdp:{half}",
        f"fsdp:{paths['fsdp']}:resume",
        f"ddp:{paths['one to two']}:resume",
    ]
    started = subprocess.run(
        [*launch, "-m", "tests.support.train_in_processes", *runs],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        check=False,
    )
    assert started.returncode == 0, started.stderr[-3000:]
    return Runs(folder, alone)


def train_alone(config: trainer.TrainConfig, resume: bool = False) -> None:
    from accelerate.state import AcceleratorState

    try:
        trainer.train(config, resume)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def copy_checkpoint(run: Path, out: Path) -> None:
    shutil.copytree(run / "step-0000002", out / "step-0000002")


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_twice_the_batch_size(runs, random_start, name):
    one, two = runs.scalars("alone"), runs.scalars(name)
    assert two["loss/total"] == pytest.approx(one["loss/total"], rel=1e-4)
    assert two["loss/id"] == pytest.approx(one["loss/id"], rel=1e-4)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    info = facesnap_file.read_info(runs.folder / name / f"step-{STEPS:07d}" / checkpoints.WEIGHTS)
    assert f"{4 * STEPS} images seen" in info.trained_on
    start = torch.cat([tensor.flatten() for _, tensor in sorted(load_file(random_start).items())])
    single = runs.vector("alone")
    # as one vector: where a gradient consists of rounding errors, AdamW's step is still as long as elsewhere
    assert (runs.vector(name) - single).norm() < 1e-2 * (single - start).norm()


def test_fsdp_divides_the_state_among_the_processes(runs):
    state = runs.folder / "fsdp" / f"step-{STEPS:07d}" / "state"
    assert len(list(state.rglob("__*_0.distcp"))) == 4  # networks and optimizer of two processes


def test_a_run_is_resumed_by_a_different_number_of_processes(runs):
    whole = runs.scalars("alone")["loss/total"]
    assert runs.scalars("one to two")["loss/total"] == pytest.approx(whole[2:], rel=1e-4)
    out = runs.folder / "two to one"
    copy_checkpoint(runs.folder / "ddp", out)
    train_alone(replace(runs.alone, out=out), resume=True)
    assert runs.scalars("two to one")["loss/total"] == pytest.approx(whole[2:], rel=1e-4)


def test_shards_are_resumed_by_the_same_processes_only(runs):
    two = SimpleNamespace(accelerator=SimpleNamespace(distributed_type=DistributedType.FSDP, num_processes=2))
    with pytest.raises(FaceSnapError, match="written by 1 process without sharding, but this run has 2 processes with"):
        checkpoints._check_sharding(two, runs.folder / "alone" / "step-0000002")
    out = runs.folder / "fsdp to one"
    copy_checkpoint(runs.folder / "fsdp", out)
    before = sorted(out.rglob("*"))
    with pytest.raises(FaceSnapError, match="written by 2 processes with FSDP, but this run has 1 process without"):
        train_alone(replace(runs.alone, out=out), resume=True)
    assert sorted(out.rglob("*")) == before


def test_layers_that_are_wrapped_one_by_one_are_refused():
    plugin = SimpleNamespace(auto_wrap_policy=len)
    with pytest.raises(FaceSnapError, match="set 'fsdp_auto_wrap_policy' to NO_WRAP"):
        prepare._check_fsdp(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), "facesnap")
