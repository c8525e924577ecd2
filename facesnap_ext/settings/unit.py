"""Everything that a user can set: for each person in the picture a unit, and what is the picture's own; to it from the
page and the API."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from typing import Any

from PIL.Image import Image

from facesnap_ext import photos
from facesnap_ext.errors import FaceSnapError, error_prefix
from facesnap_ext.photos import Photo

POSES = ("photo", "template", "sliders", "own")
PASSES = ("both", "first", "second")
REGIONS = ("everywhere", "face", "drawn")
SEVERAL = ("mixed", "averaged", "apart")
CHOICES = {"several": SEVERAL, "pose": POSES, "hires": PASSES, "region": REGIONS}
RANGES = {  # lowest and highest
    "weight": (0, 2),
    "adapter": (0, 2),
    "start": (0, 1),
    "end": (0, 1),
    "yaw": (-75, 75),
    "pitch": (-45, 45),
    "roll": (-45, 45),
    "mouth": (0, 1),
    "brows": (-1, 1),
    "eyes": (-1, 1),
    "x": (-0.5, 1.5),
    "y": (-0.5, 1.5),
    "size": (0.02, 3),
    "grow": (1, 4),
    "redraw": (0, 1),
    "every": (1, 4),
}
PRESETS = {  # of strength: weight, start, end
    "faithful": (1.0, 0.0, 1.0),
    "balanced": (0.8, 0.0, 0.8),
    "stylised": (0.6, 0.1, 0.6),
}
KINDS = {bool: "true or false", int: "a whole number", str: "text"}  # what values must be, by their default's type
BLOCKS = 10  # residuals of SDXL's UNet, from the shallowest skip to the middle


@dataclass(frozen=True)
class Unit:
    """One person in the picture. The field names are the API's and the infotext's."""

    enabled: bool = False

    references: tuple[Photo, ...] = ()  # photos of one person, or of a person each
    face: int = 0  # which face of each reference, by size from the largest
    several: str = "mixed"  # what several references are: mixed together, averaged, or a person each
    identity: str = ""  # name of a saved identity, in place of photos
    model: str = ""  # name of the FaceSnap file; empty: the only one there is

    pose: str = "photo"  # of `driving`, else of the init picture, else the reference's own; or as `POSES` says
    driving: Photo | None = None  # whose pose and expression
    driving_face: int = 0  # which face of it, by size from the largest
    template: str = "front"  # see `poses.TEMPLATES`
    yaw: float = 0.0  # degrees, positive: the nose goes to the picture's right
    pitch: float = 0.0  # degrees, positive: the nose goes down
    roll: float = 0.0  # degrees, positive: the head falls to the picture's right
    mouth: float = 0.0  # 0 closed … 1 open
    brows: float = 0.0  # -1 down … 1 up
    eyes: float = 0.0  # -1 closed … 1 wide
    x: float | None = None  # middle of the face, of the picture's width; None: where the pose comes from
    y: float | None = None  # of its height
    size: float | None = None  # of the face from brows to chin, of the picture's height

    weight: float = 1.0
    adapter: float = 0.8  # weight of InstantID's adapter, which `weight` does not scale; other files do not heed it
    start: float = 0.0  # fraction of sampling
    end: float = 1.0
    every: int = 1  # FFRNet runs in each so many-th evaluation of the UNet, and its residuals stay in between
    cond_only: bool = False  # leave the unconditional side alone
    hires: str = "both"  # the passes in which it acts
    blocks: tuple[float, ...] = ()  # weights of the `BLOCKS` residuals, times `weight`; none: all 1

    region: str = "everywhere"  # or around the predicted face, or where `mask` is white
    mask: Photo | None = None
    grow: float = 1.8  # of the face's box, where the region is the face

    redraw: float = 0.0  # denoising strength with which a small face is drawn again, larger; 0: it is not

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind in KINDS and type(value) is not kind:
                raise FaceSnapError(f"FaceSnap's {field.name} is {shown(value)}; give {KINDS[kind]}.")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is None and name in ("x", "y", "size"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise FaceSnapError(f"FaceSnap's {name} is {shown(value)}; give a number from {low} to {high}.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                given = shown(getattr(self, name))
                raise FaceSnapError(f"FaceSnap's {name} is {given}; give one of {', '.join(choices)}.")
        for name in ("face", "driving_face"):
            if getattr(self, name) < 0:
                raise FaceSnapError(f"FaceSnap's {name} is {getattr(self, name)}; the largest face is 0, the next 1.")
        good = len(self.blocks) in (0, BLOCKS) and all(isinstance(b, (int, float)) and 0 <= b <= 2 for b in self.blocks)
        if not good:
            raise FaceSnapError(
                f"FaceSnap's blocks are {shown(self.blocks)}; give {BLOCKS} numbers from 0 to 2, or none."
            )

    @property
    def active(self) -> bool:
        """Whether there is anything to do; a weight of 0 or an empty window leaves the picture alone."""
        return self.enabled and self.weight > 0 and self.start < self.end


def from_script_args(args: Sequence[Any]) -> dict[int, Unit]:
    """Read the arguments that a host hands to the script: the enabled units by their numbers on the page, from 1.

    They are the page's components in their order (`UI_ORDER` for each unit), or from the API a dictionary of named
    values for each unit: `{"references": ["<base64>", …], "driving": "<base64>", "weight": 1.0, …}`.

    Raises:
        FaceSnapError: an unknown name, a value out of range, or a photo that cannot be read; where several units are
            enabled, it says of which one.
    """
    by_name = bool(args) and isinstance(args[0], dict)
    if by_name:
        # the host fills up what the request leaves out with the components' own values
        given = [{"enabled": True, **values} for values in takewhile(lambda value: isinstance(value, dict), args)]
    else:
        size = len(UI_ORDER)
        given = [dict(zip(UI_ORDER, args[i : i + size])) for i in range(0, len(args), size)]
        if not (given and given[0]["enabled"]):
            return {}  # the accordion's own tick is the first person's
    enabled = {number: values for number, values in enumerate(given, 1) if values.get("enabled")}
    units = {}
    for number, values in enabled.items():
        with error_prefix(person(number, enabled)):
            units[number] = _unit(values if by_name else _from_page(values))
    return units


def sittings(units: Mapping[int, Unit]) -> list[dict[int, Unit]]:
    """Who is in the pictures of a job: the units once for each photo of the first one's, where these are of a person
    each, else the units alone.

    Raises:
        FaceSnapError: another unit's photos are of a person each, or a saved person is to be mixed with each of them.
    """
    first = min(units, default=0)
    for number, unit in units.items():
        if unit.several != "apart" or len(unit.references) < 2:
            continue
        if number != first:
            raise FaceSnapError(
                f"{person(number, units)}Only the first person's photos can be of a person each; mix or average these."
            )
        if unit.identity:
            raise FaceSnapError(
                f"{person(number, units)}The photos are of a person each and the saved person {unit.identity} is "
                "somebody else; take the photos or the saved person."
            )
        return [{**units, number: replace(unit, references=(photo,))} for photo in unit.references]
    return [dict(units)] if units else []


def person(number: int, people: Collection[int]) -> str:
    """What a message about a unit begins with; nothing where there is only one."""
    return f"Person {number}: " if len(people) > 1 else ""


# the page's components of a unit, in the order in which the script returns them
UI_ORDER = (
    *("enabled", "references", "face", "several", "identity", "pose", "driving", "driving_face", "template"),
    *("yaw", "pitch", "roll", "mouth", "brows", "eyes", "placed", "x", "y", "size", "weight", "start", "end"),
    *("cond_only", "hires", "blocks", "region", "grow", "mask", "redraw", "model", "adapter", "every"),
)


def _from_page(values: dict[str, Any]) -> dict[str, Any]:
    """A unit's values as the API names them; a component that somebody has emptied counts as untouched."""
    values = {name: value for name, value in values.items() if value is not None}
    if not values.pop("placed", False):
        values |= {"x": None, "y": None, "size": None}
    if isinstance(blocks := values.get("blocks"), str):
        try:
            values["blocks"] = tuple(float(number) for number in blocks.replace(",", " ").split())
        except ValueError:
            raise FaceSnapError(
                f"FaceSnap's blocks are '{blocks}'; give {BLOCKS} numbers from 0 to 2, or none."
            ) from None
    return values


