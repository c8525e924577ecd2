"""Everything that a user can set, as one dataclass; to it from the page and the API, from it to infotext."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from facesnap_ext import photos
from facesnap_ext.errors import FaceSnapError
from facesnap_ext.photos import Photo


@dataclass(frozen=True)
class Settings:
    """One job's settings. The field names are the API's names."""

    enabled: bool = False
    references: tuple[Photo, ...] = ()  # photos of one person
    face: int = 0  # which face of each reference, by size from the largest
    driving: Photo | None = None  # whose pose and expression; None: the init picture's, or the reference's own
    weight: float = 1.0  # 0…2
    start: float = 0.0  # fraction of sampling, 0…1
    end: float = 1.0
    average: bool = False  # several references averaged in place of mixed together
    cond_only: bool = False  # leave the unconditional side alone
    model: str = ""  # name of the FaceSnap file; empty: the only one there is

    def __post_init__(self) -> None:
        for name, low, high in (("weight", 0, 2), ("start", 0, 1), ("end", 0, 1)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low <= value <= high:
                raise FaceSnapError(f"FaceSnap's {name} is {value!r}; give a number from {low} to {high}.")
        if not isinstance(self.face, int) or self.face < 0:
            raise FaceSnapError(f"FaceSnap's face is {self.face!r}; give a number from 0, the largest face.")

    @property
    def active(self) -> bool:
        """Whether there is anything to do; a weight of 0 or an empty window leaves the picture alone."""
        return self.enabled and self.weight > 0 and self.start < self.end

    def to_infotext(self) -> dict[str, Any]:
        """Generation parameters; photos as the first digits of their content hash, never as themselves."""
        text: dict[str, Any] = {
            "FaceSnap weight": self.weight,
            "FaceSnap start": self.start,
            "FaceSnap end": self.end,
            "FaceSnap references": " ".join(photo.digest[:10] for photo in self.references),
        }
        if self.driving is not None:
            text["FaceSnap driving"] = self.driving.digest[:10]
        return text


def from_script_args(args: Sequence[Any]) -> Settings:
    """Read the arguments that a host hands to the script.

    They are the page's components in their order (`UI_ORDER`), or one dictionary of named values from the API:
    `{"enabled": true, "references": ["<base64>", …], "driving": "<base64>", "weight": 1.0, …}`.

    Raises:
        FaceSnapError: an unknown name, a value out of range, or a photo that cannot be read.
    """
    if args and isinstance(args[0], dict):
        values = dict(args[0])
        values.setdefault("enabled", True)
    else:
        values = dict(zip(UI_ORDER, args))
        values["references"] = [values.pop("photo", None), *(values.pop("more_photos", None) or [])]
    if not values.get("enabled"):
        return Settings()
    known = {field.name for field in fields(Settings)}
    if unknown := sorted(set(values) - known):
        raise FaceSnapError(f"FaceSnap has no setting named {unknown[0]}; it has {', '.join(sorted(known))}.")

    references = values.get("references") or []
    if isinstance(references, str):
        references = [references]
    given = [value for value in references if value]
    values["references"] = tuple(_photo(value, f"Reference photo {i}") for i, value in enumerate(given, 1))
    values["driving"] = _photo(values["driving"], "Driving photo") if values.get("driving") else None
    return Settings(**values)


# the page's components, in the order in which the script returns them; API clients may send them so, too:
# new ones are appended
UI_ORDER = ("enabled", "photo", "more_photos", "driving", "weight", "start", "end", "model")


def _photo(value: Any, name: str) -> Photo:
    if isinstance(value, str):  # the API's pictures; never a path or a URL
        return photos.from_base64(value, name)
    if isinstance(value, bytes):
        return photos.from_bytes(value, name)
    return photos.from_pil(value, name)
