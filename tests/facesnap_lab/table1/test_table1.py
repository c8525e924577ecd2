"""Table 1 with people of the miniature's first edition, and with a training that only initialises each method."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("accelerate", "diffusers", "insightface", "onnx", "tensorboard", "torchmetrics", "webdataset"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from facesnap_ext.cache import Cache
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.identity.encoders import Encoders
from facesnap_ext.photos import from_path
from facesnap_ext.weights import facesnap_file
from facesnap_ext.weights.search import find_models
from facesnap_lab import statistics
from facesnap_lab.cli.main import main
from facesnap_lab.evaluation.draw import Base
from facesnap_lab.evaluation.miniature import miniature_judges, miniature_protocol
from facesnap_lab.miniature import shipped
from facesnap_lab.rivals.methods import METHODS
from facesnap_lab.table1 import report
from facesnap_lab.table1 import run as module
from facesnap_lab.table1.generators import NoPerson, TrainedRival, references
from facesnap_lab.table1.run import run
from facesnap_lab.table1.scores import FACESNAP, LIMITS, pictures, read_scores
from facesnap_lab.table1.world import World
from facesnap_lab.training.checkpoints import WEIGHTS
from facesnap_lab.training.config import TrainConfig
from tests.facesnap_lab.rivals.conftest import without_output

SIDE = 64
ROWS = ("ip-adapter-face", FACESNAP)


def files_with(file: Path, folder: Path):
    shipped.write_models(folder)
    shutil.copyfile(file, folder / "facesnap.safetensors")
    return find_models(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    protocol = miniature_protocol(tmp_path_factory.mktemp("people"), people=2, poses=2, prompts=1)
    same = tuple(replace(one, photos=one.photos[:1]) for one in protocol.identities)
    base = Base(shipped.few_step_sampler().pipe, "miniature", SIDE, SIDE, steps=1, scale=2.0)
    train = TrainConfig(
        base=Path(), shards=Path(), start=shipped.FACESNAP, clip=Path(), out=Path(), steps=2, batch_size=3
    )
    return World(train, protocol, replace(protocol, identities=same), base, miniature_judges(), files_with)


def untrained(world: World, method: str, seed: int = 0):
    torch.manual_seed(seed)
    return METHODS[method].create(facesnap_file.load(shipped.FACESNAP), world.base.pipe.unet)


@pytest.fixture
def trained(world, monkeypatch):
    """Replaces the training, and returns what was trained, with the number of steps of each."""
    calls = []

    def train(config, resume, minutes):
        assert resume
        assert minutes > 0
        done = module._steps(config.out) + 1
        calls.append((config.method, config.seed, done))
        folder = config.out / f"step-{done:07d}"
        folder.mkdir(parents=True)
        if config.method == FACESNAP:
            shutil.copyfile(config.start, folder / WEIGHTS)
        else:
            untrained(world, config.method, config.seed).save(folder / f"{config.method}.safetensors", info(config))
        return folder

    def info(config):
        return facesnap_file.load(config.start).info

    monkeypatch.setattr(module.trainer, "train", train)
    monkeypatch.setattr(statistics, "RESAMPLES", 50)
    monkeypatch.setattr(module, "TIMED", 1)
    monkeypatch.setattr(report, "logged", lambda folder, tag: (np.arange(1, 5), np.arange(4.0)))
    return calls


@pytest.fixture
def rival(world, tmp_path):
    """Returns a generator with a method's untrained weights."""

    def generator(method: str, change) -> TrainedRival:
        network = untrained(world, method)
        change(network)
        encoders = Encoders(Cache(), files_with(shipped.FACESNAP, tmp_path / "models"))
        return TrainedRival(world.base, network.eval(), shipped.FACESNAP, encoders)

    return generator


@torch.no_grad()
def strongly(network):
    for parameter in network.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_changes_the_base_by_its_weights_alone(world, rival, method):
    """With zero outputs, the picture is the base's; the pipeline is as before in either case."""
    case = world.protocol.cases()[0]
    plain = NoPerson(world.base).draw(case).astype(int)
    with rival(method, without_output).installed() as silent, rival(method, strongly).installed() as loud:
        if method != "photomaker":  # which always replaces the text's word for the person
            assert np.abs(silent.draw(case) - plain).max() <= 1
        person = loud.draw(case).astype(int)
        assert np.abs(person - plain).max() > 4
        assert np.array_equal(loud.draw(case), person)
        other = replace(case, identity=world.protocol.identities[1])
        assert np.abs(loud.draw(other) - person).max() > 0  # a different person
        turned = replace(case, pose=world.protocol.poses[1])
        assert np.array_equal(loud.draw(turned), person) == (method != "instantid")
    assert np.array_equal(NoPerson(world.base).draw(case), plain)


