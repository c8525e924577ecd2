"""An image classifier that recognises pictures which should not be shown, in transformers' folder layout.

The folder holds `model.safetensors`, `config.json` and `preprocessor_config.json`. Nothing in it is executed: the
weights must be in safetensors, and transformers receives only the values below from the two JSON files, checked. A
complete config.json could make it download and run code.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.weights.recognise import Shapes
from facesnap_ext.weights.tensors import read_index, read_tensors
from facesnap_ext.weights.unpickle import is_torch_file

if TYPE_CHECKING:
    from transformers import ViTConfig

REJECTED = frozenset(("nsfw", "porn", "hentai", "sexy", "sexual", "explicit", "erotic", "nude", "nudity", "unsafe"))
"""Labels of images that should not be shown, in lower case."""

ACCEPTED = frozenset(("normal", "sfw", "safe", "neutral", "drawing", "drawings"))
"""Labels of all other images."""

WEIGHTS = "model.safetensors"
MAX_JSON = 2**20  # maximum size of a JSON file in bytes
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
MAX_SIDE = 1024  # maximum side of the network's input in pixels
PROCESSORS = ("ViTImageProcessor", "ViTImageProcessorFast", "ViTImageProcessorPil", "ViTFeatureExtractor")
INSTEAD = "use a ViT with the labels normal and nsfw, or turn off the check of images in Settings under FaceSnap."


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input.

    Attributes:
        resample: a filter of `PIL.Image.resize`.
        scale: factor of the values 0…255. mean, std: normalisation for each channel, after that factor.
    """

    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class ImageClassifier:
    """An image classifier whose labels are all in `REJECTED` or `ACCEPTED`."""

    network: Any  # a ViTForImageClassification
    preprocessing: Preprocessing
    labels: tuple[str, ...]

    def scores(self, image: Image.Image) -> dict[str, float]:
        """Return the probability of each label, 0…1; they add up to 1."""
        with torch.no_grad():
            probabilities = self.network(self.pixels(image)).logits.softmax(dim=-1)[0]
        return {label: float(value) for label, value in zip(self.labels, probabilities)}

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Return an image as the network's input, [1, 3, size, size]. It is stretched to a square."""
        side, prepare = self.network.config.image_size, self.preprocessing
        small = image.convert("RGB").resize((side, side), Image.Resampling(prepare.resample))
        values = np.asarray(small, np.float32) * np.float32(prepare.scale)
        values = (values - np.asarray(prepare.mean, np.float32)) / np.asarray(prepare.std, np.float32)
        return torch.from_numpy(values.transpose(2, 0, 1).copy())[None]


def rejection(scores: dict[str, float]) -> tuple[str, float] | None:
    """Return the likeliest rejected label and the probability of all rejected labels together; None if the image is
    accepted, because that probability is at most 0.5."""
    rejected = {label: score for label, score in scores.items() if label.lower() in REJECTED}
    total = sum(rejected.values())
    return (max(rejected, key=lambda label: rejected[label]), total) if total > 0.5 else None


def load_classifier(path: Path) -> ImageClassifier:
    """Load a classifier to the CPU, in single precision.

    Args:
        path: its folder, or a file without the files that a complete folder has.

    Raises:
        FaceSnapError: a file is missing or damaged, or FaceSnap does not know the architecture or a label.
    """
    folder = path if path.is_dir() else path.parent
    try:
        config = _read_json(folder / "config.json")
        labels = _labels(config)
        preprocessor = _read_json(folder / "preprocessor_config.json")
        file = folder / WEIGHTS
        if not file.is_file() or is_torch_file(file):
            raise ValueError(f"it has no {WEIGHTS}")
        shapes = read_index(file).shapes
        checked = _config(config, shapes, len(labels))
        preprocessing = _preprocessing(preprocessor, _image_side(shapes))
        expected = _shapes(checked)
        _check_shapes(expected, shapes)
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = str(error) if type(error) is ValueError else f"its files do not fit together ({error!r})"
        raise FaceSnapError(
            f"The image classifier in {folder} cannot be used, because {reason_of(reason, 200)}; {INSTEAD}"
        ) from error
    from transformers import ViTForImageClassification

    weights = read_tensors(file, lambda key: key if key in expected else None, torch.float32)
    # with a state dict, transformers reads no file, and renames the tensors for its version
    network = ViTForImageClassification.from_pretrained(None, config=checked, state_dict=weights)
    return ImageClassifier(network.eval().requires_grad_(False), preprocessing, labels)


def is_classifier_folder(folder: Path) -> bool:
    """Return whether a folder's config.json describes an image classifier of any architecture."""
    try:
        return any(
            name.endswith("ForImageClassification") for name in _read_json(folder / "config.json")["architectures"]
        )
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return False


def _read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file with an object. Raises ValueError if that is not possible."""
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_JSON + 1)
    except OSError as error:
        raise ValueError(f"{file.name} cannot be read ({error.strerror})") from error
    try:
        content = json.loads(text) if len(text) <= MAX_JSON else None
    except ValueError as error:
        raise ValueError(f"{file.name} is damaged ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is damaged")
    return content


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the labels in the order of the network's outputs."""
    architectures = config.get("architectures") or ["ViTForImageClassification"]
    if config.get("model_type") != "vit" or architectures != ["ViTForImageClassification"]:
        raise ValueError(f"its architecture is {_shown(architectures)}, not ViTForImageClassification")
    if config.get("problem_type") not in (None, "single_label_classification"):
        raise ValueError("it gives several labels to one image")
    named = config.get("id2label")
    if not isinstance(named, dict) or sorted(named) != sorted(map(str, range(len(named)))):
        raise ValueError("config.json does not name its labels")
    labels = [named[str(i)] for i in range(len(named))]
    for label in labels:
        if not isinstance(label, str) or label.lower() not in REJECTED | ACCEPTED:
            raise ValueError(f"FaceSnap does not know its label {_shown(label)}")
    if len(set(labels)) < len(labels) or not {label.lower() for label in labels} & REJECTED:
        raise ValueError("its labels do not tell which images to reject")
    return tuple(labels)


