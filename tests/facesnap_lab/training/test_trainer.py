"""Runs: resuming, several processes, checkpoints, and every way in which a run can fail."""

from __future__ import annotations

import json
import math
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights import facesnap_file
from facesnap_lab import storage
from facesnap_lab.cli.main import main
from facesnap_lab.storage import location
from facesnap_lab.training import checkpoints, prepare, trainer, uploads
from facesnap_lab.training.config import TrainConfig
from facesnap_lab.training.prepare import prepare_run
from facesnap_lab.training.shard_positions import index_of
from tests.support.s3_server import BUCKET, s3_server

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Killed(BaseException):
    """Like KeyboardInterrupt, this is not an Exception, so nothing catches it."""


@pytest.fixture
def logged_steps(monkeypatch) -> list[trainer.Step]:
    """The steps, recorded instead of logged."""
    steps: list[trainer.Step] = []
    monkeypatch.setattr(trainer, "_log", lambda board, step, bar: steps.append(step))
    return steps


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_yaml(config: TrainConfig, path: Path, **changes) -> Path:
    values = {**vars(config), **changes}
    plain = {
        name: str(value) if isinstance(value, Path) else [str(v) for v in value] if isinstance(value, tuple) else value
        for name, value in values.items()
    }
    path.write_text(yaml.safe_dump(plain))
    return path


def scalars(logs: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_run_writes_checkpoints_samples_and_logs(config, world, capsys):
    path = write_yaml(replace(config, sample_every=4, license="CC0", trained_on="noise"), config.out.parent / "t.yaml")
    assert main(["train", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(config.out / "step-0000004")
    assert names(config.out) == ["logs", "samples", "step-0000002", "step-0000004"]
    result = facesnap_file.load(config.out / "step-0000004" / checkpoints.WEIGHTS)
    assert result.info.license == "CC0"
    assert result.info.trained_on == (
        "15 images of 5 people (noise), 4 steps, 8 images seen, on base from start.safetensors"
    )
    before = facesnap_file.load(world / "start.safetensors")
    assert result.ffrnet.controlnet_mid_block.weight.any()
    assert not torch.equal(result.mixer.queries, before.mixer.queries)
    grid = np.asarray(Image.open(config.out / "samples" / "step-0000004.png"))
    assert grid.shape == (2 * 32, 3 * 32, 3)
    logged = scalars(config.out / "logs")
    assert set(logged) >= {"loss/total", "loss/diffusion", "loss/id", "learning_rate", "grad_norm", "steps_per_second"}
    assert min(logged["seconds_waiting_for_images"]) > 0  # without workers, the process reads them itself
    assert logged["learning_rate"] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])


def test_training_reduces_the_loss(config, logged_steps, monkeypatch):
    """The loss decreases on two images that are repeated with the same noise."""
    monkeypatch.setattr(trainer, "batch_rows", lambda *arguments: iter([[0, 1]] * 10))
    trainer.train(replace(config, id_rows=0, steps=10, learning_rate=3e-3, save_every=10, warmup=1))
    assert logged_steps[-1].loss < 0.8 * logged_steps[0].loss


def test_mixer_rate_scales_the_mixers_learning_rate(config, world):
    """The Mixer first has a gradient in the second step: in the first, the zero convolutions block it."""
    config = replace(config, steps=2, save_every=2, ema=0.0, weight_decay=0.0)
    start = facesnap_file.load(world / "start.safetensors").mixer.queries
    full, tenth = (
        facesnap_file.load(
            trainer.train(replace(config, out=config.out / str(rate), mixer_rate=rate)) / checkpoints.WEIGHTS
        )
        for rate in (1.0, 0.1)
    )
    assert torch.equal(tenth.ffrnet.controlnet_mid_block.weight, full.ffrnet.controlnet_mid_block.weight)
    assert (full.mixer.queries - start).abs().max() > 1e-4
    torch.testing.assert_close(tenth.mixer.queries - start, 0.1 * (full.mixer.queries - start), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(("method", "rates"), [("facesnap", [1.0, 0.1]), ("instantid", [1.0, 1.0])])
def test_mixer_rate_is_of_facesnaps_mixer_only(config, method, rates):
    """InstantID's Resampler is called mixer, too."""
    networks = torch.nn.ModuleDict({"ffrnet": torch.nn.Linear(1, 1), "mixer": torch.nn.Linear(1, 1)})
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None))
    optimizer = prepare._optimizer(replace(config, method=method, mixer_rate=0.1), networks, accelerator)
    assert [group["rate"] for group in optimizer.param_groups] == rates


