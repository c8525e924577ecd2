"""The engine's cache: loaded models, and results such as detected faces and identity tokens.

A model is reloaded when its file changes (`signature_of`). A result is keyed by everything it was computed from. For
a photo, that is the hash of its pixels, `Photo.digest`, which `face_key` combines with the signatures of the networks.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from threading import Lock, RLock
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from facesnap_ext.files import State, state_of
from facesnap_ext.photos import Photo

T = TypeVar("T")
MODEL_SUFFIXES = (".onnx", ".safetensors", ".bin", ".json")  # weight files of a face pack or transformers folder
MAX_MEMBERS = 1024  # maximum number of files checked per folder
MAX_RESULTS = 128  # maximum number of results of each kind; the largest, CLIP's tokens, take 1.3 MB each


class Cache:
    """Cached models and results. Thread-safe: jobs and the page's requests run in different threads.

    Each model and each result is loaded or computed under a separate lock, so a slow network delays only the threads
    that wait for the same result.
    """

    def __init__(self) -> None:
        self._lock = Lock()  # guards the dictionaries below; never held while loading or computing
        self._key_locks: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
        self._models: dict[str, tuple[Hashable, Any]] = {}  # part: (signature of its files, model)
        self._results: dict[Hashable, OrderedDict[Hashable, Any]] = {}  # kind: {key: result}

    def load(self, part: str, source: Any, load: Callable[[Any], T]) -> T:
        """Return the model of a part, loading it if it is not cached or if its file has changed or been replaced.

        Args:
            source: a path, or a tuple of paths; passed to `load`.
        """
        signature = signature_of(source)
        with self._key_lock(part):
            with self._lock:
                cached = self._models.get(part, (None, None))
                if cached[0] == signature:
                    return cached[1]
                self._models.pop(part, None)  # free the old model before loading the new one
            del cached
            model = load(source)
            with self._lock:
                self._models[part] = (signature, model)
            return model

    def load_variant(self, part: str, source: Any, load: Callable[[Any], T], max_loaded: int) -> T:
        """Like `load`, but several files of the part may be loaded at once.

        Args:
            max_loaded: the least recently used models beyond this number are freed before another one is loaded.
        """
        name = f"{part} {source}"
        with self._lock:
            others = [other for other in self._models if other.startswith(f"{part} ") and other != name]
            for other in others[: max(0, len(others) + 1 - max_loaded)]:
                del self._models[other]
        model = self.load(name, source, load)
        with self._lock:
            if name in self._models:
                self._models[name] = self._models.pop(name)  # the last entry is the most recently used
        return model

    def get_or_compute(self, key: tuple[Hashable, ...], compute: Callable[[], T], max_results: int = MAX_RESULTS) -> T:
        """Return a cached result, or compute and cache it.

        Args:
            key: the kind of result, followed by everything that it is computed from.
            max_results: how many results of this kind are kept; the least recently used are dropped.
        """
        with self._key_lock(key):
            with self._lock:
                results = self._results.setdefault(key[0], OrderedDict())
                if key in results:
                    results.move_to_end(key)
                    return results[key]
            result = compute()
            with self._lock:
                results[key] = result
                while len(results) > max_results:
                    results.popitem(last=False)
            return result

    def _key_lock(self, key: Hashable) -> Any:
        """Return the lock of one model or result, which exists only while a thread holds it or waits for it."""
        with self._lock:
            return self._key_locks.setdefault(key, RLock())


def signature_of(path: Path | tuple[Path, ...]) -> Hashable:
    """Return a value that changes when the file, any weight file directly in the folder, or any of several paths
    changes.

    An unreadable file, such as a dangling link, also has a signature; the code that loads it reports the error.
    """
    if isinstance(path, tuple):
        return tuple([signature_of(part) for part in path])
    members = [path]
    if path.is_dir():
        with suppress(OSError):
            with os.scandir(path) as entries:
                names = [entry.name for entry in entries]
            names = [name for name in names if name[0] != "." and name.endswith(MODEL_SUFFIXES)]
            members = [path / name for name in sorted(names)[:MAX_MEMBERS]]
    return tuple([(str(member), *_state_or_nothing(member)) for member in members])


def _state_or_nothing(path: Path) -> State:
    try:
        return state_of(path)
    except OSError:
        return ()


def face_key(kind: str, networks: tuple[Hashable, ...], photo: Photo, box: np.ndarray) -> tuple[Hashable, ...]:
    """Return the cache key of a result computed from one face; it contains the photo's hash and the face's box.

    Args:
        networks: the signatures of the networks' files, and anything else the result depends on.
    """
    return (kind, *networks, photo.digest, *box)
