"""The positions of the samples in a shard: from the headers of a local tar file, or from an index file beside it.

In an object store, reading the headers would take a request for each. The index `shard-000000.index.json` of a shard
`shard-000000.tar` contains the positions, and the people and provenances of the images:

    {"size": bytes of the shard, "images": [[key, start, end, json_start, json_end, number of the label], …],
     "labels": [[person, provenance], …]}
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from facesnap_ext.errors import FaceSnapError, reason_of
from facesnap_lab.storage import Location, Url, write

IMAGES = ("png", "jpg", "jpeg")
REQUIRED = ("mask.png", "npy", "json")
PROVENANCE = ("source", "license", "consent", "photo")
BLOCK = 512  # block size of tar files in bytes

Label = tuple[str, dict[str, str]]
"""The person in an image, and its provenance."""


class Position(NamedTuple):
    """The byte ranges of a sample in its shard, and of the content of its json member."""

    key: str
    start: int
    end: int
    json_start: int
    json_end: int


def read_headers(path: Path) -> Iterator[Position]:
    """Find the samples in a shard by reading only the tar headers.

    Raises:
        FaceSnapError: the shard is missing, truncated or not a tar file, or a sample is incomplete.
    """
    from webdataset.tariterators import base_plus_ext

    key, extensions, start, end, json_start, json_end = None, set(), 0, 0, 0, 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                name, extension = base_plus_ext(member.name)
                if name != key:
                    if key is not None:
                        _check_complete(path, key, extensions)
                        yield Position(key, start, end, json_start, json_end)
                    key, extensions, start = name, set(), member.offset
                extensions.add(extension)
                if extension == "json":
                    json_start, json_end = member.offset_data, member.offset_data + member.size
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
        truncated = path.stat().st_size < end + BLOCK  # a complete tar file ends with empty blocks
    except FileNotFoundError:
        raise FaceSnapError(f"The shard {path} does not exist; check its name and folder.") from None
    except (OSError, tarfile.TarError, EOFError) as error:
        raise FaceSnapError(f"{path} is not a complete tar file ({error}); copy or build the shard again.") from error
    if truncated:
        raise FaceSnapError(f"{path} is truncated; copy or build the shard again.")
    if key is not None:
        _check_complete(path, key, extensions)
        yield Position(key, start, end, json_start, json_end)


def _check_complete(path: Path, key: str, extensions: set[str]) -> None:
    missing = [extension for extension in REQUIRED if extension not in extensions]
    if not extensions.intersection(IMAGES):
        missing.append(IMAGES[0])
    if missing:
        raise FaceSnapError(f"The sample {key} in {path} has no {missing[0]}; build the shard again.")


def index_of(shard: Location) -> Location:
    return shard.parent / f"{shard.stem}.index.json"


def write_index(shard: Location, size: int, positions: Sequence[Position], labels: Sequence[Label]) -> None:
    """Write the index of a shard.

    Args:
        size: of the shard in bytes. labels: of the samples at the positions.

    Raises:
        OSError: the disk is full or not writable.
        FaceSnapError: the object store fails.
    """
    numbers: dict[str, int] = {}
    texts = [json.dumps(label, ensure_ascii=False, sort_keys=True) for label in labels]
    images = [[*position, numbers.setdefault(text, len(numbers))] for position, text in zip(positions, texts)]
    content = {"size": size, "images": images, "labels": [json.loads(text) for text in numbers]}
    with write(index_of(shard)) as file:
        file.write(json.dumps(content, ensure_ascii=False).encode())


def read_index(shard: Url) -> tuple[list[Position], list[Label]]:
    """Read the positions and labels of the samples in a shard from its index.

    Raises:
        FaceSnapError: the shard or its index is missing or damaged, or they do not belong together.
    """
    index = index_of(shard)
    try:
        size, content = shard.size(), json.loads(index.read_bytes())
        labels = [(_text(person), parse_provenance(provenance)) for person, provenance in content["labels"]]
        positions = [Position(_text(key), *map(_number, ranges)) for key, *ranges, _ in content["images"]]
        own_labels = [labels[_number(image[-1])] for image in content["images"]]
        expected = content["size"]
    except FileNotFoundError as error:
        raise FaceSnapError(f"{error.filename} does not exist; copy both the shards and their indexes.") from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FaceSnapError(f"{index} is damaged ({reason_of(error)}); copy or build the shard again.") from error
    if size != expected:
        raise FaceSnapError(f"{shard} has {size} bytes, but {expected} according to {index}; copy or build it again.")
    return positions, own_labels


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{value!r} is not a position")
    return value


def read_positions(shard: Location) -> list[Position]:
    """Find the samples in a shard.

    Raises:
        FaceSnapError: the shard or its index is missing or damaged, or a sample is incomplete.
    """
    return read_index(shard)[0] if isinstance(shard, Url) else list(read_headers(shard))


def parse_provenance(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or (value and set(value) != set(PROVENANCE)):
        raise ValueError(f"its provenance does not consist of {', '.join(PROVENANCE)}")
    if not all(isinstance(text, str) for text in value.values()):
        raise ValueError("its provenance is not text")
    return value
