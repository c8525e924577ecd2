"""The `facesnap` command offers the extension's and the lab's commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from facesnap_ext.cli.main import COMMANDS as EXTENSION_COMMANDS
from facesnap_lab.cli.main import COMMANDS, main


def test_help_lists_both_packages_commands():
    ran = subprocess.run([sys.executable, "-m", "facesnap_lab", "--help"], capture_output=True, text=True, check=True)
    assert set(EXTENSION_COMMANDS) < set(COMMANDS)
    assert all(f"\n    {name} " in ran.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), ["dataset", "build"]])
def test_help_does_not_import_large_packages(command: list[str]):
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["torch", "numpy", "PIL", "safetensors", "diffusers", "transformers"]))
from facesnap_lab.cli.main import main
main([*{command!r}, "--help"])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"usage: {' '.join(['facesnap', *command])} ")


def test_facesnap_script_is_the_labs_main():
    project = Path(__file__).parents[3].joinpath("pyproject.toml").read_text("utf-8")
    assert re.search(r'^facesnap = "(.+)"', project, re.M)[1] == f"{main.__module__}:{main.__name__}"


def test_plan_writes_the_list_and_counts_its_images(tmp_path, capsys):
    people, poses = tmp_path / "people", tmp_path / "poses"
    for file in (people / "ada.jpg", people / "bob" / "1.jpg", people / "bob" / "2.jpg", poses / "left.jpg"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "prompts.txt").write_text("a person on a beach\nan oil painting of a person\n", encoding="utf-8")
    options = ["--identities", str(people), "--poses", str(poses), "--prompts", str(tmp_path / "prompts.txt")]
    assert main(["plan", str(tmp_path / "list.yaml"), *options]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'list.yaml'}: 4 images"
    assert (tmp_path / "list.yaml").is_file()
