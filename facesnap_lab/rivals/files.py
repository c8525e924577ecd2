"""A rival's file: its parameters in one `.safetensors`, with its name, sizes and origin as metadata."""

from __future__ import annotations

import json
import typing
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.files import user_write
from facesnap_ext.weights.facesnap_file import FaceSnapInfo
from facesnap_ext.weights.sources import to_json
from facesnap_ext.weights.tensors import is_finite, read_index, read_tensors

if TYPE_CHECKING:
    from facesnap_lab.rivals.method import Rival

FORMAT = "facesnap-rival"


def save(path: Path, rival: Rival, info: FaceSnapInfo) -> None:
    """Write a rival's file atomically.

    Args:
        info: where licence, training data and networks are stated.

    Raises:
        FaceSnapError: the file cannot be written, or a weight is not a finite number.
    """
    from safetensors.torch import save_file

    tensors = {key: tensor.contiguous() for key, tensor in rival.state_dict().items()}
    if wrong := next((key for key, tensor in tensors.items() if not is_finite(tensor)), None):
        raise FaceSnapError(f"{path.name} is not written because {wrong} contains values that are not finite.")
    metadata = {
        "format": FORMAT,
        "method": rival.name,
        "config": json.dumps(asdict(rival.config)),
        "license": info.license,
        "trained_on": info.trained_on,
        "recognition": info.recognition,
        "networks": json.dumps(info.networks, sort_keys=True),
        "sources": to_json(info.sources),
    }
    with user_write(path) as part:
        save_file(tensors, part, metadata)


def load(path: Path, method: type[Rival]) -> Rival:
    """Load a rival's file to the CPU, in evaluation mode and without gradients.

    Raises:
        FaceSnapError: the file contains a different method, or is damaged.
    """
    index = read_index(path)
    found = index.metadata.get("method", "")
    if index.metadata.get("format") != FORMAT or found != method.name:
        raise FaceSnapError(f"{path.name} is not a file of {method.name}; choose one that was trained with it.")
    try:
        kind = typing.get_type_hints(method.__init__)["config"]
        with torch.device("meta"):
            rival = method(parse(kind, json.loads(index.metadata["config"])))
        rival.load_state_dict(read_tensors(path), assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FaceSnapError(
            f"{path.name} is incomplete or damaged ({reason_of(error, 200)}); use a different checkpoint."
        ) from error
    return rival.eval().requires_grad_(False)


def parse(kind: Any, value: Any) -> Any:
    """Convert JSON to a config: a dataclass of numbers, tuples and further configs."""
    if not is_dataclass(kind):
        return tuple([parse(None, item) for item in value]) if isinstance(value, list) else value
    hints = typing.get_type_hints(kind)
    unknown = set(value) - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(f"unknown size {unknown.pop()}")
    return kind(**{name: parse(hints[name], item) for name, item in value.items()})