def test_references_are_encoded_as_in_training(world, rival):
    encoders = rival("pulid", lambda network: None).encoders
    paths = [one.references[0] for one in world.protocol.identities]
    faces = [encoders.face(from_path(path)) for path in paths]
    given = references(encoders, faces, clip_side=32, side=32)
    assert given.embeddings.shape == (2, faces[0].embedding.size)
    assert given.clip_pixels.shape == (2, 3, 32, 32)
    assert given.images.shape == (2, 32, 32, 3)
    assert given.images.dtype == torch.uint8
    whole = references(encoders, faces, clip_side=32, side=SIDE)
    torch.testing.assert_close(2 * given.points, whole.points)
    boxes = torch.from_numpy(np.stack([face.box for face in faces]))
    inside = (whole.points > boxes[:, None, :2] - 8) & (whole.points < boxes[:, None, 2:] + 8)
    assert inside.all()


def test_one_command_trains_draws_measures_and_reports(world, trained, tmp_path):
    """It is interrupted once, and called again with one more seed."""
    out = tmp_path / "out"
    assert run(world, out, [0], methods=ROWS) is None  # the first training has stopped before its last step
    assert trained == [("ip-adapter-face", 0, 1)]
    assert run(world, out, [0], methods=ROWS) is None
    path = run(world, out, [0], methods=ROWS)
    assert trained[1:] == [("ip-adapter-face", 0, 2), (FACESNAP, 0, 1), (FACESNAP, 0, 2)]
    images = {file: file.stat().st_mtime_ns for file in out.rglob("pictures/**/*.png")}
    cases = world.protocol.cases()
    assert len(images) == len(cases) * (len(LIMITS) + len(ROWS))

    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [*LIMITS, *ROWS]
    assert rows["copy"]["position"]["mean"] == pytest.approx(1)
    assert rows["stranger"]["position"]["mean"] == pytest.approx(0)
    assert rows["no-person"]["seconds"] == 1
    assert rows[FACESNAP]["seconds"] > 0
    assert rows[FACESNAP]["weights_mb"] == pytest.approx(shipped.FACESNAP.stat().st_size / 1e6, rel=0.2)
    scores = {row: read_scores(out, row, 0).by_person["face_sim"] for row in (*LIMITS, *ROWS)}
    assert scores["copy"].min() > scores["stranger"].max()
    gains = {(one["rival"], one["metric"]): one for one in found["orders"]}
    expected = (scores[FACESNAP] - scores["ip-adapter-face"]).mean()
    assert gains["ip-adapter-face", "face_sim"]["gain"]["mean"] == pytest.approx(expected)

    for row in ("no-person", "ip-adapter-face", FACESNAP):
        assert all((pictures(out, row, 0) / case.file).is_file() for case in cases)
    text = path.read_text(encoding="utf-8")
    assert "| FaceSnap | " in text
    assert "2 steps of 3 images" in text
    for image in ("sheet.png", "plot.png", "curves.png"):
        assert (out / image).stat().st_size > 10_000

    for _ in range(2):
        run(world, out, [0, 1], methods=ROWS[:1])  # two steps
    assert trained[-1] == ("ip-adapter-face", 1, 2)
    assert {file: file.stat().st_mtime_ns for file in images} == images
    for name, value in {"steps": 3, "learning_rate": 1e-3, "id_weight": 0.0}.items():
        different = replace(world, train=replace(world.train, **{name: value}))
        with pytest.raises(FaceSnapError, match=f"has a table whose '{name}' is"):
            run(different, out, [0], methods=ROWS)


def test_no_training_starts_after_the_time_is_over(world, trained, tmp_path):
    assert run(world, tmp_path, [0], minutes=0, methods=ROWS) is None
    assert trained == []


def test_impossible_tables_are_refused(world, tmp_path):
    alone = replace(world.protocol, identities=world.protocol.identities[:1])
    with pytest.raises(FaceSnapError, match="choose at least two people"):
        run(replace(world, protocol=alone), tmp_path, [0])
    for seeds in ([0, 0], [-1], [2**32]):
        with pytest.raises(FaceSnapError, match="must be different whole numbers"):
            run(world, tmp_path, seeds)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("low", "high", "paper", "seeds", "outcome"),
    [
        (0.05, 0.2, 1.5, 3, "as in the paper"),
        (-0.2, -0.05, -1.5, 2, "as in the paper"),
        (-0.2, -0.05, 1.5, 3, "the opposite"),
        (-0.05, 0.2, 1.5, 3, "not decided"),
        (0.05, 0.2, 1.5, 1, "not decided"),
        (None, None, 1.5, 3, "not decided"),
    ],
)
def test_an_order_needs_two_seeds_and_an_interval_that_excludes_0(low, high, paper, seeds, outcome):
    assert report.outcome(low, high, paper, seeds) == outcome


def test_methods_below_half_of_the_way_are_named(world):
    row = {"name": "pulid", "faceless": [2, 1], "position": {"mean": 0.3}}
    found = {"people": 2, "images": 4, "poses": 2, "prompts": 1, "seeds": [0], "steps": 2, "images_per_step": 3}
    notes = report._notes({**found, "judges": world.judges.names, "rows": [row, {**row, "name": "copy"}]})
    assert [note for note in notes if "budget" in note] == ["PuLID is below 50 %, so its budget was too small."]
    assert "PuLID: 3 of 8 images have no face and count as 0." in notes


def test_command_names_a_missing_folder(tmp_path, capsys):
    assert main(["table1", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err
