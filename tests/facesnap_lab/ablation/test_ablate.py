"""An ablation in the tiny world: each row's training, reruns, and recovery after an interruption."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support import tiny
from tests.support.training_world import make_world, train_config

for package in ("accelerate", "diffusers", "onnx", "peft", "scipy", "tensorboard", "torchmetrics", "webdataset"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.weights import facesnap_file
from facesnap_lab import statistics
from facesnap_lab.ablation import ablate as ablation
from facesnap_lab.ablation.ablate import AblationConfig, ablate, read_ablation, training_folder
from facesnap_lab.ablation.pictures import Features, JudgeFeatures, RealPhotoFeatures, Subject
from facesnap_lab.ablation.rows import MIXER, TABLE_2, TABLE_3, reference_rows, trainings
from facesnap_lab.cli.main import main
from facesnap_lab.miniature.shipped import Sampler
from facesnap_lab.training import prepare, trainer
from facesnap_lab.training.checkpoints import WEIGHTS, list_checkpoints
from facesnap_lab.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

PEOPLE = 2


class Killed(BaseException):
    """Like KeyboardInterrupt, this is not an Exception, so nothing catches it."""


class TinySetup:
    """Subjects that consist of noise, and judges that treat an image's colours as its face."""

    def __init__(self, pipe):
        self.sampler = Sampler(pipe, steps=1, scale=2.0)
        self.judges = self
        self.distances = {"pair_distance_mm": 2.0, "mean_distance_mm": 1.0}

    def subject(self, index: int) -> Subject:
        pictures = np.random.default_rng(index).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
        return Subject(tuple(pictures[:2]), pictures[2], tuple(pictures[3:]), "a photo of a person", index)

    def features(self, index: int, subject: Subject) -> Features:
        g = torch.Generator().manual_seed(index)
        predicted, driving = (tiny.landmarks(2 * index + i, 32, 32) for i in range(2))
        return Features(torch.randn(2, 512, generator=g), torch.randn(2, 5, 32, generator=g), predicted, driving)

    def features_of(self, image: np.ndarray) -> JudgeFeatures:
        colours = image.reshape(4, 8, 4, 8, 3).mean((1, 3)).ravel() - 127
        return JudgeFeatures(colours, colours[::2], colours[1::2], colours[:3])

    def real_photos(self, index: int) -> RealPhotoFeatures:
        subject = self.subject(index)
        return RealPhotoFeatures(
            self.features_of(subject.references[0]),
            self.features_of(subject.driving),
            tuple(map(self.features_of, subject.unseen)),
        )


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def config(tiny_world) -> AblationConfig:
    train = replace(train_config(tiny_world, Path()), steps=2, save_every=1, id_rows=0)
    return AblationConfig(train, seeds=(3,), people=PEOPLE, references=(1, 2))


@pytest.fixture(scope="module")
def frozen(config):
    return prepare.load_frozen(config.train, torch.device("cpu"))


@pytest.fixture(scope="module")
def setup(frozen) -> TinySetup:
    return TinySetup(frozen.pipe)


