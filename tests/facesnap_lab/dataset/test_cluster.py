"""Builds on a cluster and in an object store give the same bytes as in one process, although both of them fail."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from facesnap_ext.errors import FaceSnapError
from facesnap_lab import storage, workers
from facesnap_lab.cli.main import main
from facesnap_lab.dataset import build as builder
from facesnap_lab.storage import Url, location, write
from facesnap_lab.training.data import ImageSizes, TrainingImages, batch_rows, read_batches
from facesnap_lab.training.shards import read_labels, read_sample, read_shard_index, select_images
from facesnap_lab.workers import Task, open_workers
from tests.support import work
from tests.support.dataset_photos import SETTINGS, SIDE
from tests.support.s3_server import BUCKET, SECRET, S3Server, s3_server

distributed = pytest.importorskip("distributed")
for package in ("moto", "s3fs"):
    pytest.importorskip(package, reason=f"{package} is not installed")

DEATHS = 2  # how many workers may die while they do one task


@pytest.fixture(scope="module")
def store() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def cluster(store: S3Server) -> Iterator[str]:
    """The address of a scheduler with two workers, each in its own process, as on two machines."""
    import dask

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": DEATHS - 1}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50, resources={"GPU": 1}
        ) as started,
    ):
        yield started.scheduler_address


@pytest.fixture(scope="module")
def uploaded(store: S3Server, people: Path) -> Url:
    """The photos of the first four of `people` in the object store."""
    url = location(f"s3://{BUCKET}/photos/people")
    for path in sorted(people.glob("n00000[0-3]/*.*")):
        with write(url / path.relative_to(people).as_posix()) as file:
            file.write(path.read_bytes())
    return url


def digests(folder: Path | Url) -> dict[str, str]:
    """Hashes of the files in a folder, but not in its subfolders."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in storage.file_names(folder)
        if "." in name and name != "report.jsonl"
    }


def test_results_have_the_order_of_the_tasks(cluster, monkeypatch):
    progress = []
    tasks = [Task(f"task {number}", number + 1, number) for number in range(9)]
    monkeypatch.setattr(workers, "SUBMITTED", 4)
    with open_workers(1, cluster) as run_tasks:
        assert run_tasks(work.square, tasks, progress.append) == [number**2 for number in range(9)]
        assert sorted(progress) == list(range(1, 10))
        with pytest.raises(FaceSnapError, match=r"^Task 7 fails; nothing can be done"):
            run_tasks(work.fail, tasks[7:8], progress.append)


def test_task_whose_workers_always_die_is_named(cluster, tmp_path):
    with open_workers(1, cluster) as run_tasks, pytest.raises(FaceSnapError, match=r"^shard-7\.tar cannot .*died"):
        run_tasks(work.die, [Task("shard-7.tar", 1, (tmp_path, 99))], lambda size: None)
    assert len(list(tmp_path.iterdir())) == DEATHS


def test_cluster_with_other_versions_or_without_gpus_is_rejected(cluster, monkeypatch):
    task = [Task("task", 1, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(workers, "_versions", lambda: {"Pillow": "1.0"})
        with (
            open_workers(1, cluster) as run_tasks,
            pytest.raises(FaceSnapError, match=r"has Pillow [\d.]+, but .* 1\.0;"),
        ):
            run_tasks(work.square, task, lambda size: None)
    with monkeypatch.context() as patch, open_workers(1, cluster, gpu=True) as run_tasks:
        submitted = mock.create_autospec(distributed.Client.submit, side_effect=distributed.Client.submit)
        patch.setattr(distributed.Client, "submit", submitted)
        assert run_tasks(work.square, task, lambda size: None) == [4]
        assert submitted.call_args.kwargs["resources"] == {"GPU": 1}
    monkeypatch.setattr(workers, "GPU", "TPU")
    with (
        pytest.raises(FaceSnapError, match=r"has the resource TPU; start one with"),
        open_workers(1, cluster, gpu=True),
    ):
        pass


def test_unreachable_scheduler_is_reported():
    import dask

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "0.2s"}),
        pytest.raises(FaceSnapError, match=r"The scheduler tcp://127\.0\.0\.1:9 cannot be reached"),
        open_workers(1, "tcp://127.0.0.1:9"),
    ):
        pass


