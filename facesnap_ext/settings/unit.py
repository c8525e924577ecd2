"""One person's settings: `Unit` and its limits.

The field names of `Unit`, of its `Sliders` and of its `Strength` are the names that the API and infotext use. Both use
one flat list of settings, which `defaults`, `to_values` and `from_values` provide.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.landmarks.movements import EXPRESSIONS, SLIDERS, Sliders
from facesnap_ext.photos import Photo
from facesnap_ext.settings.strength import Strength

REFERENCE_MODES = ("fused", "averaged", "batch")
POSES = ("photo", "template", "sliders", "saved", "own")
PASSES = ("both", "first", "second")
REGIONS = ("image", "face", "mask")
EXPRESSION_SOURCES = ("pose", "reference", "driving", "custom")
CHOICES = {
    "reference_mode": REFERENCE_MODES,
    "pose": POSES,
    "expression_source": EXPRESSION_SOURCES,
    "expression": tuple(EXPRESSIONS),
    "hires": PASSES,
    "region": REGIONS,
}
RANGES: dict[str, tuple[float, float]] = {  # lowest and highest value
    "weight": (0, 2),
    "adapter_weight": (0, 2),
    "start": (0, 1),
    "end": (0, 1),
    "ffrnet_interval": (1, 4),
    **{name: slider.range for name, slider in SLIDERS.items()},
    "expression_strength": (0, 1.5),
    "x": (-0.5, 1.5),
    "y": (-0.5, 1.5),
    "size": (0.02, 3),
    "region_scale": (1, 4),
    "redraw_strength": (0, 1),
    "uncond_noise": (0, 1),
}
OPTIONAL = ("x", "y", "size")  # these settings may also be None
PRESETS = {  # weight, start, end
    "faithful": (1.0, 0.0, 1.0),
    "balanced": (0.8, 0.0, 0.8),
    "stylised": (0.6, 0.1, 0.6),
}
TYPE_WORDS = {bool: "true or false", int: "a whole number", str: "text"}
BLOCK_WEIGHTS_RULE = "one number from 0 to 2 for each residual of the FaceSnap file (10 for SDXL), or none"


@dataclass(frozen=True)
class Unit:
    """One person in the image.

    Attributes:
        references: photos of one person; in `reference_mode` "batch", one photo per person.
        face_index: the face to use in each reference photo, by size; 0 is the largest.
        reference_mode: "fused" puts all references through the Mixer together, "averaged" averages their features,
            "batch" generates the job's images once per photo.
        identity: name of a saved identity, used instead of the photos or together with them.
        model: name of the FaceSnap file; empty selects the only one.
        pose: where the pose comes from. "photo" is `driving`, or the init image, or else the reference photo; the
            others are "template", "sliders", "saved" for `saved_pose`, and "own" for the reference photo.
        driving: photo that provides pose and expression; with several, a job makes its images once for each.
        driving_face_index: the face to use in it, by size; 0 is the largest.
        template: a name in `poses.TEMPLATES`.
        saved_pose: name of a saved pose.
        sliders: turns of the head and movements of the face for the pose "sliders"; the movements are also used with
            the expression source "custom".
        expression_source: where the expression comes from: "pose" is whatever provides the pose, "reference" the first
            reference photo, "driving" the driving photo or else the init image, and "custom" the sum of `expression`
            and the sliders.
        expression: a name in `movements.EXPRESSIONS`.
        expression_strength: factor of the named expression.
        x, y: centre of the face as fractions of the image's width and height; None keeps the position of the pose.
        size: height of the face from brows to chin as a fraction of the image's height; None keeps the size of the
            pose.
        region: where the person is applied: the whole "image", around the predicted "face", or where `mask` is white.
        region_scale: size of the region around the face relative to the face's box.
        redraw_strength: denoising strength for redrawing small faces; 0 does not redraw them.
        uncond_noise: amount of noise in the embedding of the unconditional rows, with weights that have one such as
            InstantID's; 0 is the zero embedding of their training.
    """

    enabled: bool = False

    references: tuple[Photo, ...] = ()
    face_index: int = 0
    reference_mode: str = "fused"
    identity: str = ""
    model: str = ""

    pose: str = "photo"
    driving: Photo | tuple[Photo, ...] | None = None
    driving_face_index: int = 0
    template: str = "front"
    saved_pose: str = ""
    sliders: Sliders = field(default_factory=Sliders)
    expression_source: str = "pose"
    expression: str = "neutral"
    expression_strength: float = 1.0
    x: float | None = None
    y: float | None = None
    size: float | None = None

    strength: Strength = field(default_factory=Strength)

    region: str = "image"
    mask: Photo | None = None
    region_scale: float = 1.8

    redraw_strength: float = 0.0
    uncond_noise: float = 0.0

    def __post_init__(self) -> None:
        values = to_values(self)
        for name, default in defaults().items():
            _check_type(name, values[name], type(default))
        for name in RANGES:
            _check_range(name, values[name])
        for name, choices in CHOICES.items():
            if values[name] not in choices:
                raise FaceSnapError(
                    f"FaceSnap's {name} is {short_repr(values[name])}; use one of {', '.join(choices)}."
                )
        for name in ("face_index", "driving_face_index"):
            if values[name] < 0:
                raise FaceSnapError(f"FaceSnap's {name} is {values[name]}; the largest face is 0 and the next one 1.")
        _check_block_weights(self.strength.block_weights)

    @property
    def uses_driving(self) -> bool:
        """Whether a driving photo provides the pose or the expression."""
        return self.pose == "photo" or self.expression_source == "driving"

    @property
    def driving_photo(self) -> Photo | None:
        """The driving photo of a person who has at most one; see `script_args.batches_by_photo`."""
        if isinstance(self.driving, tuple):
            raise ValueError("several driving photos are prepared one by one; see batches_by_photo")
        return self.driving

    @property
    def active(self) -> bool:
        """Whether this person has any effect on the image."""
        return self.enabled and self.strength.active


PARTS: dict[str, type[Strength] | type[Sliders]] = {"sliders": Sliders, "strength": Strength}
"""The fields of `Unit` whose own fields are settings."""
PART_NAMES = {part: tuple([one.name for one in fields(kind)]) for part, kind in PARTS.items()}


def defaults() -> dict[str, Any]:
    """The default of every setting by name, in the order of the fields, including those of its parts."""
    return to_values(Unit)


def to_values(unit: Unit | type[Unit]) -> dict[str, Any]:
    """A unit's settings by name, or the defaults if `unit` is the class itself, in the order of the fields."""
    values: dict[str, Any] = {}
    for one in fields(Unit):
        if one.name in PARTS:
            part = PARTS[one.name]() if isinstance(unit, type) else getattr(unit, one.name)
            values |= {name: getattr(part, name) for name in PART_NAMES[one.name]}
        else:
            values[one.name] = getattr(unit, one.name)
    return values