@pytest.mark.parametrize(
    ("start", "every", "expected"),
    [(0, 1, [1, 2, 3, 4, 5, 6]), (0, 2, [1, 3, 5]), (3, 1, [4, 5, 6]), (3, 2, [4, 6]), (6, 1, [])],
)
def test_l_id_is_computed_in_these_steps(config, start, every, expected):
    config = replace(config, id_rows=2, id_start=start, id_every=every)
    assert [step for step in range(1, 7) if trainer.id_rows_at(config, step)] == expected


def test_resumed_run_equals_an_uninterrupted_one(config, logged_steps, monkeypatch):
    config = replace(config, steps=4, schedule="cosine", gradient_accumulation=2, id_every=2)
    uninterrupted = trainer.train(replace(config, out=config.out / "uninterrupted"))
    expected = list(logged_steps)
    assert [step.number for step in expected] == [1, 2, 3, 4]
    assert [step.id is not None for step in expected] == [True, False, True, False]

    logged_steps.clear()
    log = trainer._log

    def die(board, step, bar):
        log(board, step, bar)
        if step.number == 3:
            raise Killed

    monkeypatch.setattr(trainer, "_log", die)
    interrupted = replace(config, out=config.out / "interrupted")
    with pytest.raises(Killed):
        trainer.train(interrupted)
    torch.manual_seed(99)  # the global random state must not matter
    (interrupted.out / ".step-0000004.part").mkdir()
    monkeypatch.setattr(trainer, "_log", log)
    resumed = trainer.train(interrupted, resume=True)
    assert logged_steps == expected[:3] + expected[2:]  # bit-identical
    assert names(resumed) == names(uninterrupted)
    for name, tensor in load_file(uninterrupted / checkpoints.WEIGHTS).items():
        assert torch.equal(tensor, load_file(resumed / checkpoints.WEIGHTS)[name]), name


def test_training_stops_with_a_checkpoint_when_the_minutes_are_over(config):
    config = replace(config, steps=3, id_rows=0, save_every=3, sample_every=0)
    assert trainer.train(config, minutes=0).name == "step-0000001"
    assert trainer.train(config, resume=True, minutes=60).name == "step-0000003"


