"""The WebUI's installer hook: adds the packages that reading a face needs, and moves none that is already there.

The WebUI runs this file in a process of its own at every start. It downloads no models and never fails the start: when
something cannot be installed, it prints one line that says what and which command to run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

# Module that must import -> distributions that bring it. The first one is installed when none of them is there.
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

# (CUDA, cuDNN) majors -> the releases of onnxruntime-gpu on PyPI that are built for them. CUDA 12 with cuDNN 8, as in
# torch 2.1 to 2.3 +cu121, has none. FaceSnap looks at photos on the CPU, but another extension may want the GPU, and
# could not have it beside a runtime without.
GPU_RELEASES = {
    (11, 8): "onnxruntime-gpu>=1.15,<1.19",
    (12, 9): "onnxruntime-gpu>=1.19.2,<1.27",
}
GPU_PLATFORMS = ("linux-x86_64", "win-amd64")


def missing(installed: Collection[str]) -> list[str]:
    """Needed modules for which none of the distributions that bring them is in `installed` (lower-case names)."""
    return [module for module, names in NEEDED.items() if not any(name in installed for name in names)]


def onnxruntime_requirement(installed: Mapping[str, str], platform: str, cuda: str | None) -> str | None:
    """Which ONNX Runtime to install, or None when one is there: two of them side by side run on the CPU unannounced.

    `installed` maps lower-case distribution names to versions, `platform` is `sysconfig.get_platform()`, and `cuda` is
    the CUDA version torch was built for, as in "12.1", or None.
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
    """The arguments of the pip calls, in order, that bring `modules`; the rest as in `onnxruntime_requirement`."""
    complete = [NEEDED[module][0] for module in modules if module not in ("insightface", "onnx", "onnxruntime")]
    bare = []
    if "onnxruntime" in modules and (runtime := onnxruntime_requirement(installed, platform, cuda)):
        complete.append(runtime)
    if "onnx" in modules:
        # Up to 1.17 onnx asks for protobuf 3.20.2 but runs with the 3.20.0 that WebUIs pin; later it does need 4.25.
        if _older(installed, "protobuf", 4, 25, 8):
            bare.append("onnx>=1.14,<1.18")
        else:
            complete.append("onnx>=1.14")
    if "insightface" in modules:
        # Its metadata asks for opencv-python and onnxruntime by name, whatever flavour of them is installed.
        bare.append("insightface>=2,<3")
    return [["install", *arguments] for arguments in (complete, bare and ["--no-deps", *bare]) if arguments]


def _older(installed: Mapping[str, str], name: str, *release: int) -> bool:
    """Whether the distribution is installed in a version before `release`."""
    version = re.match(r"\d+(\.\d+)*", installed.get(name, ""))
    return version is not None and tuple(int(part) for part in version[0].split(".")) < release


def _importable(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a folder that an uninstall left behind has no origin


def _torch_cuda() -> str | None:
    """The CUDA version torch was built for, read from its version file: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version_file = Path(spec.origin).with_name("version.py")
    found = version_file.is_file() and re.search(r"^cuda\b.*=\s*'([\d.]+)'", version_file.read_text("utf-8"), re.M)
    return found[1] if found else None


def _skip_install() -> bool:
    """Whether the WebUI was started with --skip-install. Without a WebUI there is nothing to honour."""
    try:
        from launch import args
    except (Exception, SystemExit):
        return False
    return bool(getattr(args, "skip_install", False))


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)


def _install(commands: list[list[str]], pins: str) -> str:
    """Run pip with the installed versions as constraints, so that it can only add. Why it failed, or ""."""
    options = ["--only-binary", ":all:", "--prefer-binary", "--retries", "2"]
    if index := os.environ.get("INDEX_URL"):  # the WebUI's own setting for a mirror
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
    if "conflicting dependencies" in stderr:
        return "pip cannot add them without changing packages that are already installed"
    if "connection broken" in stderr:
        return "pip cannot reach the package index"
    lines = stderr.strip().splitlines() or ["it failed"]
    errors = [line for line in lines if line.lower().startswith("error: ")]
    return f"pip says: {(errors or lines)[-1]!r}"


def _shell(command: list[str]) -> str:
    words = [f'"{word}"' if "<" in word or ">" in word else word for word in command]
    return " ".join([f'"{sys.executable}"', "-m", "pip", *words])


def main() -> None:
    absent = [module for module in NEEDED if not _importable(module)]
    if not absent:
        return
    # pip's own list is what its resolver sees: editable installs, local versions and direct URLs alike.
    listed = _pip("list", "--format=freeze")
    if listed.returncode != 0:
        print(f"FaceSnap cannot read faces yet: it needs {', '.join(absent)}, and {_reason(listed.stderr)}.")
        return
    found = re.findall(r"^([\w.-]+)={2,3}(\S+)$", listed.stdout, re.M)
    installed = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}
    absent = [module for module in absent if module in missing(installed)]
    commands = pip_commands(absent, installed, sysconfig.get_platform(), _torch_cuda())
    if not commands:
        return
    failure = "the WebUI was started with --skip-install" if _skip_install() else _install(commands, listed.stdout)
    if failure:
        by_hand = " && ".join(map(_shell, commands))
        print(f"FaceSnap cannot read faces yet: it needs {', '.join(absent)}, and {failure}. By hand: {by_hand}")
    else:
        print(f"FaceSnap installed what was missing to read faces: {', '.join(absent)}.")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # paths may hold what the console cannot show
    main()
