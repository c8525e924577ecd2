"""The WebUI's installer hook: add the packages that face detection needs, without changing any that are installed.

The WebUI runs this file in a separate process on every start. It downloads no models, and never prevents the WebUI from
starting. If something cannot be installed, it prints one line with the reason and the command to run, and tries again a
day later or when the installed packages have changed. pip does the work, or uv in an environment without pip.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from contextlib import suppress
from importlib.metadata import Distribution, distributions
from pathlib import Path

# Required module -> distributions that provide it. If none of them is present, the first one is installed.
NEEDED = {
    "insightface": ("insightface",),
    "onnx": ("onnx", "onnx-weekly"),
    "onnxruntime": (
        "onnxruntime",
        "onnxruntime-gpu",
        "onnxruntime-directml",
        "onnxruntime-windowsml",
        "onnxruntime-openvino",
        "onnxruntime-silicon",
        "onnxruntime-rocm",
        "onnxruntime-migraphx",
        "onnxruntime-qnn",
        "onnxruntime-cann",
        "onnxruntime-training",
        "ort-nightly",
        "ort-nightly-gpu",
        "ort-nightly-directml",
    ),
    "cv2": (
        "opencv-python-headless",
        "opencv-python",
        "opencv-contrib-python",
        "opencv-contrib-python-headless",
    ),
    "skimage": ("scikit-image",),
    "requests": ("requests",),
    "tqdm": ("tqdm",),
}

# Major versions of CUDA and cuDNN -> the releases of onnxruntime-gpu on PyPI that are built for them. There is none for
# CUDA 12 with cuDNN 8, as in torch 2.1 to 2.3 +cu121. FaceSnap runs its face networks on the CPU, but another extension
# may need the GPU, and a CPU-only runtime would prevent that.
GPU_RELEASES = {
    (11, 8): "onnxruntime-gpu>=1.15,<1.19",
    (12, 9): "onnxruntime-gpu>=1.19.2,<1.27",
}
GPU_PLATFORMS = ("linux-x86_64", "win-amd64")


FAILURE = Path(__file__).with_name(".install-failure.json")  # records the last failed attempt and its time
QUIET = 24 * 60 * 60  # seconds to wait after a failed attempt before trying again
RUN = "Run in a Command Prompt (cmd):" if sys.platform == "win32" else "Run:"  # PowerShell needs another syntax
PATIENCE = 5  # seconds to wait for the package index
NATIVE = (".so", ".pyd", ".dll", ".dylib")
PYTHON = sys.version_info[:2]


def missing(installed: Collection[str]) -> list[str]:
    """Return the required modules that no distribution in `installed` (lower-case names) provides."""
    return [module for module, names in NEEDED.items() if not any(name in installed for name in names)]


def onnxruntime_requirement(
    installed: Mapping[str, str], platform: str, cuda: str | None, python: tuple[int, int] = PYTHON
) -> str | None:
    """Return the ONNX Runtime to install, or None if one is installed: two of them together silently run on the CPU.

    Args:
        installed: lower-case distribution names and their versions.
        platform: `sysconfig.get_platform()`.
        cuda: the CUDA version that torch was built for, such as "12.1", or None.
        python: major and minor version.
    """
    if any(name in installed for name in NEEDED["onnxruntime"]):
        return None
    if cuda and platform in GPU_PLATFORMS:
        cudnn = 8 if _older(installed, "torch", 2, 4) else 9
        release = GPU_RELEASES.get((int(cuda.split(".")[0]), cudnn))
        # releases for cuDNN 8 are built for numpy 1, and for Python up to 3.12
        if release and (cudnn == 9 or (_older(installed, "numpy", 2) and python < (3, 13))):
            return release
    return "onnxruntime<1.27" if _older(installed, "protobuf", 4, 25, 8) else "onnxruntime"


def pip_commands(
    modules: Collection[str],
    installed: Mapping[str, str],
    platform: str,
    cuda: str | None,
    python: tuple[int, int] = PYTHON,
) -> list[list[str]]:
    """Return the arguments of the pip calls, in order, that install `modules`.

    Args:
        installed, platform, cuda, python: see `onnxruntime_requirement`.
    """
    complete = [NEEDED[module][0] for module in modules if module not in ("insightface", "onnx", "onnxruntime")]
    bare = []
    if "onnxruntime" in modules and (runtime := onnxruntime_requirement(installed, platform, cuda, python)):
        complete.append(runtime)
    if "onnx" in modules:
        # Up to 1.17, onnx requires protobuf 3.20.2 but also runs with the 3.20.0 that WebUIs pin. Later releases really
        # need 4.25, and are the only ones for Python 3.13.
        if _older(installed, "protobuf", 4, 25, 8) and python < (3, 13):
            bare.append("onnx>=1.14,<1.18")
        else:
            complete.append("onnx>=1.14")
    if "insightface" in modules:
        # Its metadata requires opencv-python and onnxruntime by name, even if another variant of them is installed.
        bare.append("insightface>=2,<3")
    return [["install", *arguments] for arguments in (complete, bare and ["--no-deps", *bare]) if arguments]


def _older(installed: Mapping[str, str], name: str, *release: int) -> bool:
    """Whether the distribution is installed and older than `release`."""
    version = re.match(r"\d+(\.\d+)*", installed.get(name, ""))
    return version is not None and tuple(int(part) for part in version[0].split(".")) < release


def _importable(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # no origin: a folder left behind by an uninstall


def _torch_cuda() -> str | None:
    """Return the CUDA version that torch was built for. Read it from a file, because importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version_file = Path(spec.origin).with_name("version.py")
    if not version_file.is_file():
        return None
    match = re.search(r"^cuda\b.*=\s*'([\d.]+)'", version_file.read_text("utf-8"), re.M)
    return match[1] if match else None


