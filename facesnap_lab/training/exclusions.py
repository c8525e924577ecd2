"""The list of people and photos that must not be trained on."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass

from facesnap_lab.storage import Location
from facesnap_lab.text_files import read_utf8

_HASH = re.compile(r"\\?([0-9a-f]{64})( [ *].*)?", re.IGNORECASE)  # also as `sha256sum` prints it, with a file name


@dataclass(frozen=True)
class Exclusions:
    """The people and photos to leave out.

    path: the file that lists them. people: their names, in Unicode's form NFC. photos: the SHA-256 of their files.
    """

    path: Location
    people: frozenset[str]
    photos: frozenset[str]

    @property
    def digest(self) -> str:
        """A hash of the entries, regardless of their order."""
        return hashlib.sha256("\n".join(sorted(self.people | self.photos)).encode()).hexdigest()

    def matches(self, person: str, photo: str) -> frozenset[str]:
        """Return the entries that apply to a photo; if there are any, it must be left out.

        Args:
            person: name of the person in the data, such as "VGGFace2/n000002". Entries may omit the data set.
            photo: SHA-256 of the file, or "" if unknown.
        """
        name = _canonical(person)
        names = (name, name.partition("/")[2])
        # some data sets name people by hashes
        return self.people.intersection(names) | self.photos.intersection((photo, *map(str.lower, names)))

    def describe_unmatched(self, matched: Collection[str]) -> str:
        """Return a sentence about the entries that are not in `matched`, or "" if there are none."""
        unmatched = sorted((self.people | self.photos).difference(matched))
        if not unmatched:
            return ""
        more = f", and {len(unmatched) - 1} more such entries" if len(unmatched) > 1 else ""
        return f"{self.path} lists {unmatched[0]}, which matches no photo{more}; check the spelling."


def read_exclusions(path: Location) -> Exclusions:
    """Read a text file with one person or one SHA-256 of a photo per line. Lines that start with # are comments.

    Raises:
        FaceSnapError: the file cannot be read or is not UTF-8.
    """
    lines = read_utf8(path, "list", "save the list as UTF-8 text").split("\n")
    people, photos = set(), set()
    for line in map(_canonical, lines):
        if match := _HASH.fullmatch(line):
            photos.add(match[1].lower())
        elif line and not line.startswith("#"):
            people.add(line)
    return Exclusions(path, frozenset(people), frozenset(photos))


def _canonical(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())
