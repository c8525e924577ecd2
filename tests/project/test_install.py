"""install.py decides what to install, and only ever adds packages to an environment."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
import zipfile
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
    command = [str(python), *map(str, arguments)]
    return subprocess.run(command, env=clean | environment, cwd="/", capture_output=True, encoding="utf-8", check=False)


def make_venv(folder: Path) -> Path:
    created = run_python(sys.executable, "-m", "venv", folder)
    assert created.returncode == 0, created.stderr
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def freeze(python: Path, **environment: str) -> dict[str, str]:
    listed = run_python(python, "-m", "pip", "list", "--format=freeze", **environment).stdout
    return dict(line.split("==") for line in listed.split())


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment with only pip. Tests do not change it."""
    return make_venv(tmp_path_factory.mktemp("bare"))


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
        # no wheels of onnxruntime-gpu for this platform, or a torch without CUDA
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
    # -S leaves out site-packages and thus a torch that is really installed
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


def test_without_a_network_one_line_says_what_to_do_and_nothing_changes(bare_python: Path):
    before = freeze(bare_python)
    ran = run_python(bare_python, SCRIPT, **OFFLINE)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(ran.stdout.splitlines()) == 1
    for module in install.NEEDED:
        assert module in ran.stdout
    assert f'"{bare_python}" -m pip install --no-deps "insightface>=2,<3"' in ran.stdout
    assert freeze(bare_python) == before


def test_variant_known_only_by_its_metadata_is_not_duplicated(bare_python: Path, tmp_path: Path):
    for name in ("onnxruntime-gpu", "opencv-contrib-python"):
        add_distribution(tmp_path, name, "1.18.1")
    ran = run_python(bare_python, SCRIPT, PYTHONPATH=str(tmp_path), **OFFLINE)
    assert "insightface" in ran.stdout
    assert "onnxruntime" not in ran.stdout
    assert "opencv" not in ran.stdout


def test_skip_install_is_respected(bare_python: Path, tmp_path: Path):
    (tmp_path / "launch.py").write_text("import types\nargs = types.SimpleNamespace(skip_install=True)\n")
    ran = run_python(bare_python, SCRIPT, PYTHONPATH=str(tmp_path), PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "--skip-install" in ran.stdout
    assert len(freeze(bare_python)) <= 2  # pip, and setuptools before Python 3.12


def test_conflict_is_reported_and_installs_nothing(bare_python: Path, tmp_path: Path):
    """scikit-image needs a numpy other than the installed one, which pip must not change."""
    installed = tmp_path / "installed"
    add_distribution(installed, "numpy", "1.26.2")
    wheel = tmp_path / "wheels/scikit_image-0.26.0-py3-none-any.whl"
    build_wheel(wheel, "scikit-image", "0.26.0", "numpy>=2")
    for name in ("insightface", "onnx", "onnxruntime", "opencv-python-headless", "requests", "tqdm"):
        add_distribution(installed, name, "1.0")
    environment = OFFLINE | {"PIP_FIND_LINKS": str(wheel.parent), "PYTHONPATH": str(installed)}
    before = freeze(bare_python, **environment)
    ran = run_python(bare_python, SCRIPT, **environment)
    assert ran.returncode == 0
    assert "installed: skimage. Reason: pip cannot add them without changing packages" in ran.stdout
    assert freeze(bare_python, **environment) == before


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
def test_host_with_old_pins_gains_packages_and_keeps_every_version(tmp_path: Path):
    """A1111 1.10.1's pins that newer packages would change, a local version of torch, and a real pip."""
    python = make_venv(tmp_path / "venv")
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

    ran = run_python(python, SCRIPT)
    after = freeze(python)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert before.items() <= after.items()
    assert {"insightface", "onnx", "onnxruntime", "opencv-python-headless", "scikit-image", "tqdm"} <= set(after)
    assert {"opencv-python", "onnxruntime-gpu"}.isdisjoint(after)
    assert run_python(python, SCRIPT).stdout == ""

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
