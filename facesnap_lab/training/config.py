"""What a training run is made of, read from a YAML file."""

from __future__ import annotations

import glob
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from facesnap_ext.errors import FaceSnapError


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. Numbers that the paper gives are its own (section 3.1)."""

    base: Path  # SDXL: diffusers' folder, or a checkpoint in one file
    start: Path  # FaceSnap file, as `facesnap init` writes
    clip: Path  # CLIP image encoder
    shards: tuple[Path, ...]  # WebDataset .tar files; the YAML may name them with * and ?
    out: Path  # folder of checkpoints, logs and samples
    face_pack: Path | None = None  # insightface pack with the ArcFace of L_id; not read where id_rows is 0
    base_config: Path | None = None  # diffusers' folder of configurations and tokenizers for a checkpoint in one file

    resolution: int = 1024  # side of the pictures in pixels
    reference: str = "other"  # which picture the identity comes from: another one of the same person, or the same
    landmarks: str = "drawn"  # or none: a black drawing, the paper's ablation
    tokens: str = "ffrnet"  # or text: behind the text's own tokens, FFRNet stands idle; the paper's ablation
    landmark_jitter: float | None = None  # standard deviation in pixels at `resolution`; by default a 256th of it
    drop_text: float = 0.1  # chance of null text

    batch_size: int = 7  # pictures in a process at a time
    gradient_accumulation: int = 1
    steps: int = 360_000
    learning_rate: float = 1e-5
    mixer_rate: float = 1.0  # the Mixer's learning rate, as a part of the above; docs/ablation.md says when to lower it
    weight_decay: float = 0.01
    warmup: int = 500  # steps
    schedule: str = "constant"  # or cosine, down to 0 at the last step
    max_grad_norm: float = 1.0
    ema: float = 0.9999

    snr_weights: bool = False  # weigh errors by the SNR within the bounds below; by default eq. 3 as it is
    snr_low: float = 1.0
    snr_high: float = 5.0
    outside: float = 0.0  # the mask's value outside the face; eq. 3 has 0, which leaves hair and background to chance
    terminal: float = 0.0  # part of the pictures that begin at pure noise, as sampling does

    id_weight: float = 0.5  # lambda_id of eq. 5
    id_rows: int = 1  # pictures of a batch that the lightning branch draws; 0 trains without L_id
    id_every: int = 1  # steps from one L_id to the next
    lightning: Path | None = None  # LoRA or UNet of the few-step model; by default the base itself is one
    lightning_steps: int = 4
    lightning_grad_steps: int = 1  # of these, the last ones that the gradient goes through
    lightning_scale: float = 1.0  # of classifier-free guidance, for a model that is sampled with it; 1: none

    mixed_precision: str = "bf16"
    gradient_checkpointing: bool = True
    seed: int = 0
    workers: int = 2  # processes that read pictures
    log_every: int = 10
    save_every: int = 1000
    keep: int = 3  # checkpoints
    sample_every: int = 1000  # 0: no sample pictures
    sample_count: int = 4
    sample_steps: int = 25
    sample_scale: float = 5.0  # of classifier-free guidance

    license: str = "unknown"  # of the weights, for the FaceSnap file
    trained_on: str = ""  # words about the data, for the FaceSnap file

    @property
    def jitter(self) -> float:
        """Standard deviation of the landmarks' jitter in pixels at `resolution`."""
        return self.resolution / 256 if self.landmark_jitter is None else self.landmark_jitter


CHOICES = {
    "reference": ("other", "same"),
    "landmarks": ("drawn", "none"),
    "tokens": ("ffrnet", "text"),
    "schedule": ("constant", "cosine"),
    "mixed_precision": ("no", "fp16", "bf16"),
}
RANGES = {  # lowest and highest; every other number starts at 0
    "resolution": (16, 8192),
    "drop_text": (0, 1),
    "batch_size": (1, math.inf),
    "gradient_accumulation": (1, math.inf),
    "steps": (1, math.inf),
    "max_grad_norm": (1e-12, math.inf),
    "snr_high": (1e-12, math.inf),
    "outside": (0, 1),
    "terminal": (0, 1),
    "ema": (0, 1),
    "id_every": (1, math.inf),
    "lightning_steps": (1, 1000),
    "lightning_grad_steps": (1, 1000),
    "log_every": (1, math.inf),
    "save_every": (1, math.inf),
    "keep": (1, math.inf),
    "sample_steps": (1, 1000),
}