def _skip_install() -> bool:
    """Whether the WebUI was started with --skip-install. False outside a WebUI."""
    try:
        from launch import args
    except (Exception, SystemExit):
        return False
    return bool(getattr(args, "skip_install", False))


def installer() -> list[str]:
    """Return the pip command of this environment, or uv's equivalent; empty if neither is installed."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if uv := os.environ.get("UV") or shutil.which("uv"):
        return [uv, "pip"]
    return [sys.executable, "-m", "uv", "pip"] if importlib.util.find_spec("uv") else []


def _install(pip: list[str], commands: list[list[str]], pins: str) -> str:
    """Run pip with the installed versions as constraints, so that it only adds packages.

    Returns:
        The reason for a failure, or "" if pip succeeded.
    """
    if index_hangs(pip):
        return f"the package index did not answer within {PATIENCE} seconds"
    options = ["--only-binary", ":all:"]
    if pip[1] == "pip":
        options += ["--python", sys.executable]
    else:
        options += ["--prefer-binary", "--disable-pip-version-check", "--timeout", str(PATIENCE), "--retries", "0"]
    if index := os.environ.get("INDEX_URL"):  # the WebUI's setting for a mirror
        options += ["--index-url", index]
    environment = {**os.environ, "UV_HTTP_TIMEOUT": str(PATIENCE), "UV_HTTP_RETRIES": "0"}
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text(pins, "utf-8")
        for command in commands:
            result = subprocess.run(
                [*pip, *command, *options, "--constraint", str(constraints)],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                check=False,
                env=environment,
            )
            if result.returncode != 0:
                return _reason(result.stderr)
    return ""


def index_hangs(pip: list[str]) -> bool:
    """Whether the package index leaves a request unanswered. Refusals and other errors are left for pip to report."""
    settings = _settings(pip)
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        return False
    url = os.environ.get("INDEX_URL") or settings.get("index-url") or "https://pypi.org/simple"
    proxies = {"http": settings["proxy"], "https": settings["proxy"]} if settings.get("proxy") else None
    answered = threading.Event()

    def ask() -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
        try:
            with opener.open(f"{url.rstrip('/')}/tqdm/", timeout=PATIENCE):
                answered.set()
        except urllib.error.URLError as error:
            if not isinstance(error.reason, TimeoutError):
                answered.set()
        except TimeoutError:
            pass
        except Exception:
            answered.set()

    # in a thread, because the look-up of a name has no timeout
    threading.Thread(target=ask, daemon=True).start()
    return not answered.wait(PATIENCE)


def _settings(pip: list[str]) -> dict[str, str]:
    """Return pip's or uv's settings for the package index, from the environment and pip's configuration files."""
    if pip[1] == "pip":
        index = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL") or ""
        return {"index-url": index, "no-index": os.environ.get("UV_NO_INDEX") or os.environ.get("UV_OFFLINE") or ""}
    with suppress(subprocess.TimeoutExpired):
        listed = subprocess.run(
            [*pip, "--disable-pip-version-check", "config", "list"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=PATIENCE,
        ).stdout
        return dict(re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", listed, re.M))
    return {}


def _reason(stderr: str) -> str:
    """Return a clause that says why pip failed."""
    if "conflicting dependencies" in stderr or "No solution found" in stderr:
        return "pip cannot add them without changing packages that are already installed"
    if re.search(r"connection broken|from versions: none|timed out|Failed to fetch|error sending request", stderr):
        return "pip cannot reach the package index"
    lines = stderr.strip().splitlines() or ["unknown error"]
    errors = [line for line in lines if line.lower().startswith("error: ")]
    return f"pip says: {(errors or lines)[-1]!r}"


def _shell(pip: list[str], commands: list[list[str]]) -> str:
    """Return the commands as the user would type them."""
    lines = [[*pip, *command] for command in commands]
    if not pip:
        lines = [[sys.executable, "-m", "ensurepip"], *([sys.executable, "-m", "pip", *line] for line in lines)]
    elif pip[1] == "pip":  # uv's
        lines = [[*line, "--python", sys.executable] for line in lines]
    return " && ".join(" ".join(map(_quoted, line)) for line in lines)


def _quoted(word: str) -> str:
    return f'"{word}"' if re.search(r"[<>\s\\/]", word) else word


def _installed() -> tuple[dict[str, str], str]:
    """Return the installed distributions by lower-case name with their versions, and the same as constraints."""
    versions: dict[str, str] = {}
    pins = []
    for distribution in distributions():  # if two are on the path, the first one counts
        metadata = distribution.metadata
        name, version = str(metadata["Name"] or ""), str(metadata["Version"] or "")
        normal = re.sub(r"[-_.]+", "-", name).lower()
        if re.fullmatch(r"[\w.-]+", name) and re.fullmatch(r"[\w.+!-]+", version) and normal not in versions:
            versions[normal] = version
            pins.append(f"{name}=={version}\n")
    return versions, "".join(sorted(pins))


def damaged(module: str) -> tuple[Distribution, str] | None:
    """Return the installed distribution that provides a module, and one of its files that is missing or truncated.

    None if all its known and relevant files are complete.
    """
    for name in NEEDED[module]:
        with suppress(Exception):  # the distribution does not exist, or its metadata is damaged too
            distribution = Distribution.from_name(name)
            for file in distribution.files or ():
                native = file.name.endswith(NATIVE) or ".so." in file.name
                if not native and file.name != "__init__.py":
                    continue
                path = Path(str(file.locate()))
                if not path.is_file() or (native and path.stat().st_size < (file.size or 0)):
                    return distribution, str(file)
    return None


def _report(absent: Collection[str], reason: str) -> str:
    return f"FaceSnap cannot detect faces until these packages are installed: {', '.join(absent)}. Reason: {reason}."


def recent_failure(attempt: str) -> str:
    """Return the reason why the same attempt failed less than a day ago; empty if it did not."""
    try:
        failure = json.loads(FAILURE.read_text("utf-8"))
        recent = failure["attempt"] == attempt and 0 <= time.time() - failure["time"] < QUIET
        return str(failure["reason"]) if recent else ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # the file does not exist or is damaged
        return ""


def _remember_failure(attempt: str, reason: str) -> None:
    with suppress(OSError):  # the folder is read-only
        FAILURE.write_text(json.dumps({"attempt": attempt, "time": time.time(), "reason": reason}), "utf-8")


def _report_damage(pip: list[str]) -> bool:
    """Print which installed package is damaged, and return whether there is one."""
    for module in NEEDED:
        if found := damaged(module):
            distribution, file = found
            name = f"{distribution.metadata['Name']}=={distribution.version}"
            command = _shell(pip, [["install", "--force-reinstall", "--no-deps", name]])
            print(
                f"FaceSnap cannot detect faces because {name} is damaged: its file {file} is missing or incomplete. "
                f"{RUN} {command}"
            )
            return True
    return False


def main() -> None:
    """Install what is missing, or print why that is not possible."""
    pip = installer()
    if _report_damage(pip):
        return
    absent = [module for module in NEEDED if not _importable(module)]
    if not absent:
        return
    installed, pins = _installed()
    absent = [module for module in absent if module in missing(installed)]
    commands = pip_commands(absent, installed, sysconfig.get_platform(), _torch_cuda())
    if not commands:
        return
    attempt = hashlib.sha256(repr((pip, commands, pins)).encode()).hexdigest()
    if _skip_install():
        failure = "the WebUI was started with --skip-install"
    elif not pip:
        failure = "this Python has neither pip nor uv"
    elif failure := recent_failure(attempt):
        pass  # it is reported at every start, but tried only once a day
    elif failure := _install(pip, commands, pins):
        _remember_failure(attempt, failure)
    if failure:
        print(f"{_report(absent, failure)} {RUN} {_shell(pip, commands)}")
    else:
        FAILURE.unlink(missing_ok=True)
        print(f"FaceSnap installed the packages that it needs to detect faces: {', '.join(absent)}.")


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # paths may contain characters that the console cannot show
    main()
