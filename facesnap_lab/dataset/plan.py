"""The plan of a build: the shard of every photo, fixed before the first photo is opened.

The first line of `plan.jsonl` contains the settings; each further line describes a person. Everything that determines
a shard is in the plan. A build that is continued later, with any number of workers, therefore writes the same bytes,
and a build with different photos is rejected.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_lab.dataset.layouts import Person, PhotoFile
from facesnap_lab.storage import Location, write

FILE_NAME = "plan.jsonl"
VERSION = 1


@dataclass(frozen=True)
class PlannedShard:
    """The content of a shard, which one process builds. `first` is the number of its first person in the plan."""

    number: int
    first: int
    people: tuple[Person, ...]

    @property
    def photos(self) -> list[tuple[Person, PhotoFile]]:
        return [(person, photo) for person in self.people for photo in person.photos]


def divide_into_shards(people: Sequence[Person], per_shard: int) -> list[PlannedShard]:
    """Plan shards of at least `per_shard` photos, except for the last. A person's photos stay together."""
    shards: list[PlannedShard] = []
    current: list[Person] = []
    count = 0
    for number, person in enumerate(people, 1):
        current.append(person)
        count += len(person.photos)
        if count >= per_shard or number == len(people):
            shards.append(PlannedShard(len(shards), number - len(current), tuple(current)))
            current, count = [], 0
    return shards


def write_or_compare(
    out: Location, settings: Mapping[str, Any], folders: Sequence[Location], shards: Iterable[PlannedShard]
) -> None:
    """Write the plan, or compare it with the existing one.

    Args:
        settings: everything other than the photos that determines the shards, serialisable to JSON.
        folders: the folders of the photos, for error messages only; they may have been moved.

    Raises:
        FaceSnapError: the existing plan has different settings or photos.
    """
    lines = [json.dumps({"version": VERSION, **settings}, sort_keys=True)]
    lines += [
        json.dumps({"shard": planned.number, **_person_fields(person)}, ensure_ascii=False)
        for planned in shards
        for person in planned.people
    ]
    path = out / FILE_NAME
    if not path.exists():
        write_text(path, "\n".join(lines) + "\n")
        return
    try:
        before = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise FaceSnapError(f"{path} is damaged ({error}); build into another folder.") from error
    now = [json.loads(line) for line in lines]
    if before != now:
        raise FaceSnapError(
            f"{_difference(before, now, folders)}; undo this change, or build into a folder other than {out}."
        )


def _person_fields(person: Person) -> dict[str, Any]:
    fields = asdict(person)
    for photo in fields["photos"]:
        if photo["origin"] is None:  # plans of builds without a manifest stay the same
            del photo["origin"]
    return fields


def _difference(before: list[Any], now: list[Any], folders: Sequence[Location]) -> str:
    for key in before[0] | now[0]:
        if before[0].get(key) != now[0].get(key):
            return f"The build was started with {key} {before[0].get(key)}, but now has {now[0].get(key)}"
    old, new = (
        {(line["folder"], photo["path"]): (line["name"], photo) for line in lines[1:] for photo in line["photos"]}
        for lines in (before, now)
    )
    for key in old | new:
        if old.get(key) != new.get(key):
            return f"{folders[key[0]] / key[1]} {_change(old.get(key), new.get(key))} since the build was started"
    return "The photos have changed since the build was started"


def _change(old: tuple[str, dict[str, Any]] | None, new: tuple[str, dict[str, Any]] | None) -> str:
    """Describe what happened to a photo, given its person's name and its fields in both plans."""
    if old is None or new is None:
        return "has been added" if old is None else "has been removed"
    if old[1].get("origin") != new[1].get("origin"):
        return "has been given a different source, license or consent in the manifest"
    return "has changed"


def write_text(path: Location, text: str) -> None:
    """Write a file completely or not at all.

    Raises:
        FaceSnapError: the disk is full or not writable, or the object store fails.
    """
    try:
        with write(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Location, error: OSError) -> FaceSnapError:
    """Return the error for the user if a file cannot be written."""
    return FaceSnapError(
        f"{path} cannot be written ({error.strerror or error}); free some disk space or make the folder writable, and "
        "run the command again to continue after the finished shards."
    )