def test_run_in_an_object_store_is_resumed_on_another_machine(config, logged_steps, monkeypatch, tmp_path):
    """Shards are read from the store, checkpoints are copied to it, and every seventh request fails."""
    for package in ("moto", "s3fs"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.setattr(storage, "WAITS", (0.01,) * 5)
    with s3_server() as server:
        url = location(f"s3://{BUCKET}/run")
        for path in config.shards:
            for file in (path, index_of(path)):
                (url.parent / "shards" / file.name).upload(file)
        server.fail_every = 7
        remote = replace(config, shards=tuple((url.parent / "shards").glob("*.tar")), upload=url)
        remote = replace(remote, steps=2, save_every=1, keep=1, id_rows=0, face_pack=None)
        finish = uploads.finish
        monkeypatch.setattr(uploads, "finish", die_at(finish, 2))
        with pytest.raises(Killed):
            trainer.train(remote)
        monkeypatch.setattr(uploads, "finish", finish)
        assert uploads.complete_steps(url) == [1]
        other = replace(remote, out=tmp_path / "other")
        with pytest.raises(FaceSnapError, match=f"^{url} is not empty; resume the run with --resume"):
            trainer.train(other)
        last = trainer.train(other, resume=True)
        assert uploads.complete_steps(url) == [2]
        files = url.list_files()
    assert {name.split("/")[0] for name in files} == {"step-0000002", "logs"}
    assert files["step-0000002/facesnap.safetensors"] == (last / checkpoints.WEIGHTS).stat().st_size
    before_death = checkpoints.partial_folder(config.out, 2)
    for name, tensor in load_file(last / checkpoints.WEIGHTS).items():
        assert torch.equal(tensor, load_file(before_death / checkpoints.WEIGHTS)[name]), name


def die_at(finish, last):
    def finish_or_die(url, out, step, keep):
        if step == last:
            raise Killed
        finish(url, out, step, keep)

    return finish_or_die


def test_resuming_before_the_first_checkpoint_starts_from_the_beginning(config, logged_steps):
    config.out.mkdir()
    (config.out / "logs").mkdir()
    assert trainer.train(replace(config, steps=2), resume=True).name == "step-0000002"


def test_a_resumed_run_has_the_configurations_mixer_rate(config):
    config = replace(config, steps=2, id_rows=0, save_every=1, sample_every=0, ema=0.0)
    before = facesnap_file.load(trainer.train(config, minutes=0) / checkpoints.WEIGHTS)
    after = facesnap_file.load(trainer.train(replace(config, mixer_rate=0.0), resume=True) / checkpoints.WEIGHTS)
    assert torch.equal(after.mixer.queries, before.mixer.queries)
    assert not torch.equal(after.ffrnet.controlnet_mid_block.weight, before.ffrnet.controlnet_mid_block.weight)


def test_resuming_a_finished_run_does_nothing(config, logged_steps):
    config = replace(config, steps=2)
    done = trainer.train(config)
    logged_steps.clear()
    assert trainer.train(config, resume=True) == done
    assert not logged_steps


def test_existing_folder_is_not_overwritten(config):
    config.out.mkdir()
    (config.out / "notes.txt").write_text("mine")
    with pytest.raises(FaceSnapError, match="--resume"):
        trainer.train(config)
    assert names(config.out) == ["notes.txt"]


def test_error_for_non_finite_loss_names_step_and_last_checkpoint(config, logged_steps, monkeypatch):
    real, calls = trainer.compute_losses, []

    def diverge(*arguments):
        calls.append(1)
        losses = real(*arguments)
        return losses if len(calls) < 4 else replace(losses, total=losses.total * math.inf)

    monkeypatch.setattr(trainer, "compute_losses", diverge)
    with pytest.raises(FaceSnapError, match=r"loss is not finite at step 4.*last good checkpoint is .*step-0000002"):
        trainer.train(config)
    assert checkpoints.list_checkpoints(config.out)[-1][0] == 2


def test_non_finite_gradient_does_not_change_the_networks(config, monkeypatch):
    run = prepare_run(config)
    before = [parameter.detach().clone() for parameter in run.networks.parameters()]
    run.networks.mixer.queries.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FaceSnapError, match=r"gradient is not finite at step 1.*no checkpoint yet"):
        list(trainer.steps(run, 0))
    for own, parameter in zip(before, run.networks.parameters(), strict=True):
        assert torch.equal(own, parameter)


