"""The plan of a build: every photo's shard, fixed before the first photo is opened.

`plan.jsonl` has the settings in its first line, then a line for each person. All that a shard is made of is in it, so
that a build that goes on later, with other workers, writes the same bytes, and one with other photos is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import atomic_write
from facesnap_lab.dataset.layouts import Person, PhotoFile

NAME = "plan.jsonl"
VERSION = 1


@dataclass(frozen=True)
class Unit:
    """What one process makes at a time: a shard. `first` is the number of its first person in the whole plan."""

    number: int
    first: int
    people: tuple[Person, ...]

    @property
    def photos(self) -> list[tuple[Person, PhotoFile]]:
        return [(person, photo) for person in self.people for photo in person.photos]


def divide(people: Sequence[Person], per_shard: int) -> list[Unit]:
    """Shards of at least `per_shard` photos, but for the last; a person's photos stay together."""
    units: list[Unit] = []
    begun: list[Person] = []
    count = 0
    for number, person in enumerate(people, 1):
        begun.append(person)
        count += len(person.photos)
        if count >= per_shard or number == len(people):
            units.append(Unit(len(units), number - len(begun), tuple(begun)))
            begun, count = [], 0
    return units


def fix(out: Path, settings: Mapping[str, Any], folders: Sequence[Path], units: Iterable[Unit]) -> None:
    """Write the plan, or compare it with the one that is there.

    Args:
        settings: all that the shards depend on besides the photos, fit for JSON.
        folders: those that people's photos lie in, for messages alone: they may have moved.

    Raises:
        FaceSnapError: the plan that is there is of other settings or photos.
    """
    lines = [json.dumps({"version": VERSION, **settings}, sort_keys=True)]
    lines += [
        json.dumps({"shard": unit.number, **asdict(person)}, ensure_ascii=False)
        for unit in units
        for person in unit.people
    ]
    path = out / NAME
    if not path.exists():
        write_whole(path, "\n".join(lines) + "\n")
        return
    try:
        before = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise FaceSnapError(f"{path} is damaged ({error}); build into another folder.") from error
    now = [json.loads(line) for line in lines]
    if before != now:
        raise FaceSnapError(
            f"{_difference(before, now, folders)}; put it back, or build into another folder than {out}."
        )


def _difference(before: list[Any], now: list[Any], folders: Sequence[Path]) -> str:
    for key in before[0] | now[0]:
        if before[0].get(key) != now[0].get(key):
            return f"The build was begun with {key} {before[0].get(key)} and is now to go on with {now[0].get(key)}"
    old, new = (
        {(line["folder"], photo["path"]): (line["name"], photo) for line in lines[1:] for photo in line["photos"]}
        for lines in (before, now)
    )
    for place in old | new:
        if old.get(place) != new.get(place):
            verb = "is missing" if place not in new else "is new" if place not in old else "has changed"
            return f"{folders[place[0]] / place[1]} {verb} since the build was begun"
    return "The photos have changed since the build was begun"


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name, and give it its own when all is on the disk.

    Raises:
        FaceSnapError: the disk is full, or refuses.
    """
    try:
        with atomic_write(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> FaceSnapError:
    """The error for the user when the disk refuses a file."""
    return FaceSnapError(
        f"{path} cannot be written ({error.strerror or error}); make room, or let the folder be written to, and give "
        "the command again, it goes on from the shards that are whole."
    )
