"""The settings that a folder of results was made with. Results of different settings must not be mixed in a table."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import atomic_write
from facesnap_lab.training.config import TrainConfig

FILE = "settings.json"
WITHOUT_EFFECT = (  # training fields that do not change the results
    *("log_every", "save_every", "keep", "sample_every", "sample_count", "sample_steps", "sample_scale"),
    *("workers", "gradient_checkpointing", "license", "trained_on"),
)


def result_settings(config: TrainConfig, own: Container[str]) -> dict[str, Any]:
    """Return the training settings that change the results, except those that the caller sets itself."""
    names = [field.name for field in fields(TrainConfig) if field.name not in WITHOUT_EFFECT]
    return {name: getattr(config, name) for name in names if name not in own}


def check_settings(
    out: Path, settings: Mapping[str, Any], kind: str, may_differ: Container[str] = (), write: bool = True
) -> None:
    """Check that the results in `out` were made with the same settings, or write the settings if there are none yet.

    Args:
        kind: what the results are, with an article, for the message.
        may_differ: names of settings that need not be the same any more.

    Raises:
        FaceSnapError: a setting is different, or the file cannot be written.
    """
    wanted = json.loads(json.dumps(settings, default=str))
    path = out / FILE
    if path.is_file():
        existing = json.loads(path.read_text(encoding="utf-8"))
        if other := [name for name in wanted if wanted[name] != existing.get(name) and name not in may_differ]:
            raise FaceSnapError(
                f"{out} has {kind} whose '{other[0]}' is {existing.get(other[0])} and not {wanted[other[0]]}; choose "
                "another --out or restore that setting."
            )
    elif write:
        try:
            with atomic_write(path) as part:
                part.write_text(json.dumps(wanted, indent=2), encoding="utf-8")
        except OSError as error:
            raise FaceSnapError(
                f"{path} could not be written ({error}); free some disk space and try again."
            ) from error
