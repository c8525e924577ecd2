"""The pose that a unit's template or sliders describe."""

from __future__ import annotations

from dataclasses import replace

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.poses import TEMPLATES, Pose
from facesnap_ext.settings.unit import Unit


def pose_from_unit(unit: Unit, width: float, height: float) -> Pose:
    """Return the pose that a unit's template or sliders describe.

    If the unit does not set position or size, the template's values apply (with sliders, those of "front").

    Args:
        unit: the settings; `pose` is "template" or "sliders".
        width: width of the output image in pixels.
        height: height of the output image in pixels.

    Raises:
        FaceSnapError: there is no template of this name.
    """
    name = unit.template if unit.pose == "template" else "front"
    if name not in TEMPLATES:
        raise FaceSnapError(f"FaceSnap has no pose template named {name!r}; choose one of {', '.join(TEMPLATES)}.")
    pose = TEMPLATES[name]
    if unit.pose == "sliders":
        sliders = ("yaw", "pitch", "roll", "mouth", "brows", "eyes")
        pose = replace(pose, **{name: getattr(unit, name) for name in sliders})
    pose = replace(pose, size=pose.size * min(1.0, width / height))
    given = {name: getattr(unit, name) for name in ("x", "y", "size")}
    return replace(pose, **{name: value for name, value in given.items() if value is not None})
