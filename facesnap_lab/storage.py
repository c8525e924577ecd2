"""Files in object stores such as S3 and Google Cloud Storage, by URL (`s3://bucket/folder/file`), through fsspec.

A `Location` is a `Path` or a `Url`. A `Url` has the methods of `Path` that the lab uses. Like a `Path`, it raises
`FileNotFoundError`; all other errors are `FaceSnapError`s. Credentials come from the store's usual settings, such as
`~/.aws` or `AWS_ACCESS_KEY_ID`, and never from a URL, because URLs are shown in messages and reports.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeAlias, TypeVar
from urllib.request import url2pathname

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_ext.files import atomic_write

T = TypeVar("T")
WAITS = (0.5, 1, 2, 4, 8, 16, 30)
"""Seconds between attempts while a store fails, in addition to the attempts of the store's own library."""

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)  # not a drive such as C:
_LOGIN = re.compile(r"://[^/\s'\"]*@")
_SECRET = re.compile(r"([?&][\w-]*(credential|key|password|secret|sig|token)[\w-]*=)[^&\s]*", re.IGNORECASE)
_FINAL = (PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TypeError)
"""Errors that do not go away."""


@dataclass(frozen=True, order=True)
class Url:
    """A file or folder in an object store. text: the URL, without a slash at the end."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str | PurePosixPath) -> Url:
        return Url(f"{self.text}/{name}")

    @property
    def path(self) -> PurePosixPath:
        """The part after `s3://`."""
        return PurePosixPath(self.text.partition("://")[2])

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def parent(self) -> Url:
        return self.with_path(self.path.parent)

    @property
    def parents(self) -> tuple[Url, ...]:
        return tuple(map(self.with_path, self.path.parents))

    def with_path(self, path: PurePosixPath) -> Url:
        return Url(f"{self.text.partition('://')[0]}://{path}")

    def exists(self) -> bool:
        return self._call("read", lambda fs, path: fs.exists(path))

    def size(self) -> int:
        """Return the size in bytes.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return self._call("read", lambda fs, path: fs.size(path))

    def read_bytes(self) -> bytes:
        return self._call("read", lambda fs, path: fs.cat_file(path))

    def read_range(self, start: int, end: int) -> bytes:
        """Read the bytes from `start` up to, but not including, `end`, with one request."""
        return self._call("read", lambda fs, path: fs.cat_file(path, start=start, end=end))

    def read_text(self, encoding: str) -> str:
        return self.read_bytes().decode(encoding)

    def upload(self, file: Path) -> None:
        """Write the content of a local file. The object appears only when it is complete."""
        self._call("written", lambda fs, path: fs.put_file(str(file), path))

    def download(self, file: Path) -> None:
        """Write the content to a local file, which is incomplete if this fails."""
        self._call("read", lambda fs, path: fs.get_file(path, str(file)))

    def delete(self) -> None:
        """Delete a file, or a folder with everything in it."""
        self._call("deleted", lambda fs, path: fs.rm(path, recursive=True))

    def list_files(self) -> dict[str, int]:
        """Return the sizes of all files in this folder and its subfolders, by their paths relative to it.

        There are no empty folders in an object store: if there are no files, the folder does not exist.
        """

        def find(fs: Any, folder: str) -> dict[str, int]:
            found = fs.find(folder, detail=True)
            return {path.removeprefix(folder).lstrip("/"): details["size"] for path, details in found.items()}

        files = self._call("listed", find)
        return {path: size for path, size in files.items() if path}

    def glob(self, pattern: str) -> list[Url]:
        """Return the files that match a pattern relative to this folder, in alphabetical order."""
        found = self._call("listed", lambda fs, folder: fs.glob(f"{folder}/{pattern}"))
        return sorted(self.with_path(PurePosixPath(_without_protocol(path))) for path in found)

    def _call(self, done: str, action: Callable[[Any, str], T]) -> T:
        """Call `action` with the file system and the path in it, and again while the store fails.

        Raises:
            FileNotFoundError: there is no such file.
            FaceSnapError: the store cannot be used, or fails for more than a minute.
        """
        for seconds in WAITS:
            with suppress(_StoreFailsError):
                return self._try(done, action)
            time.sleep(seconds)
        return self._try(done, action)

    def _try(self, done: str, action: Callable[[Any, str], T]) -> T:
        try:
            # a forked process cannot use its parent's file systems; fsspec keeps them for each process
            return action(*_file_system(self.text))
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.text) from None
        except ImportError as error:
            raise FaceSnapError(f"{self} requires another package ({reason_of(error)}); install it.") from error
        except Exception as error:  # the stores' libraries raise their own errors
            final = isinstance(error, _FINAL) or "Credentials" in type(error).__name__
            # without a cause, because a traceback may show credentials
            raise (FaceSnapError if final else _StoreFailsError)(
                f"{self} cannot be {done} ({redact(reason_of(error))}); check the connection and your permissions, and "
                "run the command again."
            ) from None


class _StoreFailsError(FaceSnapError):
    """The store may work again after a while."""


Location: TypeAlias = Path | Url


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    return url_to_fs(url, use_listings_cache=False)  # other machines write too


def _without_protocol(path: str) -> str:
    return path.partition("://")[2] or path.lstrip("/")


def location(text: str) -> Location:
    """Return a path or URL that a user entered; `file://` is a local path.

    Raises:
        FaceSnapError: the URL contains credentials.
    """
    match = _URL.match(text)
    if match is None:
        return Path(text)
    login = _LOGIN.search(text)
    if (login and ":" in login[0][3:]) or _SECRET.search(text):
        raise FaceSnapError(
            f"The URL {redact(text)} contains credentials; put them where its store expects them, such as in ~/.aws or "
            "AWS_ACCESS_KEY_ID, because URLs are shown in messages and reports."
        )
    if match[1].lower() == "file":
        return Path(url2pathname(text[match.end() :]))
    return Url(text.rstrip("/"))


def redact(text: str) -> str:
    """Remove logins (`user:password@`) and query parameters with secrets from the URLs in a text."""
    return _SECRET.sub(r"\1…", _LOGIN.sub("://…@", text))


@contextmanager
def write(target: Location) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `target` when the block ends without an error; until then, it does not change.

    Raises:
        OSError: the disk is full or not writable.
        FaceSnapError: the object store fails.
    """
    if isinstance(target, Path):
        with atomic_write(target) as part, part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        return
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "part")
        with part.open("wb") as file:
            yield file
        target.upload(part)


def upload_folder(url: Url, folder: Path) -> None:
    """Upload all files in a folder and its subfolders."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            (url / path.relative_to(folder).as_posix()).upload(path)


def file_names(folder: Location) -> set[str]:
    """Return the names of the files in a folder, without those in its subfolders."""
    if isinstance(folder, Url):
        return {path for path in folder.list_files() if "/" not in path}
    return {path.name for path in folder.iterdir()}


def size(file: Location) -> int:
    """Return the size of a file in bytes."""
    return file.size() if isinstance(file, Url) else file.stat().st_size


def read_range(source: Location, start: int, end: int) -> bytes:
    """Read the bytes from `start` up to, but not including, `end`."""
    if isinstance(source, Url):
        return source.read_range(start, end)
    with source.open("rb") as file:
        file.seek(start)
        return file.read(end - start)
