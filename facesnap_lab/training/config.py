"""The settings of a training run, read from a YAML file."""

from __future__ import annotations

import glob
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.storage import Location, Url, location


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. The defaults are the paper's (section 3.1), where it states them."""

    base: Path  # SDXL: a diffusers folder or a single-file checkpoint
    start: Path  # FaceSnap file to start from, as written by `facesnap init`
    clip: Path  # CLIP image encoder
    shards: tuple[Location, ...]  # WebDataset .tar files or URLs; in the YAML file, * and ? are wildcards
    out: Path  # folder for checkpoints, logs and samples
    upload: Url | None = None  # where to copy the content of `out` at each checkpoint, such as s3://bucket/run
    face_pack: Path | None = None  # insightface pack with the ArcFace model for L_id; unused if id_rows is 0
    exclude: Location | None = (
        None  # people and SHA-256 of photos to leave out, one per line; see training/exclusions.py
    )
    base_config: Path | None = None  # diffusers folder with configs and tokenizers, for a single-file checkpoint

    method: str = "facesnap"  # or a rival of Table 1, see docs/rivals.md
    resolution: int = 1024  # side of the images in pixels
    reference: str = "other"  # source of the identity: another image of the same person, or the same image
    landmarks: str = "drawn"  # or "none": black landmark images, as in the paper's ablation
    tokens: str = "ffrnet"  # or "text": append them to the text tokens and omit FFRNet, as in the paper's ablation
    landmark_jitter: float | None = None  # standard deviation in pixels at `resolution`; default: resolution / 256
    drop_text: float = 0.1  # probability of null text

    batch_size: int = 7  # images per process
    gradient_accumulation: int = 1
    steps: int = 360_000
    learning_rate: float = 1e-5
    mixer_rate: float = 1.0  # multiplies the Mixer's learning rate; docs/ablation.md explains when to lower it
    weight_decay: float = 0.01
    warmup: int = 500  # steps
    schedule: str = "constant"  # or "cosine", which decays to 0 at the last step
    max_grad_norm: float = 1.0
    ema: float = 0.9999

    snr_weights: bool = False  # weight errors by the SNR, clamped to the bounds below; off: as in eq. 3
    snr_low: float = 1.0
    snr_high: float = 5.0
    outside: float = 0.0  # mask value outside the face; with eq. 3's 0, hair and background are not trained
    terminal: float = 0.0  # fraction of images that start at pure noise, as sampling does

    id_weight: float = 0.5  # lambda_id of eq. 5
    id_rows: int = 1  # images per batch in the lightning branch; 0 trains without L_id
    id_start: int = 0  # train without L_id for this many steps
    id_every: int = 1  # compute L_id in every n-th step after that
    lightning: Path | None = None  # LoRA or UNet of the few-step model; by default the base itself
    lightning_steps: int = 4
    lightning_grad_steps: int = 1  # number of final steps that are backpropagated through
    lightning_scale: float = 1.0  # classifier-free guidance scale of the few-step model; 1 for no guidance

    mixed_precision: str = "bf16"
    gradient_checkpointing: bool = True
    seed: int = 0
    workers: int = 2  # processes that read images
    log_every: int = 10
    save_every: int = 1000
    keep: int = 3  # number of checkpoints to keep
    sample_every: int = 1000  # 0: no sample images
    sample_count: int = 4
    sample_steps: int = 25
    sample_scale: float = 5.0  # classifier-free guidance scale

    license: str = "unknown"  # licence of the weights, for the FaceSnap file's metadata
    trained_on: str = ""  # description of the data, for the FaceSnap file's metadata

    @property
    def jitter(self) -> float:
        """Standard deviation of the landmarks' jitter in pixels at `resolution`."""
        return self.resolution / 256 if self.landmark_jitter is None else self.landmark_jitter


