"""install.py decides what to install, and only ever adds packages to an environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

import install

SCRIPT = Path(install.__file__)
VARIANTS = [(module, name) for module, names in install.NEEDED.items() for name in names]
A1111 = {"torch": "2.1.2+cu121", "numpy": "1.26.2", "protobuf": "3.20.0", "opencv-python": "4.11.0.86"}
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}


def add_distribution(folder: Path, name: str, version: str) -> None:
    """Add an installed distribution as pip sees it, without its files."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("")


def add_torch(folder: Path, version: str, cuda: str | None) -> None:
    add_distribution(folder, "torch", version)
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").write_text("raise RuntimeError('install.py must not import torch')\n")
    # torch writes `cuda = '12.1'` up to 2.2 and `cuda: Optional[str] = '12.1'` later
    annotation = "" if version.startswith("2.1") else ": Optional[str]"
    (folder / "torch/version.py").write_text(
        f"from typing import Optional\n\n__version__ = '{version}'\ndebug = False\ncuda{annotation} = {cuda!r}\n"
    )


def run_python(python: str | Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COMMANDLINE_ARGS")}
    clean["PIP_NO_COMPILE"] = "1"  # most of what is installed is never imported
    command = [str(python), *map(str, arguments)]
    return subprocess.run(command, env=clean | environment, cwd="/", capture_output=True, encoding="utf-8", check=False)


def make_venv(folder: Path, *options: str) -> Path:
    created = run_python(sys.executable, "-m", "venv", *options, folder)
    assert created.returncode == 0, created.stderr
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def freeze(python: Path, **environment: str) -> dict[str, str]:
    listed = run_python(python, "-m", "pip", "list", "--format=freeze", **environment).stdout
    return dict(line.split("==") for line in listed.split())


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment with only pip. Tests do not change it."""
    return make_venv(tmp_path_factory.mktemp("bare"))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A copy of the script in a separate folder, where it records failures."""
    folder = tmp_path / "extension"
    folder.mkdir()
    return Path(shutil.copy(SCRIPT, folder))


def missing_without(*names: str) -> list[str]:
    """What is missing if everything except `names` is installed."""
    return install.missing({first for first, *_ in install.NEEDED.values()} - set(names))


def test_missing_lists_every_module_when_empty_and_none_when_complete():
    assert missing_without() == []
    assert install.missing({}) == ["insightface", "onnx", "onnxruntime", "cv2", "skimage", "requests", "tqdm"]


@pytest.mark.parametrize(("module", "name"), VARIANTS)
def test_any_variant_of_a_package_counts(module: str, name: str):
    first = install.NEEDED[module][0]
    assert missing_without(first) == [module]
    assert install.missing({first for first, *_ in install.NEEDED.values()} - {first} | {name}) == []


@given(
    runtime=st.sampled_from(install.NEEDED["onnxruntime"]),
    cuda=st.sampled_from([None, "11.8", "12.1", "12.8", "13.0"]),
    torch=st.sampled_from(["2.1.2+cu118", "2.3.1+cu121", "2.7.0+cu128", "2.13.0"]),
    platform=st.sampled_from(["linux-x86_64", "win-amd64", "macosx-14.0-arm64"]),
)
def test_installed_onnxruntime_gets_no_second_one(runtime: str, cuda: str | None, torch: str, platform: str):
    installed = {"torch": torch, "numpy": "1.26.2", runtime: "1.18.1"}
    assert install.onnxruntime_requirement(installed, platform, cuda) is None
    assert install.pip_commands(["onnxruntime"], installed, platform, cuda) == []


@pytest.mark.parametrize(
    ("torch", "cuda", "numpy", "platform", "name", "fits", "unfit"),
    [
        # CUDA 11.8 and cuDNN 8: releases before 1.19, which run only with numpy 1
        ("2.1.2+cu118", "11.8", "1.26.2", "linux-x86_64", "onnxruntime-gpu", "1.18.1", "1.19.2"),
        ("2.1.2+cu118", "11.8", "2.0.2", "linux-x86_64", "onnxruntime", "1.23.2", None),
        # CUDA 11.8 and cuDNN 9, CUDA 12 and cuDNN 8, CUDA 13 on protobuf 3: no release on PyPI fits
        ("2.6.0+cu118", "11.8", "1.26.2", "win-amd64", "onnxruntime", "1.23.2", None),
        ("2.1.2+cu121", "12.1", "1.26.2", "win-amd64", "onnxruntime", "1.23.2", None),
        ("2.3.1+cu121", "12.1", "1.26.2", "linux-x86_64", "onnxruntime", "1.23.2", None),
        ("2.13.0", "13.0", "1.26.2", "linux-x86_64", "onnxruntime", "1.23.2", None),
        # CUDA 12 and cuDNN 9: from 1.19.2 until 1.27, which is built for CUDA 13
        ("2.4.0+cu121", "12.1", "1.26.2", "linux-x86_64", "onnxruntime-gpu", "1.19.2", "1.18.1"),
        ("2.7.0+cu128", "12.8", "2.2.6", "win-amd64", "onnxruntime-gpu", "1.26.0", "1.27.0"),
        # no wheels of onnxruntime-gpu for this platform, or a torch build without CUDA
        ("2.7.0+cu128", "12.8", "2.2.6", "linux-aarch64", "onnxruntime", "1.23.2", None),
        ("2.7.0", None, "2.2.6", "macosx-14.0-arm64", "onnxruntime", "1.23.2", None),
        ("2.7.0+rocm6.3", None, "1.26.2", "linux-x86_64", "onnxruntime", "1.23.2", None),
    ],
)
def test_onnxruntime_matches_cuda_cudnn_and_numpy(
    torch: str, cuda: str | None, numpy: str, platform: str, name: str, fits: str, unfit: str | None
):
    installed = {"torch": torch, "numpy": numpy, "protobuf": "3.20.0"}
    requirement = Requirement(install.onnxruntime_requirement(installed, platform, cuda) or "")
    assert requirement.name == name
    assert requirement.specifier.contains(fits)
    assert unfit is None or not requirement.specifier.contains(unfit)


def test_insightface_is_installed_last_and_without_dependencies():
    first, last = install.pip_commands(install.missing(A1111), A1111, "linux-x86_64", "12.1")
    assert first == ["install", "scikit-image", "requests", "tqdm", "onnxruntime<1.27"]
    assert last == ["install", "--no-deps", "onnx>=1.14,<1.18", "insightface>=2,<3"]


def test_onnx_is_installed_with_dependencies_if_protobuf_is_new():
    for installed in ({}, {"protobuf": "6.31.1"}):
        commands = install.pip_commands(["onnx", "onnxruntime"], installed, "linux-x86_64", None)
        assert commands == [["install", "onnxruntime", "onnx>=1.14"]]
    assert install.pip_commands([], A1111, "linux-x86_64", "12.1") == []


@pytest.mark.parametrize(
    ("version", "cuda"), [("2.1.2+cu121", "12.1"), ("2.5.1+cu118", "11.8"), ("2.1.2+cpu", None), ("2.13.0+cpu", None)]
)
def test_cuda_version_is_read_without_importing_torch(tmp_path: Path, version: str, cuda: str | None):
    add_torch(tmp_path, version, cuda)
    code = f"import sys; sys.path.append({str(SCRIPT.parent)!r}); import install; print(install._torch_cuda())"
    # -S leaves out site-packages and thus a copy of torch that is really installed
    assert run_python(sys.executable, "-S", "-c", code, PYTHONPATH=str(tmp_path)).stdout.strip() == str(cuda)


def test_start_with_nothing_missing_is_fast_and_imports_nothing_large(tmp_path: Path):
    for module in [*install.NEEDED, "torch", "pip", "launch"]:
        (tmp_path / f"{module}.py").write_text(f"raise SystemExit('{module} was imported')\n")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run_python(sys.executable, "-S", "-c", "pass")
        bare = time.perf_counter()
        ran = run_python(sys.executable, "-S", SCRIPT, PYTHONPATH=str(tmp_path))
        seconds.append((time.perf_counter() - bare) - (bare - start))
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert min(seconds) < 0.3


def test_without_a_network_one_line_says_what_to_do_and_nothing_changes(bare_python: Path, script: Path):
    before = freeze(bare_python)
    ran = run_python(bare_python, script, **OFFLINE)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(ran.stdout.splitlines()) == 1
    for module in install.NEEDED:
        assert module in ran.stdout
    assert f'"{bare_python}" -m pip install --no-deps "insightface>=2,<3"' in ran.stdout
    assert freeze(bare_python) == before


def test_variant_known_only_by_its_metadata_is_not_duplicated(bare_python: Path, script: Path, tmp_path: Path):
    for name in ("onnxruntime-gpu", "opencv-contrib-python"):
        add_distribution(tmp_path, name, "1.18.1")
    ran = run_python(bare_python, script, PYTHONPATH=str(tmp_path), **OFFLINE)
    assert "insightface" in ran.stdout
    assert "onnxruntime" not in ran.stdout
    assert "opencv" not in ran.stdout


def test_skip_install_is_respected(bare_python: Path, script: Path, tmp_path: Path):
    (tmp_path / "launch.py").write_text("import types\nargs = types.SimpleNamespace(skip_install=True)\n")
    ran = run_python(bare_python, script, PYTHONPATH=str(tmp_path), PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "--skip-install" in ran.stdout
    assert len(freeze(bare_python)) <= 2  # pip, and setuptools before Python 3.12


def test_conflict_is_reported_and_installs_nothing(bare_python: Path, script: Path, tmp_path: Path):
    """scikit-image needs a different numpy from the installed one, which pip must not change."""
    installed = tmp_path / "installed"
    add_distribution(installed, "numpy", "1.26.2")
    wheel = tmp_path / "wheels/scikit_image-0.26.0-py3-none-any.whl"
    build_wheel(wheel, "scikit-image", "0.26.0", "numpy>=2")
    for name in ("insightface", "onnx", "onnxruntime", "opencv-python-headless", "requests", "tqdm"):
        add_distribution(installed, name, "1.0")
    environment = OFFLINE | {"PIP_FIND_LINKS": str(wheel.parent), "PYTHONPATH": str(installed)}
    before = freeze(bare_python, **environment)
    ran = run_python(bare_python, script, **environment)
    assert ran.returncode == 0
    assert "installed: skimage. Reason: pip cannot add them without changing packages" in ran.stdout
    assert freeze(bare_python, **environment) == before


FAULTS = {  # bytes that a package index sends before it stops responding
    "no answer": b"",
    "half a status": b"HTTP/1.1 200",
    "no page": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 1000\r\n\r\n",
    "half a page": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 1000\r\n\r\n<html>",
}


@contextmanager
def silent_index(first: bytes) -> Iterator[tuple[str, list[int]]]:
    """The address of a package index that hangs, and a list that grows with each connection to it."""
    connections: list[int] = []
    with socket.socket() as server, ExitStack() as stack:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection = stack.enter_context(server.accept()[0])
                    connections.append(1)
                    connection.sendall(first)

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/simple", connections
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("hangs", [True, False])
def test_an_index_whose_name_is_looked_up_for_ever_hangs(monkeypatch: pytest.MonkeyPatch, hangs: bool):
    """Neither pip nor Python limits the time of the look-up."""

    def look_up(*arguments: object, **values: object) -> None:
        if hangs:
            released.wait(20)
        raise socket.gaierror("not found")

    released = threading.Event()
    monkeypatch.setattr(install, "PATIENCE", 0.3)
    monkeypatch.setattr(install, "_settings", lambda pip: {"index-url": "http://index.invalid/simple"})
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setenv("NO_PROXY", "*")
    start = time.monotonic()
    assert install.index_hangs(["pip"]) is hangs
    assert time.monotonic() - start < 5
    released.set()


@dataclass
class Start:
    """What a start printed, how long it took, and how many connections the index had then seen."""

    said: str
    seconds: float
    connections: int = 0


def starts_with_fault(python: Path, script: Path, fault: str) -> list[Start]:
    """A start without a network, two with an index that hangs, and for "no answer" another one a day later."""
    failure = script.parent / ".install-failure.json"

    def start(**environment: str) -> Start:
        began = time.monotonic()
        ran = run_python(python, script, **{"NO_PROXY": "127.0.0.1", "PIP_CONFIG_FILE": os.devnull} | environment)
        assert (ran.returncode, ran.stderr) == (0, "")
        return Start(ran.stdout, time.monotonic() - began)

    starts = [start(**OFFLINE)]
    failure.unlink()
    with silent_index(FAULTS[fault]) as (url, connections):
        for again in range(3 if fault == "no answer" else 2):
            if again == 2:
                remembered = json.loads(failure.read_text())
                remembered["time"] -= install.QUIET
                failure.write_text(json.dumps(remembered))
            starts.append(replace(start(PIP_INDEX_URL=url), connections=len(connections)))
    return starts


@pytest.fixture(scope="module")
def starts_by_fault(bare_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """The starts with each fault, which wait for the index at the same time."""
    with ThreadPoolExecutor() as threads:
        yield {
            fault: threads.submit(
                starts_with_fault, bare_python, Path(shutil.copy(SCRIPT, tmp_path_factory.mktemp("extension"))), fault
            )
            for fault in FAULTS
        }


@pytest.mark.parametrize("fault", FAULTS)
def test_hanging_index_delays_one_start_a_day_by_five_seconds(starts_by_fault: dict[str, Future], fault: str):
    usual, first, second, *day_later = starts_by_fault[fault].result()
    assert re.search("the package index did not answer within 5 seconds|pip cannot reach the package index", first.said)
    assert len(first.said.splitlines()) == 1
    assert "-m pip install" in first.said
    assert first.seconds < 6 + 2 * usual.seconds
    assert first.connections > 0
    assert second.said == first.said, "it is reported again, but not tried"
    assert second.connections == first.connections
    assert all(start.connections > second.connections for start in day_later), "a day later it tries again"
    assert len(day_later) == (fault == "no answer")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '"x"', "[" * 5000, '{"attempt": 1}', '{"attempt": "a", "time": "now"}', "\x00", "1e999"]
    + [f'{{"attempt": "a", "reason": "x", "time": {when}}}' for when in ("null", "1e300", "NaN", "-1", "[]", "0")],
)
def test_damaged_memory_of_a_failure_means_a_new_attempt(content: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(install, "FAILURE", tmp_path / "failure.json")
    install.FAILURE.write_text(content)
    assert not install.recent_failure("a")
    install._remember_failure("a", "pip is missing")
    assert install.recent_failure("a") == "pip is missing"
    assert not install.recent_failure("b"), "other packages are installed now"


def test_the_memory_of_a_failure_is_ignored_by_git():
    assert f"/{install.FAILURE.name}" in (SCRIPT.parent / ".gitignore").read_text().splitlines()


@pytest.fixture(scope="module")
def python_without_pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment like those that uv creates."""
    return make_venv(tmp_path_factory.mktemp("no-pip"), "--without-pip")


FAKE_UV = """#!/bin/sh
echo "$@" >> "$UV_LOG"
echo "$UV_ERROR" >&2
[ -z "$UV_ERROR" ]
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the fake uv is a shell script")
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("", "FaceSnap installed the packages that it needs"),
        ("  x No solution found when resolving dependencies:", "without changing packages that are already installed"),
        ("error: Failed to fetch: `https://pypi.org/simple/tqdm/`", "cannot reach the package index"),
        ("error: The environment is externally managed", "The environment is externally managed"),
    ],
)
def test_uv_installs_where_there_is_no_pip(
    python_without_pip: Path, script: Path, tmp_path: Path, error: str, expected: str
):
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(FAKE_UV)
    uv.chmod(0o755)
    installed = tmp_path / "installed"
    add_distribution(installed, "numpy", "1.26.2")
    environment = {"UV_LOG": str(tmp_path / "log"), "UV_ERROR": error, "UV_OFFLINE": "1", "PYTHONPATH": str(installed)}
    environment["PATH"] = f"{uv.parent}:{os.environ['PATH']}"
    ran = run_python(python_without_pip, script, **environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert expected in ran.stdout
    assert len(ran.stdout.splitlines()) == 1
    calls = (tmp_path / "log").read_text().splitlines()
    assert len(calls) == (1 if error else 2)
    assert calls[0].startswith("pip install opencv-python-headless scikit-image requests tqdm onnxruntime")
    for call in calls:
        assert f"--python {python_without_pip}" in call
        assert "--only-binary :all:" in call
        assert "--constraint " in call
    if error:
        assert f'Run: "{uv}" pip install opencv-python-headless' in ran.stdout
        assert f'"insightface>=2,<3" --python "{python_without_pip}"' in ran.stdout


def test_without_pip_and_uv_the_commands_begin_with_pip_itself(python_without_pip: Path, script: Path):
    ran = run_python(python_without_pip, script, PATH="")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "this Python has neither pip nor uv" in ran.stdout
    assert f'Run: "{python_without_pip}" -m ensurepip && "{python_without_pip}" -m pip install' in ran.stdout


@pytest.mark.parametrize("python", [(3, 10), (3, 11), (3, 12), (3, 13), (3, 14)])
def test_requirements_have_wheels_for_each_python(python: tuple[int, int]):
    """onnx 1.17 and the releases of onnxruntime-gpu for cuDNN 8 end at Python 3.12."""
    old = {"torch": "2.1.2+cu118", "numpy": "1.26.2", "protobuf": "3.20.0"}
    commands = install.pip_commands(["onnx", "onnxruntime"], old, "linux-x86_64", "11.8", python)
    words = [word for command in commands for word in command]
    assert ("onnx>=1.14,<1.18" in words) == (python < (3, 13))
    assert ("onnxruntime-gpu>=1.15,<1.19" in words) == (python < (3, 13))
    assert ("onnxruntime<1.27" in words) == (python >= (3, 13))


DAMAGE = {  # changes to the installed files of a package, and whether FaceSnap reports them
    "none": (lambda folder: None, False),
    "no native library": (lambda folder: (folder / "core.so").unlink(), True),
    "a truncated native library": (lambda folder: (folder / "core.so").write_bytes(b"12345"), True),
    "an empty native library": (lambda folder: (folder / "core.so").write_bytes(b""), True),
    "no versioned library": (lambda folder: (folder / "libx.so.1").unlink(), True),
    "no __init__.py": (lambda folder: (folder / "__init__.py").unlink(), True),
    "nothing left": (lambda folder: shutil.rmtree(folder), True),
    "a missing test": (lambda folder: (folder / "test_x.py").unlink(), False),
    "an edited file": (lambda folder: (folder / "__init__.py").write_text("x = 1"), False),
}


@pytest.mark.parametrize("module", install.NEEDED)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_package_is_reported_and_left_alone(tmp_path: Path, script: Path, module: str, damage: str):
    site = tmp_path / "site"
    for name, distributions in install.NEEDED.items():
        add_distribution(site, distributions[0], "1.2.3")
        (site / name).mkdir()
        record = []
        for file, content in (("__init__.py", ""), ("core.so", "1234567890"), ("libx.so.1", "x"), ("test_x.py", "")):
            (site / name / file).write_text(content)
            record.append(f"{name}/{file},,{len(content)}")
        info = site / f"{distributions[0].replace('-', '_')}-1.2.3.dist-info"
        (info / "RECORD").write_text("\n".join(record))
    change, reported = DAMAGE[damage]
    change(site / module)
    ran = run_python(sys.executable, "-S", script, PYTHONPATH=str(site))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert bool(ran.stdout) == reported
    if reported:
        assert f"{install.NEEDED[module][0]}==1.2.3 is damaged: its file {module}/" in ran.stdout
        assert f"install --force-reinstall --no-deps {install.NEEDED[module][0]}==1.2.3" in ran.stdout
        assert len(ran.stdout.splitlines()) == 1


def build_wheel(path: Path, name: str, version: str, requires: str) -> None:
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: {requires}\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="numpy 1.26 and onnx 1.17 have no wheels for this Python")
def test_host_with_old_pins_gains_packages_and_keeps_every_version(bare_python: Path, tmp_path: Path, script: Path):
    """A1111 1.10.1's pins that newer packages would change, a local version of torch, and a real pip."""
    shutil.copytree(bare_python.parents[1], tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / bare_python.relative_to(bare_python.parents[1])
    pins = ["numpy==1.26.2", "protobuf==3.20.0", "requests==2.31.0", "typing_extensions==4.8.0"]
    pinned = run_python(python, "-m", "pip", "install", "--quiet", "--retries", "1", *pins)
    if pinned.returncode != 0:
        pytest.skip(f"PyPI is not reachable: {pinned.stderr.strip().splitlines()[-1]}")
    add_torch(
        Path(run_python(python, "-c", "import site; print(site.getsitepackages()[-1])").stdout.strip()),
        "2.1.2+cu121",
        "12.1",
    )
    before = freeze(python)
    assert before["torch"] == "2.1.2+cu121"

    ran = run_python(python, script)
    after = freeze(python)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert before.items() <= after.items()
    assert {"insightface", "onnx", "onnxruntime", "opencv-python-headless", "scikit-image", "tqdm"} <= set(after)
    assert {"opencv-python", "onnxruntime-gpu"}.isdisjoint(after)
    assert run_python(python, script).stdout == ""

    embed = textwrap.dedent(
        """
        import sys, numpy, onnx, onnx.helper as h
        from insightface.app import FaceAnalysis
        from insightface.model_zoo import get_model
        crop = h.make_tensor_value_info("crop", 1, [1, 3, 112, 112])
        feature = h.make_tensor_value_info("feature", 1, [1, 3 * 112 * 112])
        graph = h.make_graph([h.make_node("Flatten", ["crop"], ["feature"])], "g", [crop], [feature])
        model = h.make_model(graph, opset_imports=[h.make_opsetid("", 11)])
        model.ir_version = 6
        onnx.save(model, sys.argv[1])
        recognition = get_model(sys.argv[1], providers=["CPUExecutionProvider"])
        photo = numpy.full((112, 112, 3), 255, numpy.uint8)
        print(type(recognition).__name__, recognition.get_feat(photo).mean())
        """
    )
    ran = run_python(python, "-c", embed, tmp_path / "recognition.onnx")
    assert ran.stdout.split() == ["ArcFaceONNX", "1.0"], ran.stderr
