"""The engine's cache: loaded models, and results such as detected faces and identity tokens.

A model is reloaded when its file changes (`signature_of`). A result is keyed by everything it was computed from. For
a photo, that is the hash of its pixels, `Photo.digest`, which `face_key` combines with the signatures of the networks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import numpy as np

from facesnap_ext.files import state_of
from facesnap_ext.photos import Photo

T = TypeVar("T")
MAX_RESULTS = 128  # per kind of result; the largest ones, CLIP's tokens, take 1.3 MB each


class Cache:
    """Models and results. Thread-safe: jobs and the page's requests run in different threads."""

    def __init__(self) -> None:
        self.lock = RLock()
        self._models: dict[str, tuple[Hashable, Any]] = {}  # by part: the files' signature, and the model
        self._results: dict[Hashable, OrderedDict[Hashable, Any]] = {}  # by kind, then by key

    def load(self, part: str, source: Any, load: Callable[[Any], T]) -> T:
        """Return the model of a part, loading it if it is not cached or if its file has changed or been replaced.

        Args:
            source: a path, or a tuple of paths; passed to `load`.
        """
        signature = signature_of(source)
        with self.lock:
            if self._models.get(part, (None,))[0] != signature:
                self._models.pop(part, None)  # free the old model before loading the new one
                self._models[part] = (signature, load(source))
            return self._models[part][1]

    def load_variant(self, part: str, source: Any, load: Callable[[Any], T], max_loaded: int) -> T:
        """Like `load`, but several files of the part may be loaded at once.

        Args:
            max_loaded: the least recently used models beyond this number are freed before another one is loaded.
        """
        name = f"{part} {source}"
        with self.lock:
            others = [other for other in self._models if other.startswith(f"{part} ") and other != name]
            for other in others[: max(0, len(others) + 1 - max_loaded)]:
                del self._models[other]
            model = self.load(name, source, load)
            self._models[name] = self._models.pop(name)  # the last entry is the most recently used
            return model

    def get_or_compute(self, key: tuple[Hashable, ...], compute: Callable[[], T], max_results: int = MAX_RESULTS) -> T:
        """Return a cached result, computing it if there is none.

        Args:
            key: the kind of result, followed by everything that it is computed from.
            max_results: how many results of this kind are kept; the least recently used are dropped.
        """
        with self.lock:
            results = self._results.setdefault(key[0], OrderedDict())
            if key not in results:
                results[key] = compute()
                while len(results) > max_results:
                    results.popitem(last=False)
            results.move_to_end(key)
            return results[key]


def signature_of(path: Path | tuple[Path, ...]) -> Hashable:
    """Return a value that changes when the file, any file in the folder, or any of several paths changes."""
    if isinstance(path, tuple):
        return tuple(map(signature_of, path))
    members = sorted(path.rglob("*")) if path.is_dir() else [path]
    return tuple((str(member), *state_of(member)) for member in members)


def face_key(kind: str, networks: tuple[Hashable, ...], photo: Photo, box: np.ndarray) -> tuple[Hashable, ...]:
    """Return the cache key of what networks compute from one face: the photo's hash, and the face's box in it.

    Args:
        networks: the signatures of the networks' files, and whatever else the result depends on.
    """
    return (kind, *networks, photo.digest, *box)