def test_full_disk_leaves_the_last_checkpoint_intact(config, logged_steps, monkeypatch):
    """A limit on file sizes simulates the full disk: the operating system rejects the write."""
    real = trainer.save_checkpoint
    kept = {}

    def save_on_full_disk(run, step):
        if step == 2:
            return real(run, step)
        kept.update({path: path.read_bytes() for path in config.out.glob("step-*/**/*") if path.is_file()})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
        try:
            real(run, step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(trainer, "save_checkpoint", save_on_full_disk)
    with pytest.raises(
        FaceSnapError, match=r"checkpoint of step 4 cannot be written.*free some disk space.*step-0000002"
    ):
        trainer.train(config)
    assert names(config.out) == ["logs", "step-0000002"]
    assert kept
    for path, content in kept.items():
        assert path.read_bytes() == content
    monkeypatch.setattr(trainer, "save_checkpoint", real)
    assert trainer.train(config, resume=True).name == "step-0000004"


def test_checkpoints_are_renamed_when_complete_and_only_the_newest_are_kept(config, logged_steps, monkeypatch):
    finish, states = checkpoints.finish, []

    def record(folder, step, keep):
        part = checkpoints.partial_folder(folder, step)
        states.append((step, [number for number, _ in checkpoints.list_checkpoints(folder)], names(part)))
        return finish(folder, step, keep)

    monkeypatch.setattr(checkpoints, "finish", record)
    trainer.train(replace(config, save_every=1, keep=2))
    complete = ["average-0.pt", "facesnap.safetensors", "state"]
    assert states == [(1, [], complete), (2, [1], complete), (3, [1, 2], complete), (4, [2, 3], complete)]
    assert [number for number, _ in checkpoints.list_checkpoints(config.out)] == [3, 4]


def test_error_names_the_damaged_checkpoint(config, logged_steps):
    trainer.train(replace(config, steps=2))
    (config.out / "step-0000002" / "state" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(FaceSnapError, match=r"step-0000002 cannot be resumed"):
        trainer.train(config, resume=True)


def test_files_that_do_not_fit_together_are_rejected(config, world, tmp_path):
    from facesnap_lab.training.shard_writer import write_shards
    from tests.support.training_world import samples

    with pytest.raises(FaceSnapError, match="'resolution' is 36 but must be a multiple"):
        prepare_run(replace(config, resolution=36))
    short = [replace(sample, embedding=sample.embedding[:64]) for sample in samples(1)]
    shards = tuple(write_shards(tmp_path / "short", short, 9))
    with pytest.raises(FaceSnapError, match="expects ArcFace embeddings of 512"):
        prepare_run(replace(config, shards=shards))
    for field in ("start", "clip"):
        invalid = tmp_path / field
        invalid.write_bytes(b"nothing")
        with pytest.raises(FaceSnapError, match=field):
            prepare_run(replace(config, **{field: invalid}))
    shutil.copytree(world / "base", tmp_path / "base")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    (tmp_path / "base" / "model_index.json").write_text(json.dumps({**index, "unet": ["diffusers", "Nothing"]}))
    with pytest.raises(FaceSnapError, match="cannot be loaded as an SDXL model"):
        prepare_run(replace(config, base=tmp_path / "base"))
    with pytest.raises(FaceSnapError, match=r"start\.safetensors cannot be loaded as an SDXL model.*base_config"):
        prepare_run(replace(config, base=world / "start.safetensors"))


def test_mixed_precision_training_keeps_float32_weights(config, logged_steps):
    done = trainer.train(replace(config, steps=2, mixed_precision="bf16", gradient_checkpointing=True))
    assert all(math.isfinite(step.loss) for step in logged_steps)
    assert {t.dtype for t in load_file(done / "state" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 5, 0.5),
        ("constant", 10, 1),
        ("constant", 110, 1),
        ("cosine", 5, 0.5),
        ("cosine", 60, 0.5),
        ("cosine", 110, 0),
    ],
)
def test_learning_rate_schedules(config, schedule, step, expected):
    config = replace(config, schedule=schedule, steps=110, warmup=10, learning_rate=1.0)
    assert trainer.learning_rate_at(config, step) == pytest.approx(expected, abs=1e-9)


def test_average_is_exponential(config):
    from facesnap_lab.training.networks import update_average

    average, parameter = [torch.zeros(3)], torch.ones(3)
    update_average(average, [parameter], 0.9, 1)
    torch.testing.assert_close(average[0], torch.full((3,), 1 - 2 / 11))  # the decay is smaller in the first steps
    update_average(average, [parameter], 0.9, 1000)
    torch.testing.assert_close(average[0], torch.full((3,), 0.9 * (1 - 2 / 11) + 0.1))