def _config(config: dict[str, Any], shapes: Shapes, labels: int) -> ViTConfig:
    """Return transformers' configuration, with sizes from the tensors and only checked values from config.json."""
    from transformers import ViTConfig

    patches = shapes["vit.embeddings.patch_embeddings.projection.weight"]
    width, patch = patches[0], patches[-1]
    heads, activation = config.get("num_attention_heads", 12), config.get("hidden_act", "gelu")
    if type(heads) is not int or heads < 1 or width % heads:
        raise ValueError(f"config.json has {_shown(heads)} attention heads for {width} channels")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"FaceSnap does not know its activation {_shown(activation)}")
    image = _image_side(shapes)
    if image > MAX_SIDE:
        raise ValueError(f"its images have {image} × {image} pixels, more than {MAX_SIDE} × {MAX_SIDE}")
    checked = ViTConfig(
        hidden_size=width,
        num_hidden_layers=len([name for name in shapes if name.endswith(".layernorm_before.weight")]),
        num_attention_heads=heads,
        intermediate_size=shapes["vit.encoder.layer.0.intermediate.dense.weight"][0],
        hidden_act=activation,
        layer_norm_eps=_number(config.get("layer_norm_eps", 1e-12), 0, 0.1),
        image_size=image,
        patch_size=patch,
    )
    checked.num_labels = labels
    return checked


def _image_side(shapes: Shapes) -> int:
    patch = shapes["vit.embeddings.patch_embeddings.projection.weight"][-1]
    return math.isqrt(shapes["vit.embeddings.position_embeddings"][1] - 1) * patch


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by its name in the file."""
    width, hidden, patch = config.hidden_size, config.intermediate_size, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "vit.embeddings.cls_token": (1, 1, width),
        "vit.embeddings.position_embeddings": (1, (config.image_size // patch) ** 2 + 1, width),
        "vit.embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
        "vit.embeddings.patch_embeddings.projection.bias": (width,),
    }
    pairs = {"vit.layernorm": (width,), "classifier": (config.num_labels, width)}
    for layer in range(config.num_hidden_layers):
        name = f"vit.encoder.layer.{layer}"
        pairs |= {f"{name}.attention.attention.{one}": (width, width) for one in ("query", "key", "value")}
        pairs |= {f"{name}.attention.output.dense": (width, width), f"{name}.intermediate.dense": (hidden, width)}
        pairs |= {f"{name}.output.dense": (width, hidden)}
        pairs |= {f"{name}.layernorm_{where}": (width,) for where in ("before", "after")}
    return shapes | {
        f"{name}.{part}": size
        for name, shape in pairs.items()
        for part, size in (("weight", shape), ("bias", shape[:1]))
    }


def _check_shapes(expected: dict[str, tuple[int, ...]], shapes: Shapes) -> None:
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            found = f"with the shape {list(shapes[name])}" if name in shapes else "no tensor"
            raise ValueError(f"{WEIGHTS} has {found} {name}, and {list(shape)} is expected")


def _preprocessing(values: dict[str, Any], image: int) -> Preprocessing:
    kind = values.get("image_processor_type", values.get("feature_extractor_type", PROCESSORS[0]))
    if kind not in PROCESSORS:
        raise ValueError(f"its preprocessor is {_shown(kind)}, not {PROCESSORS[0]}")
    size = values.get("size", image)
    if size not in (image, {"height": image, "width": image}) or values.get("do_resize", True) is not True:
        raise ValueError(f"preprocessor_config.json does not resize images to {image} × {image}")
    if values.get("do_center_crop"):
        raise ValueError("preprocessor_config.json crops images")
    resample = values.get("resample", 2)
    if type(resample) is not int or not 0 <= resample <= 5:
        raise ValueError(f"preprocessor_config.json has the unknown filter {_shown(resample)}")
    scale = _number(values.get("rescale_factor", 1 / 255), 0, 1) if values.get("do_rescale", True) else 1.0
    if not values.get("do_normalize", True):
        return Preprocessing(resample, scale, (0.0,) * 3, (1.0,) * 3)
    mean, std = (values.get(name, [0.5] * 3) for name in ("image_mean", "image_std"))
    if not isinstance(mean, list) or not isinstance(std, list) or len(mean) != 3 or len(std) != 3:
        raise ValueError("preprocessor_config.json has no mean and standard deviation for three channels")
    return Preprocessing(
        resample, scale, tuple([_number(one, -255, 255) for one in mean]), tuple([_number(one, 0, 255) for one in std])
    )


def _number(value: Any, low: float, high: float) -> float:
    """Return a number of a JSON file above `low` and up to `high`, as a float. 0 is allowed below a negative `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
        raise ValueError(f"{_shown(value)} is not a number above {low} and up to {high}")
    return float(value)


def _shown(value: Any) -> str:
    return reason_of(repr(value), 60)
