"""Saved poses: turns of the head, movements of the face, and optionally its place, as a small JSON file without pixels.

A file is `poses/<name>.json` in the model folder:

    {"format": "facesnap-pose", "version": 1, "facesnap": "…", "pose": {"yaw": 20.0, "smile_left": 0.5, …}}

`pose` has the fields of `Pose` that differ from the template "front". Files may come from others, so a file's size and
every value are checked.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from facesnap_ext import __version__
from facesnap_ext.errors import FaceSnapError, printable, reason_of
from facesnap_ext.files import user_delete, user_write
from facesnap_ext.landmarks.poses import TEMPLATES, Pose
from facesnap_ext.settings.unit import from_values, short_repr
from facesnap_ext.weights.identity_file import safe_name

FOLDER_NAME = "poses"
FORMAT = "facesnap-pose"
VERSION = 1
MAX_BYTES = 16 * 2**10
FRONT = asdict(TEMPLATES["front"])


def pose_folder(models: Path) -> Path:
    """Return the folder of saved poses in the model folder."""
    return models / FOLDER_NAME


def find_poses(models: Path) -> dict[str, Path]:
    """Return the files of the saved poses by name: their file names without `.json`."""
    return {path.stem: path for path in sorted(pose_folder(models).glob("*.json")) if printable(path.stem) == path.stem}


def choose_pose(models: Path, name: str) -> Path:
    """Return the file of a saved pose.

    The name is looked up among the existing files and never becomes part of a path.

    Raises:
        FaceSnapError: there is no such pose.
    """
    poses = find_poses(models)
    if name not in poses:
        advice = f"choose one of {', '.join(poses)}" if poses else "save one first"
        raise FaceSnapError(f"There is no saved pose {short_repr(name)} in {pose_folder(models)}; {advice}.")
    return poses[name]


def load_pose(models: Path, name: str) -> Pose:
    """Read a saved pose. Like that of a template, its `size` is a fraction of the image's shorter side.

    Raises:
        FaceSnapError: the file is missing, too large, damaged or written by a newer version.
    """
    path = choose_pose(models, name)
    advice = "delete it and save the pose again"
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES // 2**10} KB")
        values = _checked(json.loads(content))
    except (OSError, RecursionError, ValueError, FaceSnapError) as error:
        raise FaceSnapError(f"The saved pose {path.name} cannot be used ({reason_of(error)}); {advice}.") from error
    return Pose(**{**FRONT, **values})


def save_pose(models: Path, name: str, pose: Pose) -> Path:
    """Save a pose, and return the new file.

    Args:
        pose: with a `size` as for `load_pose`.

    Raises:
        FaceSnapError: the name cannot be used, a pose with this name exists, or the file cannot be written.
    """
    path = pose_folder(models) / f"{safe_name(name, 'a pose')}.json"
    if path.exists():
        raise FaceSnapError(f"There is already a pose {path.stem}; choose a different name, or delete that pose first.")
    values = {name: round(value, 4) for name, value in asdict(pose).items()}
    changed = {name: value for name, value in values.items() if value != FRONT[name]}
    content = {"format": FORMAT, "version": VERSION, "facesnap": __version__, "pose": _checked_values(changed)}
    with user_write(path) as part:
        part.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return path


def delete_pose(models: Path, name: str) -> None:
    """Delete a saved pose.

    Raises:
        FaceSnapError: there is no such pose, or its file cannot be deleted.
    """
    user_delete(choose_pose(models, name))


def _checked(content: Any) -> dict[str, float]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError("it is not a FaceSnap pose")
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise ValueError("it has no valid version")
    if version > VERSION:
        raise ValueError("it was written by a newer FaceSnap")
    values = content.get("pose")
    if not isinstance(values, dict):
        raise ValueError("it has no pose")
    return _checked_values(values)


def _checked_values(values: dict[str, Any]) -> dict[str, float]:
    if unknown := set(values) - set(FRONT):
        raise ValueError(f"it has the unknown setting {short_repr(min(unknown))}")
    if any(value is None for value in values.values()):
        raise ValueError("a value is missing")
    from_values(values)  # checks every range
    return {name: float(value) for name, value in values.items()}
