"""The extension's commands: errors, and what they import."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from facesnap_ext.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[3]
# runs `python -m facesnap_ext` in a process in which the named modules cannot be imported
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys({modules!r}))
sys.argv = ["facesnap", *{arguments!r}]
runpy.run_module("facesnap_ext", run_name="__main__")
"""
LAB_PACKAGES = [
    "facesnap_lab",
    "accelerate",
    "diffusers",
    "matplotlib",
    "peft",
    "scipy",
    "transformers",
    "tqdm",
    "yaml",
]


def run_without(modules: list[str], *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(modules=modules, arguments=arguments)
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, encoding="utf-8", check=False)


def test_errors_are_one_line_and_exit_code_1(stand_ins, tmp_path, capsys):
    assert main(["convert", str(stand_ins / "random.safetensors")]) == 1
    assert "random.safetensors is a FaceSnap file" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "none.safetensors"), "--out", str(tmp_path / "x.safetensors")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("facesnap: ")
    assert "none.safetensors" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), ["models", "get"]])
def test_help_imports_neither_the_lab_nor_large_packages(command: list[str]):
    ran = run_without([*LAB_PACKAGES, "torch", "numpy", "PIL", "safetensors", "cv2", "insightface"], *command, "--help")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"usage: {' '.join(['facesnap', *command])} ")
    if not command:
        assert all(f"\n    {name} " in ran.stdout for name in COMMANDS)
        assert "demo" not in ran.stdout


def test_models_and_convert_run_inside_a_webui_without_the_lab(tmp_path: Path):
    """A copy of the extension in a WebUI's folder finds that WebUI's model folder."""
    extension = tmp_path / "webui" / "extensions" / "facesnap"
    shutil.copytree(ROOT / "facesnap_ext", extension / "facesnap_ext", ignore=shutil.ignore_patterns("__pycache__"))
    models = tmp_path / "webui" / "models" / "facesnap"
    ran = run_without(LAB_PACKAGES, "models", "--json", cwd=extension)
    assert ran.returncode == 0, ran.stderr
    assert Path(json.loads(ran.stdout)["folder"]) == models.resolve()

    models.mkdir(parents=True)
    (models / "generic_model.pkl").write_bytes(b"no pickle")
    ran = run_without(LAB_PACKAGES, "convert", str(models / "generic_model.pkl"), cwd=extension)
    assert (ran.returncode, len(ran.stderr.splitlines())) == (1, 1)
    assert ran.stderr.startswith("facesnap: ")
    assert "generic_model.pkl" in ran.stderr
