"""An evaluation's list of identities, poses and prompts, and the cases of all combinations.

The list is a YAML or JSON file; paths in it are relative to its own folder:

    seed: 0
    identities:
      ada: ada.jpg                                    # the reference photo; a list if there are several
      bob: {references: [bob1.jpg], photos: [bob2.jpg, bob3.jpg]}
    poses:
      left: poses/left.jpg                            # driving photos
    prompts:
      beach: a photo of a person on a beach
      oil: {text: an oil painting of a person, weight: 0.5}

Images are compared with `photos`, or with the references if there are none.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.files import atomic_write

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_NAME = re.compile(r"\w[\w .-]*")


@dataclass(frozen=True)
class Identity:
    name: str
    references: tuple[Path, ...]  # input of the method
    photos: tuple[Path, ...] = ()  # further photos of the person

    @property
    def real(self) -> tuple[Path, ...]:
        """The photos that images are compared with."""
        return self.photos or self.references


@dataclass(frozen=True)
class Pose:
    name: str
    photo: Path


@dataclass(frozen=True)
class Prompt:
    name: str
    text: str
    weight: float = 1.0  # weight in the mean over a person's images


@dataclass(frozen=True)
class Case:
    """One image to generate. `file`: its path in a method's folder."""

    identity: Identity
    pose: Pose
    prompt: Prompt
    seed: int
    file: str