def _unit(values: dict[str, Any]) -> Unit:
    known = {field.name for field in fields(Unit)}
    if unknown := sorted(set(values) - known):
        raise FaceSnapError(f"FaceSnap has no setting named {shown(unknown[0])}; it has {', '.join(sorted(known))}.")
    references, blocks = values.get("references") or [], values.get("blocks") or ()
    pictures = {"references": reference_photos(references if isinstance(references, (list, tuple)) else [references])}
    for name, title in (("driving", "Driving photo"), ("mask", "Region")):
        pictures[name] = _photo(values[name], title) if values.get(name) else None
    return Unit(**{**values, "blocks": tuple(blocks) if isinstance(blocks, (list, tuple)) else (blocks,), **pictures})


def reference_photos(values: Sequence[Any] | None) -> tuple[Photo, ...]:
    """The reference photos as the page or the API gives them; what is empty is left out.

    Raises:
        FaceSnapError: some cannot be read; it says so of each.
    """
    read = [_photo_or_problem(value, f"Reference photo {i}") for i, value in enumerate(filter(None, values or ()), 1)]
    if problems := [str(one) for one in read if isinstance(one, FaceSnapError)]:
        raise FaceSnapError(" ".join(problems))
    return tuple(read)


def _photo_or_problem(value: Any, name: str) -> Photo | FaceSnapError:
    try:
        return _photo(value, name)
    except FaceSnapError as error:
        return error


def _photo(value: Any, name: str) -> Photo:
    if isinstance(value, str):  # the API's pictures; never a path or a URL
        return photos.from_base64(value, name)
    if isinstance(value, bytes):
        return photos.from_bytes(value, name)
    if isinstance(value, Image):
        return photos.from_pil(value, name)
    raise FaceSnapError(f"{name} is {shown(value)}, not a picture: send a picture file's contents in base64.")


def shown(value: Any) -> str:
    """A value for a message, whatever somebody has sent: on one line, and not long."""
    return reprlib.repr(value)
