"""The YAML file: how fields are read, and that every error names the file and the field."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.storage import Url, location, write
from facesnap_lab.training.config import TrainConfig, read_config


@pytest.fixture
def write_config(tmp_path: Path):
    """Return a function that writes a valid configuration with changes; `...` omits a field."""
    for name in ("base", "clip", "pack"):
        (tmp_path / name).mkdir()
    for name in ("start.safetensors", "a.tar", "b.tar"):
        (tmp_path / name).touch()

    def write_yaml(**changes) -> Path:
        valid = {
            "base": "base",
            "start": "start.safetensors",
            "clip": "clip",
            "face_pack": "pack",
            "shards": ["*.tar"],
            "out": "run",
        }
        content = {name: value for name, value in {**valid, **changes}.items() if value is not ...}
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write_yaml


def test_defaults_are_those_of_the_paper(write_config, tmp_path):
    config = read_config(write_config())
    assert (config.batch_size, config.steps, config.learning_rate) == (7, 360_000, 1e-5)
    assert (config.drop_text, config.id_weight, config.resolution) == (0.1, 0.5, 1024)
    assert config.shards == (tmp_path / "a.tar", tmp_path / "b.tar")
    assert (config.base, config.out) == (tmp_path / "base", tmp_path / "run")
    assert config.jitter == 4


def test_shards_and_copies_may_be_in_an_object_store(write_config, tmp_path):
    for name in ("b.tar", "a.tar", "a.index.json"):
        with write(location(f"memory://shards/{name}")) as file:
            file.write(b"content")
    config = read_config(write_config(shards=["memory://shards/*.tar", "a.tar"], upload="s3://bucket/run/"))
    assert config.shards == (Url("memory://shards/a.tar"), Url("memory://shards/b.tar"), tmp_path / "a.tar")
    assert config.upload == Url("s3://bucket/run")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("upload", "copies", r"'upload' in .*train\.yaml is '.*copies' but must be a URL such as s3://bucket/run"),
        ("base", "s3://bucket/base", r"'base' in .*train\.yaml is 's3://bucket/base' but must be a local path"),
        ("out", "s3://bucket/out", r"'out' in .*train\.yaml is 's3://bucket/out' but must be a local path"),
        ("shards", ["memory://none/*.tar"], r"No file matches memory://none/\*\.tar, which is listed under 'shards'"),
    ],
)
def test_urls_and_paths_are_not_confused(field, value, message, write_config):
    with pytest.raises(FaceSnapError, match=message):
        read_config(write_config(**{field: value}))


def test_numbers_in_all_yaml_notations_are_read(write_config):
    path = write_config()
    path.write_text(path.read_text() + "learning_rate: 1e-4\nema: 1\nlandmark_jitter: null\nlightning: null\n")
    config = read_config(path)
    assert (config.learning_rate, config.ema, config.lightning) == (1e-4, 1.0, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", "many"),
        ("steps", 1.5),
        ("steps", True),
        ("batch_size", None),
        ("learning_rate", "fast"),
        ("learning_rate", -1),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("drop_text", 1.1),
        ("ema", 2),
        ("schedule", "linear"),
        ("reference", "none"),
        ("landmarks", "yes"),
        ("mixed_precision", False),
        ("gradient_checkpointing", 1),
        ("base", 3),
        ("base", "nowhere"),
        ("start", "nothing.safetensors"),
        ("lightning", "nothing.safetensors"),
        ("shards", "none/*.tar"),
        ("shards", []),
        ("shards", [1]),
        ("shards", {"a": 1}),
        ("id_rows", 8),
        ("lightning_grad_steps", 5),
        ("stpes", 10),
        ("out", ...),
        ("face_pack", ...),
    ],
)
def test_error_names_file_and_field(write_config, field, value):
    with pytest.raises(FaceSnapError) as error:
        read_config(write_config(**{field: value}))
    assert field in str(error.value)
    assert "train.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_face_pack_is_not_required_without_l_id(write_config):
    assert read_config(write_config(face_pack=..., id_rows=0)).face_pack is None


@pytest.mark.parametrize("content", ["steps: [1", "- a\n- b\n", "", "\x00"])
def test_invalid_yaml_is_rejected(content, tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(content)
    with pytest.raises(FaceSnapError, match=r"train\.yaml"):
        read_config(path)


def test_missing_file_is_rejected(tmp_path):
    with pytest.raises(FaceSnapError, match=r"The file .*none\.yaml does not exist"):
        read_config(tmp_path / "none.yaml")


def test_every_field_has_a_type():
    assert set(TrainConfig.__dataclass_fields__) == set(TrainConfig.__annotations__)
