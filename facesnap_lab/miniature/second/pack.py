"""Pack what was trained into a few small files, for a machine from which no large files come back, and unpack it.

    python -m facesnap_lab.miniature.second.pack pack --out DIR --files FOLDER
    python -m facesnap_lab.miniature.second.pack unpack --out DIR --files FOLDER

The files are one zip archive, cut into parts. It contains the weights that `measure` needs and that are shipped, the
figures and the sheets. It does not contain images of the world, which `data` renders again, or the states of
optimizers, so a stage that has not finished cannot be resumed from it.
"""

from __future__ import annotations

import argparse
import io
import zipfile
import zlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.files import atomic_write

NAME = "second.zip"
PART_BYTES, MOST_PARTS = 16 * 2**20, 8
MOST_BYTES = 4 * PART_BYTES * MOST_PARTS  # of the unpacked files
PATTERNS = (
    *("quality.json", "everything.json", "measure.json", "people.png", "*/sheet.png"),
    *("*/recognition.onnx", "identity/detector.onnx", "vae4/vae.safetensors", "lightning/lightning.safetensors"),
    *("deca/deca.safetensors", "clip/model/*", "host_vae/model/*"),
    *("base/pipeline/*", "base/pipeline/*/*", "facesnap/facesnap.safetensors", "facesnap/run/samples/*"),
)


def belongs(name: str) -> bool:
    """Return whether a file with this path, relative to the folder of all stages, is packed."""
    parts = PurePosixPath(name).parts
    if not parts or "\\" in name or ":" in name or any(part in ("..", "/") or part.startswith(".") for part in parts):
        return False
    return any(
        len(parts) == len(pattern := shape.split("/")) and all(map(fnmatchcase, parts, pattern)) for shape in PATTERNS
    )


def packed_files(out: Path) -> Iterator[str]:
    """Yield the paths of the existing files that are packed, relative to `out`."""
    names = {path.relative_to(out).as_posix() for shape in PATTERNS for path in out.glob(shape) if path.is_file()}
    return (name for name in sorted(names) if belongs(name))


def pack(out: Path, folder: Path) -> list[Path]:
    """Write the parts into a folder, replacing earlier ones.

    Raises:
        FaceSnapError: the files are larger than all parts together.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in packed_files(out):
            archive.write(out / name, name)
    content = buffer.getvalue()
    pieces = [content[i : i + PART_BYTES] for i in range(0, len(content), PART_BYTES)]
    if len(pieces) > MOST_PARTS:
        raise FaceSnapError(
            f"The networks in {out} take {len(content) / 2**20:.0f} MiB, but at most "
            f"{MOST_PARTS * PART_BYTES // 2**20} MiB can be packed; remove the largest ones."
        )
    written = []
    for number, piece in enumerate(pieces):
        with atomic_write(folder / f"{NAME}.{number}") as part:
            part.write_bytes(piece)
        written.append(folder / f"{NAME}.{number}")
    for old in set(folder.glob(f"{NAME}.*")) - set(written):
        old.unlink()
    return written


def unpack(folder: Path, out: Path) -> list[str]:
    """Write the packed files into a folder of all stages, and return their paths in it.

    Raises:
        FaceSnapError: a part is missing or damaged, or the archive contains anything but what `pack` writes. Nothing is
            written then.
    """
    parts = sorted(folder.glob(f"{NAME}.*"))
    names = [f"{NAME}.{number}" for number in range(len(parts))]
    advice = "copy all of its parts again"
    if not parts or [part.name for part in parts] != names or len(parts) > MOST_PARTS:
        raise FaceSnapError(f"{folder} does not contain all parts of {NAME}; {advice}.")
    try:
        with zipfile.ZipFile(io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
            if unknown := [name for name in archive.namelist() if not belongs(name)]:
                raise FaceSnapError(f"{NAME} in {folder} contains the unexpected file {unknown[0]}; {advice}.")
            if sum(entry.file_size for entry in archive.infolist()) > MOST_BYTES:
                raise FaceSnapError(f"{NAME} in {folder} contains more than {MOST_BYTES // 2**20} MiB; {advice}.")
            contents = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise FaceSnapError(f"{NAME} in {folder} is damaged ({error}); {advice}.") from error
    for name, content in contents.items():
        with atomic_write(out / name) as file:
            file.write_bytes(content)
    return list(contents)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pack or unpack the trained networks of the second edition.")
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("--out", type=Path, required=True, help="folder of all stages")
    parser.add_argument("--files", type=Path, required=True, help="folder of the parts")
    options = parser.parse_args()
    if options.action == "pack":
        print(*pack(options.out, options.files), sep="\n")
    else:
        print(*unpack(options.files, options.out), sep="\n")