def check(out: Url, built: Path) -> None:
    """Check that a build of `uploaded` has the bytes of a local one, and contains no secrets."""
    made, expected = digests(out), digests(built)
    assert {name: expected.get(name) for name in made} == {**made, "plan.jsonl": expected["plan.jsonl"]}
    assert {f"shard-00000{n}.{kind}" for n in (0, 1) for kind in ("tar", "index.json")} < made.keys()
    for name in out.list_files():
        assert SECRET.encode() not in (out / name).read_bytes()


def test_cluster_of_which_a_worker_is_killed_builds_the_same_bytes(
    cluster, uploaded, built, models, tmp_path, monkeypatch, capfd
):
    out = location(f"s3://{BUCKET}/cluster/shards")
    options = {"out": out, "models": models, "resolution": SIDE, "crops": SETTINGS.crops, "per-shard": 4}
    options |= {"min-face": SETTINGS.min_face, "scheduler": cluster}
    monkeypatch.setattr(builder, "build_shard", partial(work.build_after_death, tmp_path))
    assert main(["dataset", "build", str(uploaded), *(f"--{name}={value}" for name, value in options.items())]) == 0
    assert len(list(tmp_path.iterdir())) == 1
    check(out, built)
    output = capfd.readouterr()
    assert SECRET not in output.out + output.err


def test_build_in_an_object_store_that_often_fails_gives_the_same_bytes(store, uploaded, built, models, monkeypatch):
    """Every seventh request fails, and the build is continued after a shard is lost."""
    monkeypatch.setattr(storage, "WAITS", (0.01,) * 5)
    monkeypatch.setattr(store, "fail_every", 7)
    out = location(f"s3://{BUCKET}/process/shards")
    builder.build([uploaded], out, models, SETTINGS, per_shard=4, workers=0)
    for name in ("work/shard-000001.json", "shard-000001.tar"):
        (out / name).delete()
    builder.build([uploaded], out, models, SETTINGS, per_shard=4, workers=0)
    monkeypatch.setattr(store, "fail_every", 0)
    check(out, built)


def test_training_reads_the_same_images_from_an_object_store(store, built, monkeypatch):
    url = location(f"s3://{BUCKET}/process/shards")
    index, local = read_shard_index(url.glob("*.tar")), read_shard_index(sorted(built.glob("*.tar"))[:2])
    for column in ("shard", "start", "end", "json_start", "json_end", "person_start", "person_end"):
        np.testing.assert_array_equal(getattr(index, column), getattr(local, column))
    assert list(read_labels(index)) == list(read_labels(local))
    store.requests.clear()
    assert read_sample(index, 5).image.tobytes() == read_sample(local, 5).image.tobytes()
    assert len(store.requests) == 1
    kept = np.arange(len(local)) % 4 == 1
    assert list(read_labels(select_images(index, kept))) == list(read_labels(select_images(local, kept)))
    monkeypatch.setattr(storage, "WAITS", (0.01,) * 5)
    monkeypatch.setattr(store, "fail_every", 5)
    sizes = ImageSizes(resolution=SIDE, latent_side=12, landmark_side=96, clip_side=28)
    own, expected = (
        list(read_batches(TrainingImages(one, sizes, 0, "other", "drawn", 1.0), batch_rows(2, 0, 1, 0, 4), workers))
        for one, workers in ((index, 1), (local, 0))
    )
    for batch, other in zip(own, expected, strict=True):
        assert batch.captions == other.captions
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.references, other.references)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: None, r"0\.index\.json does not exist; copy both"),
        (lambda index: index[:-9], r"0\.index\.json is damaged"),
        (
            lambda index: index.replace(b'"size": ', b'"size": 1'),
            r"0\.tar has \d+ bytes, but 1\d+ according to",
        ),
        (lambda index: index.replace(b"0-00000", b'0-00000", "'), r"0\.index\.json is damaged"),
        (lambda index: index.replace(b"[[", b"[[{}, ", 1), r"0\.index\.json is damaged"),
        (lambda index: b"[" * 100_000, r"0\.index\.json is damaged"),
    ],
)
def test_damaged_index_of_a_shard_is_reported(change, message, store, built):
    folder = location(f"s3://{BUCKET}/damaged")
    for name in ("shard-000000.tar", "shard-000000.index.json"):
        content = (built / name).read_bytes()
        content = change(content) if name.endswith("json") else content
        if content is not None:
            with write(folder / name) as file:
                file.write(content)
    with pytest.raises(FaceSnapError, match=message):
        read_shard_index([folder / "shard-000000.tar"])
