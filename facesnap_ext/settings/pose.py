"""The pose and the expression that a unit's settings describe."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.movements import MOVEMENTS, Sliders, with_expression, without_movements
from facesnap_ext.landmarks.poses import TEMPLATES, Pose
from facesnap_ext.settings.saved_poses import load_pose
from facesnap_ext.settings.unit import Unit


def pose_from_unit(unit: Unit, width: float, height: float, models: Path | None = None) -> Pose:
    """Return the pose that a unit's template, saved pose or sliders describe, with the expression of its settings.

    If the unit does not set position or size, the values of the template or saved pose apply, or the values of "front"
    with sliders. The face is neutral if the expression comes from a photo.

    Args:
        unit: the settings; `pose` is "template", "sliders" or "saved".
        width: width of the output image in pixels.
        height: height of the output image in pixels.
        models: the model folder, which has the saved poses.

    Raises:
        FaceSnapError: there is no template or saved pose of this name, or its file is unusable.
    """
    name = unit.template if unit.pose == "template" else "front"
    if name not in TEMPLATES:
        raise FaceSnapError(f"FaceSnap has no pose template named {name!r}; choose one of {', '.join(TEMPLATES)}.")
    pose = TEMPLATES[name]
    if unit.pose == "saved":
        if models is None:
            raise ValueError("saved poses are in the model folder")
        pose = load_pose(models, unit.saved_pose)
    if unit.pose == "sliders":
        pose = replace(pose, **asdict(unit.sliders))
    if unit.expression_source != "pose":
        pose = replace(pose, **_movements(custom_expression(unit)))
    pose = replace(pose, size=pose.size * min(1.0, width / height))
    given = {name: getattr(unit, name) for name in ("x", "y", "size")}
    return replace(pose, **{name: value for name, value in given.items() if value is not None})


def custom_expression(unit: Unit) -> Sliders:
    """Return the sum of a unit's named expression and the movements of its sliders, each limited to its range. It is
    neutral unless `expression_source` is "custom"."""
    if unit.expression_source != "custom":
        return without_movements(unit.sliders)
    return with_expression(unit.sliders, unit.expression, unit.expression_strength)


def _movements(sliders: Sliders) -> dict[str, float]:
    return {name: getattr(sliders, name) for name in MOVEMENTS}
