"""What the engine keeps between jobs: loaded models by the files that they came from, and results by what they were
computed from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

from facesnap_ext.files import state_of

if TYPE_CHECKING:
    from facesnap_ext.identity.faces import Face

T = TypeVar("T")
REMEMBERED = 128  # results of each kind; the largest of which so many are kept, CLIP's tokens, take 1.3 MB


class Cache:
    """Models and results, for jobs and the page's own requests, which come in threads of their own."""

    def __init__(self) -> None:
        self.lock = RLock()
        self._loaded: dict[str, tuple[Hashable, Any]] = {}  # one model of each part
        self._remembered: dict[str, OrderedDict[Hashable, Any]] = {}  # by kind

    def load(self, part: str, source: Any, load: Callable[[Any], T]) -> T:
        """The model of a part; loaded anew when its file is another one or has changed.

        Args:
            source: the file, or several, that `load` takes.
        """
        signature = signature_of(source)
        with self.lock:
            if self._loaded.get(part, (None,))[0] != signature:
                self._loaded.pop(part, None)  # the old one goes before the new one comes
                self._loaded[part] = (signature, load(source))
            return self._loaded[part][1]

    def load_one_of(self, kind: str, source: Any, load: Callable[[Any], T], kept: int) -> T:
        """As `load`, for a kind of which several files may be loaded; those least recently used go before it comes."""
        part = f"{kind} {source}"
        with self.lock:
            others = [name for name in self._loaded if name.startswith(f"{kind} ") and name != part]
            for name in others[: max(0, len(others) + 1 - kept)]:
                del self._loaded[name]
            model = self.load(part, source, load)
            self._loaded[part] = self._loaded.pop(part)  # the last of the dictionary is the latest used
            return model

    def remember(self, key: tuple[Hashable, ...], compute: Callable[[], T], kept: int = REMEMBERED) -> T:
        """A result, computed where it is not remembered; of each kind, which its key begins with, the `kept` latest
        used are."""
        with self.lock:
            results = self._remembered.setdefault(key[0], OrderedDict())
            if key not in results:
                results[key] = compute()
                while len(results) > kept:
                    results.popitem(last=False)
            results.move_to_end(key)
            return results[key]


def signature_of(path: Path | tuple[Path, ...]) -> Hashable:
    """Changes when the file, or a file in the folder or among several, does."""
    if isinstance(path, tuple):
        return tuple(map(signature_of, path))
    members = sorted(path.rglob("*")) if path.is_dir() else [path]
    return tuple((str(member), *state_of(member)) for member in members)


def face_key(kind: str, networks: tuple[Hashable, ...], face: Face) -> tuple[Hashable, ...]:
    """The cache key of what networks make of one face: the photo's hash, the face's box, and the networks' files."""
    return (kind, *networks, face.photo.digest, *face.box)