@pytest.fixture(scope="module", autouse=True)
def quick(frozen):
    """Share the frozen networks among all training runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "load_frozen", lambda config, device: frozen)
        patch.setattr(statistics, "RESAMPLES", 50)
        yield


@pytest.fixture(scope="module")
def done(config, setup, tmp_path_factory) -> Path:
    """A finished ablation."""
    out = tmp_path_factory.mktemp("ablation")
    ablate(config, out, setup)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_rows_that_differ_only_at_inference_share_a_training():
    rows = (*TABLE_2, *TABLE_3, *reference_rows((1, 2, 4, 8)))
    assert [training.name for training in trainings(rows)] == [
        *("id", "clip", "concat", "mixer", "no-ffrnet", "no-landmarks")
    ]
    assert TABLE_3[2].training == TABLE_3[3].training == TABLE_2[3].training
    assert {row.training for row in reference_rows((1, 2, 4, 8))} == {MIXER.training}
    assert [(row.references, row.average) for row in reference_rows((1, 4))] == [(1, False), (4, True), (4, False)]


def test_trainings_have_their_own_mixer_and_the_same_budget(config, done):
    weights = {}
    for training in trainings(config.rows):
        folder = training_folder(done, 3, training)
        assert [step for step, _ in list_checkpoints(folder)] == [1, 2]
        weights[training.name] = facesnap_file.load(list_checkpoints(folder)[-1][1] / WEIGHTS)
    kinds = {name: one.info.to_metadata()["mixer_kind"] for name, one in weights.items()}
    ablated = {"id": "id only", "clip": "clip only", "concat": "concatenation"}
    assert kinds == dict.fromkeys(weights, "facial attributes") | ablated
    assert all("2 steps, 4 images seen" in one.info.trained_on for one in weights.values())
    trained = {name: bool(one.ffrnet.controlnet_mid_block.weight.any()) for name, one in weights.items()}
    assert trained == {name: name != "no-ffrnet" for name in weights}


def test_ablation_writes_tables_images_and_a_sheet(config, done):
    found = json.loads((done / "results.json").read_text())
    assert set(found["rows"]) == {row.name for row in config.rows}
    assert found["about"]["steps"] == 2
    assert found["about"]["images_per_step"] == 2
    text = (done / "ablation.md").read_text()
    for row in (*TABLE_2, *TABLE_3):
        line = next(line for line in text.splitlines() if line.startswith(f"| {row.title} |"))
        assert line.endswith(" | ".join(f"{number:g}" for number in row.paper) + " |")
    assert "Too little data for conclusions" in text
    assert (done / "sheet.png").is_file()
    for row in config.rows:
        assert len(list((done / "seed-3" / "pictures" / row.name).iterdir())) == PEOPLE


def test_rerun_does_no_work(config, setup, done, monkeypatch):
    before = content(done)
    monkeypatch.setattr(trainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    monkeypatch.setattr(ablation, "draw", lambda *args: pytest.fail("generated again"))
    monkeypatch.setattr(setup, "features_of", lambda image: pytest.fail("judged again"), raising=False)
    ablate(config, done, setup)
    assert content(done) == before


def test_interrupted_run_ends_like_an_uninterrupted_one(config, setup, done, tmp_path, monkeypatch):
    """Interrupt the second training, then the generation of images."""
    out = shutil.copytree(done, tmp_path / "out")
    second = trainings(config.rows)[1]
    for rest in (training_folder(out, 3, second), out / "seed-3" / "pictures", out / "seed-3" / "scores"):
        shutil.rmtree(rest)
    for file in ("real.npz", "results.json", "ablation.md", "sheet.png"):
        (out / file).unlink()
    log, draw, steps, generated = trainer._log, ablation.draw, [], []

    def train_until_killed(board, step, bar):
        log(board, step, bar)
        steps.append(step.number)
        if step.number == 2:  # before the checkpoint of this step is written
            raise Killed

    def draw_until_killed(*arguments):
        generated.append(1)
        if len(generated) == 5:
            raise Killed
        return draw(*arguments)

    monkeypatch.setattr(trainer, "_log", train_until_killed)
    with pytest.raises(Killed):
        ablate(config, out, setup)
    monkeypatch.setattr(trainer, "_log", lambda board, step, bar: steps.append(step.number))
    monkeypatch.setattr(ablation, "draw", draw_until_killed)
    with pytest.raises(Killed):
        ablate(config, out, setup)
    assert steps == [1, 2, 2]  # resumes from the checkpoint; nothing else is trained
    monkeypatch.setattr(ablation, "draw", lambda *arguments: generated.append(1) or draw(*arguments))
    ablate(config, out, setup)
    assert len(generated) == PEOPLE * len(config.rows) + 1  # one image was lost

    actual, expected = content(out), content(done)
    names = [name for name in expected if Path(name).suffix in (".png", ".npz", ".md") or name == "results.json"]
    assert len(names) == len(config.rows) * (PEOPLE + 1) + 4  # images and scores; tables, sheet, real photos
    assert [name for name in names if actual[name] != expected[name]] == []
    one, other = (
        load_file(list_checkpoints(training_folder(path, 3, second))[-1][1] / WEIGHTS) for path in (out, done)
    )
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_rerun_with_other_settings_is_rejected(config, setup, done):
    with pytest.raises(FaceSnapError, match="'steps' is 2 and not 3"):
        ablate(replace(config, train=replace(config.train, steps=3)), done, setup)
    with pytest.raises(FaceSnapError, match="'people' is 2 and not 3"):
        ablate(replace(config, people=3), done, setup)


def write(path: Path, train: TrainConfig, **changes) -> Path:
    own = (*ablation.RESERVED_FIELDS, "shards")
    values = {n: str(v) if isinstance(v, Path) else v for n, v in vars(train).items() if n not in own}
    path.write_text(yaml.safe_dump({**values, "shards": list(map(str, train.shards)), **changes}))
    return path


def test_yaml_extends_the_training_config(config, tmp_path):
    found = read_ablation(write(tmp_path / "a.yaml", config.train, seeds=[5, 7], people=9))
    assert (found.seeds, found.people, found.references) == ((5, 7), 9, (1, 2, 4, 8))
    assert (found.train.steps, found.train.start) == (2, config.train.start)


def test_selected_rows_need_only_their_trainings(config, tmp_path):
    found = read_ablation(write(tmp_path / "a.yaml", config.train, only=["mixer", "concat"]))
    assert [row.name for row in found.rows] == ["concat", "mixer"]
    assert [training.name for training in trainings(found.rows)] == ["concat", "mixer"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seeds", [1, 1], "'seeds' .* different whole numbers"),
        ("seeds", 3, "'seeds' .* list"),
        ("references", [9], "'references' .* from 1 to 8"),
        ("people", 1, "'people' .* at least 2"),
        ("only", ["mixer", "bigger"], "'only' .* list of row names; the rows are id, clip, concat, mixer, "),
        ("landmarks", "none", "'landmarks' .* set by the ablation itself"),
        ("speed", 1, "unknown field 'speed'"),
        ("warm_up", -1, "'warm_up' .* at least 0"),
        ("stages", "nowhere", "'stages' .* not a folder of the second edition's stages"),
    ],
)
def test_errors_in_the_yaml_are_reported(config, tmp_path, capsys, field, value, message):
    path = write(tmp_path / "a.yaml", config.train, **{field: value})
    with pytest.raises(FaceSnapError, match=message):
        read_ablation(path)
    assert main(["ablation", str(path), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("facesnap: ")
    assert not (tmp_path / "out").exists()


def test_rows_of_the_second_edition_have_their_own_start_and_losses(config, setup, tmp_path, monkeypatch):
    """Rows without landmarks start from an FFRNet that was warmed up without any."""
    trained = {}

    def train(train_config, resume):
        trained[train_config.out.name] = train_config
        folder = train_config.out / f"step-{train_config.steps:07d}"
        folder.mkdir(parents=True)
        weights = facesnap_file.load(train_config.start)
        weights.ffrnet.controlnet_mid_block.weight.data.fill_(len(trained))
        facesnap_file.save(folder / WEIGHTS, weights.info, weights.mixer, weights.ffrnet)

    def with_second_photo(index):
        real = photos(index)
        return replace(real, second=real.unseen[0])

    photos = setup.real_photos
    monkeypatch.setattr(setup, "real_photos", with_second_photo)
    monkeypatch.setattr(trainer, "train", train)
    monkeypatch.setattr(ablation, "draw", lambda *arguments: np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "quality.json").write_text("{}")
    names = ["no-landmarks", "mixer", "no-id", "paper-losses"]
    file = write(tmp_path / "a.yaml", config.train, stages=str(tmp_path), warm_up=5, people=2, seeds=[3], only=names)
    second = read_ablation(file)
    out = tmp_path / "out"
    ablate(second, out, setup)
    assert [name for name in trained if "warm" not in name] == [f"train-{row.name}" for row in second.rows]
    assert {name: (one.steps, one.landmarks) for name, one in trained.items() if "warm" in name} == {
        "warm-up-none": (5, "none"),
        "warm-up-drawn": (5, "drawn"),
    }
    fill = {name: number for number, name in enumerate(trained, 1)}
    for name, warm_up in (("no-landmarks", "none"), ("mixer", "drawn"), ("no-id", "drawn")):
        start = facesnap_file.load(trained[f"train-{name}"].start)
        assert (start.ffrnet.controlnet_mid_block.weight == fill[f"warm-up-{warm_up}"]).all()
    assert trained["train-mixer"].id_rows == config.train.id_rows
    assert trained["train-no-id"].id_rows == 0
    paper = trained["train-paper-losses"]
    assert (paper.outside, paper.terminal, paper.snr_weights, paper.lightning_grad_steps) == (0.0, 0.0, False, 1)
    text = (out / "ablation.md").read_text()
    assert "## Training losses" in text
    assert "| recommended losses over without L_id | FaceSim, other looks |" in text
    trained.clear()
    ablate(second, out, setup)
    assert not trained
    with pytest.raises(FaceSnapError, match="'warm_up' is 5 and not 6"):
        ablate(replace(second, warm_up=6), out, setup)