CHOICES = {
    "method": ("facesnap", "ip-adapter-face", "ip-adapter-plus", "instantid", "photomaker", "pulid", "consistentid"),
    "reference": ("other", "same"),
    "landmarks": ("drawn", "none"),
    "tokens": ("ffrnet", "text"),
    "schedule": ("constant", "cosine"),
    "mixed_precision": ("no", "fp16", "bf16"),
}
RANGES = {  # inclusive; all other numbers must be at least 0
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
    """Read a YAML file. Relative paths in it are relative to its folder.

    Raises:
        FaceSnapError: the file cannot be read, or its fields are invalid; see `from_fields`.
    """
    return from_fields(path, read_fields(path))


def read_fields(path: Path) -> dict[str, Any]:
    """Return the unchecked fields of a YAML file.

    Raises:
        FaceSnapError: the file cannot be read.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FaceSnapError(f"The file {path} does not exist; check its name and folder.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FaceSnapError(f"{path} is not valid YAML ({' '.join(str(error).split())}); correct it.") from error
    if not isinstance(content, Mapping):
        raise FaceSnapError(f"{path} does not contain fields such as 'steps: 1000'; correct it.")
    return dict(content)


def from_fields(path: Path, content: Mapping[str, Any]) -> TrainConfig:
    """Check the fields that `read_fields` returned for the file at `path`.

    Raises:
        FaceSnapError: a field is unknown, missing, of the wrong type or out of range, or its file does not exist.
    """
    hints = get_type_hints(TrainConfig)
    if unknown := [name for name in content if name not in hints]:
        raise FaceSnapError(f"{path} has the unknown field '{unknown[0]}'; remove or correct it.")
    values = {name: _value(path, name, value, hints[name]) for name, value in content.items()}
    for field in fields(TrainConfig):
        if field.default is MISSING and field.name not in values:
            raise FaceSnapError(f"The field '{field.name}' is missing in {path}; add it.")
    config = TrainConfig(**values)
    if config.id_rows and config.face_pack is None:
        raise FaceSnapError(
            f"The field 'face_pack' is missing in {path}; add it, or set 'id_rows' to 0 to train without L_id."
        )
    if config.method != "facesnap" and config.tokens == "text":
        raise FaceSnapError(f"'tokens' in {path} is 'text', which only FaceSnap supports; remove it or 'method'.")
    if config.id_rows > config.batch_size:
        raise FaceSnapError(f"'id_rows' in {path} is larger than 'batch_size'; lower it.")
    if config.lightning_grad_steps > config.lightning_steps:
        raise FaceSnapError(f"'lightning_grad_steps' in {path} is larger than 'lightning_steps'; lower it.")
    return config


def _value(path: Path, name: str, value: Any, hint: Any) -> Any:
    """Convert a field's value to the type of the field."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if get_origin(kind) is tuple:
        return _shards(path, name, value)
    if kind is float:
        number = _number(value)
        if number is None:
            raise _invalid(path, name, value, "a number")
        value = number
    elif kind in (Path, Url):
        if not isinstance(value, str) or not value:
            raise _invalid(path, name, value, "a file or folder")
        value = _resolve(path, value)
        if not isinstance(value, kinds):
            raise _invalid(path, name, str(value), "a URL such as s3://bucket/run" if kind is Url else "a local path")
        if name not in ("out", "upload") and not value.exists():
            raise FaceSnapError(f"'{name}' in {path} is {value}, which does not exist; correct it.")
        return value
    elif type(value) is not kind:  # not isinstance, because True is an instance of int
        expected = {int: "a whole number", bool: "true or false", str: "text"}[kind]
        raise _invalid(path, name, value, expected)
    if name in CHOICES and value not in CHOICES[name]:
        raise _invalid(path, name, value, " or ".join(CHOICES[name]))
    if kind in (int, float):
        low, high = RANGES.get(name, (0, math.inf))
        if not low <= value <= high or math.isinf(value):
            raise _invalid(
                path, name, value, f"at least {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
            )
    return value


def _number(value: Any) -> float | None:
    """Convert a number, also from text: YAML 1.1 reads 1e-5, without a decimal point, as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _shards(path: Path, name: str, value: Any) -> tuple[Location, ...]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not patterns or not all(isinstance(item, str) and item for item in patterns):
        raise _invalid(path, name, value, "a list of .tar files")
    shards: list[Location] = []
    for pattern in patterns:
        resolved = _resolve(path, pattern)
        if isinstance(resolved, Url):
            matches: list[Location] = [*resolved.parent.glob(resolved.name)]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(resolved)))]  # noqa: PTH207 (may be absolute)
        if not matches:
            raise FaceSnapError(f"No file matches {pattern}, which is listed under '{name}' in {path}; correct it.")
        shards += matches
    return tuple(shards)


def _resolve(path: Path, value: str) -> Location:
    target = location(value)
    return target if isinstance(target, Url) else path.parent.resolve() / target.expanduser()


def _invalid(path: Path, name: str, value: Any, expected: str) -> FaceSnapError:
    return FaceSnapError(f"'{name}' in {path} is {value!r} but must be {expected}; correct it.")