def read_config(path: Path) -> TrainConfig:
    """Read a YAML file; relative paths in it are relative to its own folder.

    Raises:
        FaceSnapError: the file cannot be read, or see `from_fields`.
    """
    return from_fields(path, read_fields(path))


def read_fields(path: Path) -> dict[str, Any]:
    """The names and values in a YAML file, as they stand there.

    Raises:
        FaceSnapError: the file cannot be read.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FaceSnapError(f"There is no file {path}; check the name and the folder.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FaceSnapError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}); correct it.") from error
    if not isinstance(content, Mapping):
        raise FaceSnapError(f"{path} is not a list of names with values, such as 'steps: 1000'; correct it.")
    return dict(content)


def from_fields(path: Path, content: Mapping[str, Any]) -> TrainConfig:
    """Settings from what `read_fields` found in the file at `path`.

    Raises:
        FaceSnapError: a field is unknown, missing, of the wrong type, out of range, or names a file that is not there.
    """
    hints = get_type_hints(TrainConfig)
    if unknown := [name for name in content if name not in hints]:
        raise FaceSnapError(f"{path} has a field '{unknown[0]}' that training does not know; remove or correct it.")
    values = {name: _value(path, name, value, hints[name]) for name, value in content.items()}
    for field in fields(TrainConfig):
        if field.default is MISSING and field.name not in values:
            raise FaceSnapError(f"{path} lacks the field '{field.name}'; add it.")
    config = TrainConfig(**values)
    if config.id_rows and config.face_pack is None:
        raise FaceSnapError(f"{path} lacks the field 'face_pack'; add it, or set 'id_rows' to 0 to train without L_id.")
    if config.id_rows > config.batch_size:
        raise FaceSnapError(f"'id_rows' in {path} is larger than 'batch_size'; lower it.")
    if config.lightning_grad_steps > config.lightning_steps:
        raise FaceSnapError(f"'lightning_grad_steps' in {path} is larger than 'lightning_steps'; lower it.")
    return config


def _value(path: Path, name: str, value: Any, hint: Any) -> Any:
    """The value of a field in its own type."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if get_origin(kind) is tuple:
        return _shards(path, name, value)
    if kind is float:
        number = _number(value)
        if number is None:
            raise _wrong(path, name, value, "a number")
        value = number
    elif kind is Path:
        if not isinstance(value, str) or not value:
            raise _wrong(path, name, value, "a file or folder")
        value = _resolve(path, value)
        if name != "out" and not value.exists():
            raise FaceSnapError(f"'{name}' in {path} is {value}, which is not there; correct it.")
        return value
    elif type(value) is not kind:  # True is an int for isinstance
        what = {int: "a whole number", bool: "true or false", str: "a word"}[kind]
        raise _wrong(path, name, value, what)
    if name in CHOICES and value not in CHOICES[name]:
        raise _wrong(path, name, value, " or ".join(CHOICES[name]))
    if kind in (int, float):
        low, high = RANGES.get(name, (0, math.inf))
        if not low <= value <= high or math.isinf(value):
            raise _wrong(path, name, value, f"at least {low:g}" + (f" and at most {high:g}" if high < math.inf else ""))
    return value


def _number(value: Any) -> float | None:
    """YAML 1.1 takes 1e-5, which has no point, for text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _shards(path: Path, name: str, value: Any) -> tuple[Path, ...]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not patterns or not all(isinstance(item, str) and item for item in patterns):
        raise _wrong(path, name, value, "a list of .tar files")
    found: list[Path] = []
    for pattern in patterns:
        matches = sorted(glob.glob(str(_resolve(path, pattern))))  # noqa: PTH207 (patterns may be absolute)
        if not matches:
            raise FaceSnapError(f"'{name}' in {path} names {pattern}, which is not there; correct it.")
        found += map(Path, matches)
    return tuple(found)


def _resolve(path: Path, value: str) -> Path:
    return path.parent.resolve() / Path(value).expanduser()


def _wrong(path: Path, name: str, value: Any, wanted: str) -> FaceSnapError:
    return FaceSnapError(f"'{name}' in {path} is {value!r} and must be {wanted}; correct it.")