@dataclass(frozen=True)
class Protocol:
    identities: tuple[Identity, ...]
    poses: tuple[Pose, ...]
    prompts: tuple[Prompt, ...]
    seed: int = 0
    per_person: int | None = None  # combinations of pose and prompt for each identity; None: all

    def cases(self) -> list[Case]:
        """Combine every identity, pose and prompt; adding entries does not change a case's file or seed.

        With `per_person`, the identities take turns, so that each combination is used about equally often, and each
        identity gets different poses.
        """
        every = list(itertools.product(self.poses, self.prompts))
        count = len(every) if self.per_person is None else self.per_person
        cases = []
        for number, identity in enumerate(self.identities):
            first = 0 if self.per_person is None else number
            for offset in range(count):
                pose, prompt = every[(first + offset * len(every) // count) % len(every)]
                file = f"{identity.name}/{pose.name}-{prompt.name}.png"
                digest = hashlib.sha256(f"{self.seed}/{file}".encode()).digest()
                cases.append(Case(identity, pose, prompt, int.from_bytes(digest[:4], "big"), file))
        return cases


def read_protocol(path: Path) -> Protocol:
    """Read a list.

    Raises:
        FaceSnapError: it cannot be read, a field is unknown, missing or of the wrong type, a photo does not exist, or
            two images would have the same name.
    """
    content = _fields(path, "the list", _load(path), ("seed", "identities", "poses", "prompts"))
    seed = content.get("seed", 0)
    if type(seed) is not int or seed < 0:
        raise FaceSnapError(f"The seed in {path} is {seed!r}, but must be a whole number of at least 0.")
    protocol = Protocol(
        tuple(_identity(path, name, value) for name, value in _section(path, content, "identities")),
        tuple(Pose(name, _photo(path, name, value)) for name, value in _section(path, content, "poses")),
        tuple(_prompt(path, name, value) for name, value in _section(path, content, "prompts")),
        seed,
    )
    taken: dict[str, str] = {}
    for case in protocol.cases():
        # some file systems ignore case
        if (other := taken.setdefault(case.file.casefold(), case.file)) is not case.file:
            raise FaceSnapError(
                f"{path} results in two images named {other} and {case.file}, which may overwrite each other; "
                "rename one of them."
            )
    return protocol


def plan(identities: Path, poses: Path, prompts: Path, out: Path, seed: int = 0) -> Protocol:
    """Write a list from folders.

    Args:
        identities: folder with one photo per person, or one folder per person, of which the first photo becomes the
            reference and the others are the photos to compare with. poses: folder with the driving photos. prompts:
            text file with one prompt per line.
    Raises:
        FaceSnapError: a folder or file is missing or empty, or the list already exists.
    """
    import yaml

    if out.exists():
        raise FaceSnapError(f"{out} already exists; remove it or choose another name.")
    people: dict[str, Any] = {}
    for member in sorted(_members(identities)):
        if member.is_dir():
            first, *others = map(str, _photo_files(member))
            _add(people, member.name, {"references": [first], "photos": others} if others else first, identities)
        elif member.suffix.lower() in IMAGE_SUFFIXES:
            _add(people, member.stem, str(member.resolve()), identities)
    if not people:
        raise FaceSnapError(f"{identities} contains no photos; add one for each person.")
    driving: dict[str, Any] = {}
    for photo in _photo_files(poses):
        _add(driving, photo.stem, str(photo), poses)
    try:
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise FaceSnapError(
            f"The prompts {prompts} cannot be read ({error}); use a text file with one prompt per line."
        ) from error
    if not lines:
        raise FaceSnapError(f"{prompts} contains no prompts; write one per line.")
    texts = {f"p{number}": line for number, line in enumerate(lines, 1)}
    content = {"seed": seed, "identities": people, "poses": driving, "prompts": texts}
    with atomic_write(out) as part:
        part.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return read_protocol(part)


def find_images(cases: Sequence[Case], folder: Path) -> dict[str, Path]:
    """Find the images of a list in a method's folder, by their names in the list; the suffix may differ from .png.

    Raises:
        FaceSnapError: the folder does not exist, or an image is missing.
    """
    if not folder.is_dir():
        raise FaceSnapError(f"The image folder {folder} does not exist; correct its name.")
    found, missing = {}, []
    for case in cases:
        stem = case.file.removesuffix(".png")
        for suffix in IMAGE_SUFFIXES:
            if (path := folder / f"{stem}{suffix}").is_file():
                found[case.file] = path
                break
        else:
            missing.append(case.file)
    if missing:
        named = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise FaceSnapError(
            f"{folder} lacks {len(missing)} of the list's {len(cases)} images: {named}; add the missing ones."
        )
    return found


def _load(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Rejects duplicate keys, of which PyYAML silently keeps the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            names = [self.construct_object(key) for key, _ in node.value]
            if twice := [name for i, name in enumerate(names) if name in names[:i]]:
                raise FaceSnapError(f"{path} contains the name '{twice[0]}' twice; rename or remove one.")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise FaceSnapError(f"The list {path} does not exist; write one, or create it with 'facesnap plan'.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = reason_of(error, None)
        raise FaceSnapError(f"{path} cannot be read as YAML or JSON ({reason}); correct it.") from error


def _fields(path: Path, what: str, value: Any, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise FaceSnapError(f"{what} in {path} must have the fields {', '.join(known)}; correct it.")
    if unknown := [name for name in value if name not in known]:
        raise FaceSnapError(f"{what} in {path} has an unknown field '{unknown[0]}'; use {', '.join(known)}.")
    return value


def _section(path: Path, content: Mapping[str, Any], section: str) -> list[tuple[str, Any]]:
    """Return the names and values of a section of the list."""
    values = content.get(section)
    if not isinstance(values, Mapping) or not values:
        raise FaceSnapError(f"{path} has no {section}; add at least one, with a name.")
    for name in values:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise FaceSnapError(
                f"The name {name!r} among the {section} in {path} cannot be a file name; use letters, digits, '.', '-' "
                "and '_', and put a name that YAML reads as a number in quotes."
            )
    return list(values.items())


def _identity(path: Path, name: str, value: Any) -> Identity:
    if not isinstance(value, Mapping):
        value = {"references": value}
    value = _fields(path, f"'{name}'", value, ("references", "photos"))
    references = _photos(path, name, value.get("references"))
    photos = _photos(path, name, value["photos"]) if value.get("photos") else ()
    return Identity(name, references, photos)


def _prompt(path: Path, name: str, value: Any) -> Prompt:
    if not isinstance(value, Mapping):
        value = {"text": value}
    value = _fields(path, f"'{name}'", value, ("text", "weight"))
    text, weight = value.get("text"), value.get("weight", 1.0)
    if not isinstance(text, str) or not text.strip():
        raise FaceSnapError(f"The prompt '{name}' in {path} has no text; write one, in quotes.")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise FaceSnapError(f"The weight of '{name}' in {path} is {weight!r}, but must be greater than 0.")
    return Prompt(name, text, float(weight))


def _photos(path: Path, name: str, value: Any) -> tuple[Path, ...]:
    values = value if isinstance(value, list) else [value]
    photos = tuple(_photo(path, name, item) for item in values)
    if not photos:
        raise FaceSnapError(f"'{name}' in {path} has no photo; add at least one.")
    if len(set(photos)) < len(photos):
        raise FaceSnapError(f"'{name}' in {path} lists the same photo twice; remove one.")
    return photos


def _photo(path: Path, name: str, value: Any) -> Path:
    if not isinstance(value, str) or not value:
        raise FaceSnapError(f"'{name}' in {path} has {value!r} instead of a photo; enter the path of one.")
    photo = path.parent.resolve() / Path(value).expanduser()
    if not photo.is_file():
        raise FaceSnapError(f"'{name}' in {path} refers to {photo}, which does not exist; correct the path.")
    return photo


def _members(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FaceSnapError(f"The folder {folder} does not exist; correct its name.")
    return [member for member in folder.iterdir() if not member.name.startswith(".")]


def _photo_files(folder: Path) -> list[Path]:
    files = sorted(path.resolve() for path in _members(folder) if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FaceSnapError(f"{folder} contains no photos; add some as PNG, JPEG or WebP.")
    return files


def _add(entries: dict[str, Any], name: str, value: Any, folder: Path) -> None:
    if name in entries:
        raise FaceSnapError(f"{folder} contains two photos named '{name}'; rename or remove one.")
    entries[name] = value
