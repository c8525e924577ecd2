"""Jobs with model files of random numbers: what they measure, and the sizes of the files."""

from __future__ import annotations

import json

import pytest
import torch

from facesnap_ext.engine import Engine
from facesnap_ext.networks import ffrnet
from facesnap_ext.weights import source
from facesnap_ext.weights.search import find_models
from facesnap_lab.benchmarks import memory, random_files
from facesnap_lab.benchmarks.first import FIRST_JOBS, PLAIN, PLAIN_AGAIN, WHOLE_JOBS, as_text
from facesnap_lab.benchmarks.random_files import FULL_SIZE, SMALL_SIZE, Recognition, write_models
from facesnap_lab.cli.main import main

pytest.importorskip("diffusers", reason="diffusers is not installed")
KINDS = ("instantid", "facesnap")


@pytest.fixture(scope="module", params=KINDS)
def models(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_models(folder, request.param, SMALL_SIZE)
    return folder


def run(capsys, what, folder, *options):
    arguments = ["--small", "--json", "--folder", str(folder), "--pixels", "64", *options]
    assert main(["bench", what, *arguments]) == 0
    return json.loads(capsys.readouterr().out)["jobs"]


def test_the_second_job_of_a_person_reads_no_weights(models, capsys, monkeypatch):
    """Jobs end before sampling, so no network of the UNet's size runs."""
    monkeypatch.setattr(ffrnet.FFRNet, "forward", lambda *args: pytest.fail("FFRNet ran"))
    calls = []
    for name in ("load_any", "load_any_adapter"):
        original = getattr(source, name)
        monkeypatch.setattr(
            f"facesnap_ext.engine.{name}",
            lambda path, name=name, original=original: calls.append(name) or original(path),
        )
    jobs = run(capsys, "first", models)
    assert [job["name"] for job in jobs] == [job.name for job in FIRST_JOBS]
    adapter = ["load_any_adapter"] if (models / "ip-adapter.bin").exists() else []
    assert calls == ["load_any", *adapter, *adapter]  # a new person needs the adapter's weights again
    for job in jobs:
        assert sum(job["phases"].values()) == pytest.approx(job["to_first_call"], abs=0.002)
        assert list(job["phases"]) == [
            "model files",
            "detecting the face",
            "loading the FaceSnap file",
            "encoding the face",
            "predicting landmarks",
            "hooks and adapter",
        ]
    assert jobs[1]["processor"] < jobs[0]["processor"] / 5


def test_a_rehearsal_leaves_plain_images_unchanged(models, capsys):
    jobs = run(capsys, "rehearsal", models, "--steps", "1")
    assert [job["name"] for job in jobs] == [job.name for job in WHOLE_JOBS]
    assert jobs[0]["name"] == PLAIN
    assert jobs[-1]["name"] == PLAIN_AGAIN
    assert jobs[-1]["same_as_plain"]
    assert all(0 < job["to_first_call"] < job["seconds"] for job in jobs)
    assert as_text(jobs).splitlines()[-1] == "Plain images before and after: bit-identical"
    jobs[-1]["same_as_plain"] = False
    assert as_text(jobs).splitlines()[-1] == "Plain images before and after: different"


@pytest.mark.parametrize("models", KINDS[:1], indirect=True)
def test_a_table_is_printed_and_the_size_checked(models, capsys):
    assert main(["bench", "first", "--small", "--folder", str(models), "--pixels", "64"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {job.name}" for job in FIRST_JOBS]
    assert main(["bench", "first", "--small", "--pixels", "100"]) == 1
    assert "not a multiple of 64" in capsys.readouterr().err


def test_files_have_the_published_sizes():
    """Parameters of IdentityNet (2.5 GB of halves), ip-adapter.bin (1.69 GB) and glintr100.onnx (261 MB)."""
    config = random_files.ffrnet_config(FULL_SIZE)
    with torch.device("meta"):
        network = ffrnet.FFRNet(config)
        recognition = Recognition(FULL_SIZE.recognition, FULL_SIZE.recognition_width)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == 1_251_014_160
    widths = random_files.cross_attention_widths(FULL_SIZE.widths)
    assert sorted(widths) == [640] * 10 + [1280] * 60
    assert 4 * sum(parameter.numel() for parameter in recognition.parameters()) / 1e6 == pytest.approx(261, rel=0.03)


def test_the_stand_ins_find_the_same_face_as_a_job_needs(models):
    """Every network returns values that the next one takes, so that no phase is skipped."""
    from facesnap_ext.settings.unit import Unit
    from facesnap_lab.benchmarks.first import reference_photo

    engine = Engine(lambda: find_models(models))
    prepared = engine.prepare(Unit(enabled=True, references=(reference_photo(0),)), 128, 128)
    assert prepared.conditioning.tokens.isfinite().all()
    assert prepared.conditioning.landmarks is not None
    assert prepared.predictor == ("DECA and FLAME" if "facesnap" in models.name else "open face model")


@pytest.mark.skipif(memory.resident() is None, reason="the system does not report the memory of a process")
def test_peaks_are_measured_between_two_states():
    with memory.PeakMemory() as peak:
        before = memory.resident().own
        block = torch.ones(50_000_000)
        del block
    assert peak.own - before == pytest.approx(0.2, abs=0.1)
    assert peak.total >= peak.own
