"""The WebUI's installer hook: add the packages that face detection needs, without changing any that are installed.

The WebUI runs this file in a separate process on every start. It downloads no models, and never makes the start fail.
If something cannot be installed, it prints one line with the reason and the command to run.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

# Required module -> distributions that provide it. If none of them is installed, the first one is.
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
# may need the GPU, which a CPU-only runtime would rule out.
GPU_RELEASES = {
    (11, 8): "onnxruntime-gpu>=1.15,<1.19",
    (12, 9): "onnxruntime-gpu>=1.19.2,<1.27",
}
GPU_PLATFORMS = ("linux-x86_64", "win-amd64")


def missing(installed: Collection[str]) -> list[str]:
    """Return the required modules that no distribution in `installed` (lower-case names) provides."""
    return [module for module, names in NEEDED.items() if not any(name in installed for name in names)]


def onnxruntime_requirement(installed: Mapping[str, str], platform: str, cuda: str | None) -> str | None:
    """Return the ONNX Runtime to install, or None if one is installed: two of them together silently run on the CPU.

    Args:
        installed: lower-case distribution names and their versions.
        platform: `sysconfig.get_platform()`.
        cuda: the CUDA version that torch was built for, such as "12.1", or None.
    """
    if any(name in installed for name in NEEDED["onnxruntime"]):
        return None
    if cuda and platform in GPU_PLATFORMS:
        cudnn = 8 if _older(installed, "torch", 2, 4) else 9
        release = GPU_RELEASES.get((int(cuda.split(".")[0]), cudnn))
        if release and (cudnn == 9 or _older(installed, "numpy", 2)):  # releases for cuDNN 8 are built for numpy 1
            return release
    return "onnxruntime<1.27" if _older(installed, "protobuf", 4, 25, 8) else "onnxruntime"


def pip_commands(
    modules: Collection[str], installed: Mapping[str, str], platform: str, cuda: str | None
) -> list[list[str]]:
    """Return the arguments of the pip calls, in order, that install `modules`.

    Args:
        installed, platform, cuda: see `onnxruntime_requirement`.
    """
    complete = [NEEDED[module][0] for module in modules if module not in ("insightface", "onnx", "onnxruntime")]
    bare = []
    if "onnxruntime" in modules and (runtime := onnxruntime_requirement(installed, platform, cuda)):
        complete.append(runtime)
    if "onnx" in modules:
        # Up to 1.17, onnx requires protobuf 3.20.2 but also runs with the 3.20.0 that WebUIs pin. Later releases really
        # need 4.25.
        if _older(installed, "protobuf", 4, 25, 8):
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
    return spec is not None and spec.origin is not None  # None for a folder left behind by an uninstall


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


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)


def _install(commands: list[list[str]], pins: str) -> str:
    """Run pip with the installed versions as constraints, so that it only adds packages.

    Returns:
        The reason for a failure, or "" if pip succeeded.
    """
    options = ["--only-binary", ":all:", "--prefer-binary", "--retries", "2"]
    if index := os.environ.get("INDEX_URL"):  # the WebUI's setting for a mirror
        options += ["--index-url", index]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text(pins, "utf-8")
        for command in commands:
            result = _pip(*command, *options, "--constraint", str(constraints))
            if result.returncode != 0:
                return _reason(result.stderr)
    return ""


def _reason(stderr: str) -> str:
    """Return a clause that says why pip failed."""
    if "conflicting dependencies" in stderr:
        return "pip cannot add them without changing packages that are already installed"
    if "connection broken" in stderr:
        return "pip cannot reach the package index"
    lines = stderr.strip().splitlines() or ["unknown error"]
    errors = [line for line in lines if line.lower().startswith("error: ")]
    return f"pip says: {(errors or lines)[-1]!r}"


def _shell(command: list[str]) -> str:
    """Return the pip command as the user would type it."""
    words = [f'"{word}"' if "<" in word or ">" in word else word for word in command]
    return " ".join([f'"{sys.executable}"', "-m", "pip", *words])


def _report(absent: Collection[str], reason: str) -> str:
    return f"FaceSnap cannot detect faces until these packages are installed: {', '.join(absent)}. Reason: {reason}."


def main() -> None:
    """Install the missing packages, or print why that is not possible."""
    absent = [module for module in NEEDED if not _importable(module)]
    if not absent:
        return
    # pip's resolver sees exactly what pip lists, including editable installs, local versions and direct URLs.
    listed = _pip("list", "--format=freeze")
    if listed.returncode != 0:
        print(_report(absent, _reason(listed.stderr)))
        return
    pins = re.findall(r"^([\w.-]+)={2,3}(\S+)$", listed.stdout, re.M)
    installed = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins}
    absent = [module for module in absent if module in missing(installed)]
    commands = pip_commands(absent, installed, sysconfig.get_platform(), _torch_cuda())
    if not commands:
        return
    failure = "the WebUI was started with --skip-install" if _skip_install() else _install(commands, listed.stdout)
    if failure:
        by_hand = " && ".join(map(_shell, commands))
        print(f"{_report(absent, failure)} Run: {by_hand}")
    else:
        print(f"FaceSnap installed the packages that it needs to detect faces: {', '.join(absent)}.")


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # paths may contain characters that the console cannot show
    main()