def from_values(values: Mapping[str, Any]) -> Unit:
    """A unit with these settings; settings that are not given keep their defaults.

    Raises:
        FaceSnapError: a value is out of range or of the wrong type.
    """
    return with_values(Unit(), values)


def with_values(unit: Unit, values: Mapping[str, Any]) -> Unit:
    """A unit with some settings changed, by their names in the API.

    Raises:
        FaceSnapError: a value is out of range or of the wrong type.
    """
    parts: dict[str, Any] = {}
    others = dict(values)
    for part, names in PART_NAMES.items():
        if given := {name: others.pop(name) for name in names if name in others}:
            parts[part] = replace(getattr(unit, part), **given)
    return replace(unit, **others, **parts)


def short_repr(value: Any) -> str:
    """A value as text for a message, on one line and of limited length."""
    return reprlib.repr(value)


def _check_type(name: str, value: Any, expected: type) -> None:
    if expected in TYPE_WORDS and type(value) is not expected:
        raise FaceSnapError(f"FaceSnap's {name} is {short_repr(value)}; it must be {TYPE_WORDS[expected]}.")


def _check_range(name: str, value: Any) -> None:
    low, high = RANGES[name]
    if value is None and name in OPTIONAL:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise FaceSnapError(f"FaceSnap's {name} is {short_repr(value)}; use a number from {low} to {high}.")


def _check_block_weights(weights: tuple[Any, ...]) -> None:
    numbers = all(type(one) in (int, float) and 0 <= one <= 2 for one in weights)
    if not numbers:  # their number must match the FaceSnap file; see `Conditioning`
        raise FaceSnapError(f"FaceSnap's block_weights are {short_repr(weights)}; use {BLOCK_WEIGHTS_RULE}.")
