"""The plan of the gallery: photos, and the images to generate from them.

The plan is a JSON file; paths in it are relative to its own folder:

    {
      "defaults": {"steps": 30, "width": 1016, "height": 1016},        settings of every job in the WebUI's API
      "photos": {
        "astronaut": {"file": "skimage:astronaut", "credit": "NASA", "shown": true},
        "second": {"file": "photos/second.jpg", "credit": "a person who has agreed"}
      },
      "pictures": {
        "front": {"title": "From the front", "readme": true, "job": {"prompt": "…", "seed": 1},
                  "people": [{"references": ["astronaut"], "pose": "template"}]}
      }
    }

`job` overrides `defaults`. `people` are the dictionaries of FaceSnap's API, with names of photos instead of images; an
image without people is generated without FaceSnap. `shown`: the page shows the photo; `readme`: README shows the image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

from facesnap_ext.errors import FaceSnapError, reason_of

PACKAGED = "skimage:"  # prefix of the photos that come with scikit-image
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class PlanPhoto:
    """A photo. `file`: its path, or the name of one of scikit-image's images after `PACKAGED`."""

    name: str
    file: str
    path: Path
    credit: str
    shown: bool = False

    @cached_property
    def content(self) -> bytes | None:
        """The content of the image file; None if the file does not exist.

        Raises:
            FaceSnapError: it cannot be read, or scikit-image is not installed.
        """
        if self.file.startswith(PACKAGED):
            return _packaged(self.file.removeprefix(PACKAGED))
        try:
            return self.path.read_bytes() if self.path.exists() else None
        except OSError as error:
            raise FaceSnapError(f"{self.path} cannot be read ({error.strerror or error}); check the file.") from error


@dataclass(frozen=True)
class Picture:
    """An image to generate. `job`: the request to the WebUI's API, without FaceSnap."""

    name: str
    title: str
    job: Mapping[str, Any]
    people: tuple[Mapping[str, Any], ...]
    readme: bool = False

    @property
    def photos(self) -> list[str]:
        """The names of the photos that it needs, each once."""
        names = [name for person in self.people for name in [*person.get("references", []), person.get("driving")]]
        return list(dict.fromkeys(filter(None, names)))


@dataclass(frozen=True)
class Plan:
    photos: Mapping[str, PlanPhoto]
    pictures: tuple[Picture, ...]


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        FaceSnapError: it cannot be read, has an unknown or missing field, or uses a photo that it does not list.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        photos = {name: _photo(path.parent, name, **values) for name, values in content["photos"].items()}
        defaults = content["defaults"]
        pictures = tuple(_picture(defaults, name, **values) for name, values in content["pictures"].items())
        unknown = [(one.name, photo) for one in pictures for photo in one.photos if photo not in photos]
    except OSError as error:
        raise FaceSnapError(f"{path} cannot be read ({error.strerror or error}); check the file.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FaceSnapError(
            f"{path} is not a valid plan ({reason_of(error)}); facesnap_lab/gallery/plan.py describes the format."
        ) from error
    if unknown:
        picture, photo = unknown[0]
        raise FaceSnapError(f"The image {picture} in {path} uses the photo {photo!r}; add it to photos.")
    return Plan(photos, pictures)


def _photo(folder: Path, name: str, file: str, credit: str, shown: bool = False) -> PlanPhoto:
    return PlanPhoto(_valid(name), file, folder / file, credit, shown)


def _picture(
    defaults: Mapping[str, Any],
    name: str,
    title: str,
    job: Mapping[str, Any],
    people: list[Mapping[str, Any]] | None = None,
    readme: bool = False,
) -> Picture:
    return Picture(_valid(name), title, {**defaults, **job}, tuple(people or ()), readme)


def _valid(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"the name {name!r} is not lower-case letters, digits and hyphens")
    return name


@cache
def _packaged(name: str) -> bytes:
    """One of scikit-image's images as PNG."""
    try:
        from skimage import data
    except ImportError as error:
        raise FaceSnapError(
            f"The photo {name} comes with scikit-image, which cannot be loaded ({reason_of(error)}): install it."
        ) from error
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(getattr(data, name)()).save(buffer, "PNG")
    return buffer.getvalue()
